"""How the page looks: one theme, in the light and the dark, with nothing fetched from anywhere."""

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="stone",
    radius_size="md",
    spacing_size="md",
    text_size="md",
    font=SANS,
    font_mono=MONO,
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_label_text_weight="600",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_background_fill="*neutral_100",
    block_title_text_weight="600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
)

CSS = """
.gradio-container { max-width: 1360px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container .main { padding-inline: clamp(10px, 2.5vw, 32px) !important; width: 100%; }
.gradio-container { --faint: color-mix(in srgb, var(--body-text-color) 5%, transparent);
  --card: var(--block-background-fill); --line: var(--border-color-primary); }
.masthead { display: flex; flex-wrap: wrap; gap: 4px 24px; align-items: baseline; justify-content: space-between;
  padding: 6px 2px 2px; }
.masthead h1 { font-size: 1.55rem; font-weight: 750; letter-spacing: -.01em; margin: 0; }
.masthead h1 span, .tab-container button.selected { color: var(--primary-700) !important; }
.dark :is(.masthead h1 span, .tab-container button.selected) { color: var(--primary-400) !important; }
.masthead p { margin: 0; color: var(--body-text-color-subdued); }
.masthead .lead { flex-basis: 100%; }
.masthead .base { font-size: .85rem; padding: 2px 12px; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); overflow-wrap: anywhere; }
.html-container { padding: 0 !important; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
footer { opacity: .7; } footer .divider { display: none; }

.message { padding: .6rem .9rem; border-radius: 8px; border: 1px solid var(--line); border-left: 4px solid
  var(--primary-600); background: var(--card); overflow-wrap: anywhere; }
.message ul { margin: .25rem 0 0 1.2rem; list-style: disc; }
.message.bad { border-left-color: #dc2626; }
.message.warn { border-left-color: #d97706; }
.message.good { border-left-color: #16a34a; }
.message.bad::before { content: "✕ "; color: #dc2626; font-weight: 700; }
.message.warn::before { content: "! "; color: #d97706; font-weight: 700; }
.message.good::before { content: "✓ "; color: #16a34a; font-weight: 700; }

/* Empty until there is something: Gradio prefixes selectors at every comma, hence one :has for each. */
:is(#pair_note, #train_curves, #train_samples, #verdict):not(:has(.message)):not(:has(figure)):not(:has(table)) {
  display: none; }
#again { align-self: flex-start; width: auto; padding-inline: 24px; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 1.6rem !important; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; }
.strip img { width: 52px; height: 52px; margin: 0; object-fit: cover; border-radius: 8px;
  border: 1px solid var(--line); }
.tools { gap: 10px !important; }
.tools button { min-height: 34px; }
.beside { align-self: end; }
.grid, .scroll { overflow-x: auto; contain: inline-size; } /* wide tables scroll; they never widen the page */
.grid { --side: clamp(128px, calc((100cqi - 190px) / var(--columns, 3) - 14px), 300px); border-radius: 10px;
  border: 1px solid var(--line); background: var(--card); padding: 4px; }
#grid, #race_samples, #train_samples { container-type: inline-size; }
.grid table { border-collapse: separate !important; border-spacing: 10px; border: 0 !important; margin: 0; }
.grid :is(thead, tbody, tr) { border: 0 !important; background: none !important; }
.grid th, .grid td { border: 0 !important; padding: 0 !important; text-align: left; vertical-align: top; }
.grid thead th { vertical-align: bottom; font-weight: 650; max-width: var(--side); overflow-wrap: anywhere; }
.grid tbody th { position: sticky; left: 0; z-index: 1; background: var(--card);
  min-width: 110px; max-width: 180px; font-weight: 500; overflow-wrap: anywhere; }
.grid th small { display: block; color: var(--body-text-color-subdued); font-weight: 400; }
.cell { display: block; width: var(--side); aspect-ratio: 1; padding: 0; border-radius: 10px; overflow: hidden;
  border: 1px solid var(--line); background: var(--faint); }
.cell img { width: 100%; height: 100%; margin: 0; object-fit: contain; }
.cell.pending { border-style: dashed; border-width: 2px; }
button.cell { cursor: zoom-in; transition: box-shadow .15s; }
button.cell:hover { box-shadow: 0 0 0 3px var(--primary-500); }
:is(button.cell, .turn, .grid, .scroll, summary):focus-visible { outline: 3px solid var(--primary-500);
  outline-offset: 2px; }
/* Long names and prompts are cut; the whole is in the title. */
.name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  overflow-wrap: anywhere; }
.grid tbody .name { -webkit-line-clamp: 7; }
.held { display: block; font-size: .75rem; color: var(--body-text-color-subdued); max-width: var(--side);
  overflow-wrap: anywhere; margin-top: 3px; }

.flip { position: relative; width: min(100%, 512px); aspect-ratio: 1; margin: 0 auto; }
.flip figure { position: absolute; inset: 0; margin: 0; }
.flip img { width: 100%; height: 100%; margin: 0; object-fit: contain;
  border-radius: 10px; }
.flip figcaption { position: absolute; left: 8px; top: 8px; padding: 2px 10px; border-radius: 999px; color: #fff;
  background: #000b; font-size: .85rem; }
.flip .back, .flip.turned .front { visibility: hidden; }
.flip.turned .back { visibility: visible; }
.turn { display: block; margin: .75rem auto 0; padding: .5rem 1.25rem; border-radius: 8px;
  border: 1px solid var(--line); background: var(--button-secondary-background-fill); }
kbd { font-size: .75rem; border: 1px solid var(--line); border-radius: 4px; padding: 0 4px; }
#slider, #difference { max-width: 560px; margin: 0 auto; }

.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.halves.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 255px), 1fr)); }
.halves > * { min-width: 0; }
.facts { border-collapse: collapse; border: 0 !important; width: 100%; margin: 0; font-size: .9rem; }
.card { border: 1px solid var(--line); border-radius: 10px; background: var(--card); padding: 6px 8px;
  margin: 0 0 14px; }
.card figcaption { font-weight: 650; padding: .35rem .5rem; }
.facts th, .facts td { text-align: left; padding: .35rem .5rem !important; border: 0 !important; vertical-align: top;
  overflow-wrap: anywhere; }
.facts tbody th, .facts tbody td { border-top: 1px solid var(--line) !important; }
.facts :is(thead, tbody, tr) { border: 0 !important; background: none !important; }
.facts thead th { vertical-align: bottom; overflow-wrap: normal; font-weight: 600;
  color: var(--body-text-color-subdued); }
.facts td { font-variant-numeric: tabular-nums; }
.facts td.short { white-space: nowrap; }
.message + .card { margin-top: 14px; }
.facts th[scope=row] { font-weight: 500; min-width: 5.5rem; }
.facts.many th[scope=row] { min-width: 7rem; max-width: 15rem; overflow-wrap: anywhere; }
.facts.many td, .facts.many thead th { min-width: 5.4rem; overflow-wrap: break-word; }
.file h3 { font-size: 1.15rem; font-weight: 700; margin: .25rem 0 .5rem; overflow-wrap: anywhere; }
.file .message { margin-bottom: 14px; }
.file details { margin-top: 8px; }
.file summary { cursor: pointer; font-weight: 600; margin-bottom: .5rem; }

.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; list-style: none; padding: 0; margin: 0 0 10px; }
.legend li { display: flex; align-items: center; gap: 8px; margin: 0; max-width: 100%; }
.legend b { min-width: 0; overflow-wrap: anywhere; }
fieldset label { max-width: 100%; min-width: 0; }
fieldset label span { min-width: 0; overflow-wrap: anywhere; }
.legend svg { width: 36px; height: 8px; flex: none; }
.legend small, .chart small { color: var(--body-text-color-subdued); }
.chart { margin: 0; padding: 10px 12px 4px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
.chart > svg { width: 100%; height: auto; display: block; color: var(--body-text-color); }
.chart .empty { color: var(--body-text-color-subdued); padding: 2rem 0; text-align: center; }
.progress { display: grid; gap: 6px; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
.progress progress { width: 100%; height: 10px; appearance: none; border: 0; border-radius: 5px; overflow: hidden;
  background: var(--faint); }
.progress progress::-webkit-progress-bar { background: var(--faint); }
.progress progress::-webkit-progress-value { background: var(--primary-600); }
.progress progress::-moz-progress-bar { background: var(--primary-600); }
.log { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; font-family: var(--font-mono); margin: 0; }

.ballot { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; max-width: 720px; margin: 0 auto; }
.ballot img { width: 100%; aspect-ratio: 1; margin: 0; object-fit: contain;
  border-radius: 10px; border: 1px solid var(--line); background: var(--faint); }
.ballot p { grid-column: 1 / -1; margin: 0; text-align: center; font-size: 1.1rem; overflow-wrap: anywhere; }
.verdicts { max-width: 720px; margin: 0 auto; gap: 8px !important; align-items: stretch; }
.tally { max-width: 720px; margin: 0 auto; }
/* A choice of views is a line, not a box with a heading. */
.form:has(> #view) { background: none; border: 0; overflow: visible; }
#view { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; border: 0 !important; padding: 0 !important;
  background: none !important; overflow: visible; }
#view > * { margin: 0 !important; padding: 0; }
@media (max-width: 700px) {
  .tab-container button { padding: 0 6px !important; font-size: .84rem !important; }
  .masthead .lead { display: none; } /* the first screen shows images */
  .tab-body > .results { order: -1; }
  /* What a row is stands above its images, so that three columns fit. */
  .grid { --side: clamp(104px, calc((100cqi - 10px) / var(--columns, 3) - 6px), 256px); }
  .grid table { display: block; width: max-content; }
  .grid :is(thead, tbody) { display: block; }
  .grid tr { display: grid; grid-template-columns: repeat(var(--columns), var(--side)); gap: 6px; padding: 4px 2px; }
  .grid thead th:first-child { position: absolute; }
  .grid tbody th { grid-column: 1 / -1; max-width: calc(100cqi - 16px); width: max-content; font-size: .85rem; }
  .grid tbody th .name { display: inline; }
  .grid tbody th small { display: inline; margin-left: .5em; }
  .verdicts { flex-wrap: nowrap !important; }
  .verdicts button { padding-inline: 4px; font-size: .85rem; }
  #view label { padding: 6px 9px; }
}
"""

# Keys of the blind vote; they do nothing while somebody writes or moves between tabs, or while another tab is shown.
# And what Gradio does not tell a screen reader: names of groups of choices and images, whether a section is open.
HEAD = """<script>
document.addEventListener('keydown', (event) => {
  if (event.target.closest('input, textarea, select, [contenteditable], [role=tab]')) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return; // Alt and an arrow turn the page back
  const keys = {arrowleft: 'vote_left', arrowright: 'vote_right', t: 'vote_tie', n: 'vote_neither'};
  const id = keys[event.key.toLowerCase()];
  const button = id && document.getElementById(id);
  if (button && button.offsetParent) { event.preventDefault(); button.click(); }
});
const say = (element, name, value) => {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
};
const sayAll = () => {
  for (const group of document.querySelectorAll('fieldset'))
    say(group, 'aria-label', group.querySelector('[data-testid=block-info]')?.textContent.trim() || 'choices');
  for (const heading of document.querySelectorAll('button.label-wrap'))
    say(heading, 'aria-expanded', String(heading.classList.contains('open')));
  for (const image of document.querySelectorAll('#difference button:has(img)'))
    say(image, 'aria-label', 'heat map of the difference');
};
new MutationObserver(sayAll).observe(document, {
  subtree: true, childList: true, attributes: true, attributeFilter: ['class'],
});
</script>"""
