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
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_500",
    button_primary_text_color="white",
)

CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto !important; }
.gradio-container .main { padding-inline: clamp(8px, 2.5vw, 32px) !important; }
.masthead h1 { font-size: 1.6rem; font-weight: 700; margin: .25rem 0; }
.masthead p { margin: 0; max-width: 60rem; color: var(--body-text-color-subdued); }
.masthead .base { font-size: .9rem; margin-top: .25rem; overflow-wrap: anywhere; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

.message { padding: .6rem .8rem; border-radius: 8px; border-left: 4px solid var(--primary-600);
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.message ul { margin: .25rem 0 0 1.2rem; list-style: disc; }
.message.bad { border-color: #dc2626; }
.message.warn { border-color: #d97706; }
.message.good { border-color: #16a34a; }
.message.bad::before { content: "✕ "; }
.message.warn::before { content: "! "; }
.message.good::before { content: "✓ "; }

.grid, .scroll { overflow-x: auto; contain: inline-size; } /* wide tables scroll; they never widen the page */
.grid table { border-collapse: separate !important; border-spacing: 10px; border: 0 !important; }
.grid th, .grid td { border: 0 !important; padding: 0 !important; text-align: left; vertical-align: top; }
.grid thead th { vertical-align: bottom; font-weight: 600; max-width: 176px; overflow-wrap: anywhere; }
.grid tbody th { position: sticky; left: 0; z-index: 1; background: var(--body-background-fill);
  min-width: 120px; max-width: 220px; font-weight: 500; overflow-wrap: anywhere; }
.grid th small { display: block; color: var(--body-text-color-subdued); font-weight: 400; }
.cell { display: block; width: 176px; aspect-ratio: 1; padding: 0; border-radius: 10px; overflow: hidden;
  border: 2px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.cell img { width: 100%; height: 100%; margin: 0; object-fit: contain; image-rendering: pixelated; }
.cell.pending { border-style: dashed; }
button.cell { cursor: zoom-in; }
button.cell:hover { border-color: var(--primary-500); }
:is(button.cell, .turn, .grid, .scroll):focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.held { display: block; font-size: .75rem; color: var(--body-text-color-subdued); max-width: 176px;
  overflow-wrap: anywhere; margin-top: 3px; }

.flip { position: relative; width: min(100%, 512px); aspect-ratio: 1; margin: 0 auto; }
.flip figure { position: absolute; inset: 0; margin: 0; }
.flip img { width: 100%; height: 100%; margin: 0; object-fit: contain; image-rendering: pixelated;
  border-radius: 10px; }
.flip figcaption { position: absolute; left: 8px; top: 8px; padding: 2px 10px; border-radius: 999px; color: #fff;
  background: #000b; font-size: .85rem; }
.flip .back, .flip.turned .front { visibility: hidden; }
.flip.turned .back { visibility: visible; }
.turn { display: block; margin: .75rem auto 0; padding: .5rem 1.25rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill); }
kbd { font-size: .75rem; border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 0 4px; }
#slider img, #difference img { image-rendering: pixelated; }
#slider, #difference { max-width: 560px; margin: 0 auto; }

.facts { border-collapse: collapse; border: 0 !important; width: 100%; margin: .5rem 0; font-size: .9rem; }
.facts caption { text-align: left; font-weight: 600; padding: .25rem 0; }
.facts :is(th, td) { text-align: left; padding: .3rem .6rem !important; border: 0 !important; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary) !important; overflow-wrap: anywhere; }
.facts :is(thead, tbody, tr) { border: 0 !important; }
.facts :is(th, td) { min-width: 6.5rem; }
.facts td { font-variant-numeric: tabular-nums; }
.facts th[scope=row] { font-weight: 500; min-width: 6rem; }
.file { padding: .5rem 0 1rem; }
.file h3 { font-size: 1.1rem; font-weight: 700; margin: .25rem 0; }

.ballot { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; max-width: 640px; margin: 0 auto; }
.ballot img { width: 100%; aspect-ratio: 1; margin: 0; object-fit: contain; image-rendering: pixelated;
  border-radius: 10px; border: 2px solid var(--border-color-primary); }
.ballot p { grid-column: 1 / -1; margin: 0; text-align: center; font-size: 1.05rem; overflow-wrap: anywhere; }
@media (max-width: 480px) {
  .grid table { border-spacing: 6px; }
  .grid tbody th { min-width: 84px; max-width: 96px; font-size: .85rem; }
  .cell, .held { width: 128px; }
}
"""

# Keys of the blind vote; they do nothing while somebody writes, or while another tab is shown.
HEAD = """<script>
document.addEventListener('keydown', (event) => {
  if (event.target.closest('input, textarea, select, [contenteditable]') || event.ctrlKey || event.metaKey) return;
  const id = {ArrowLeft: 'vote_left', ArrowRight: 'vote_right', t: 'vote_tie', n: 'vote_neither'}[event.key];
  const button = id && document.getElementById(id);
  if (button && button.offsetParent) { event.preventDefault(); button.click(); }
});
</script>"""
