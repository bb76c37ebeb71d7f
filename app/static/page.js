// The time of an event, for app/tabs/latest.py. Browsers round their clocks: of two events in one tick, the second is later.
const stamp = () => (stamp.last = Math.max(performance.now(), (stamp.last ?? 0) + 0.001));
window.stamp = stamp;
// Keys of the blind vote; they do nothing while somebody writes or moves between tabs, or while another tab is shown.
// And what Gradio does not tell a screen reader: names of groups of choices, whether a section is open, which marks of a
// chart say nothing.
document.addEventListener('keydown', (event) => {
  if (event.target.closest('input, textarea, select, [contenteditable], [role=tab]')) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return; // Alt and an arrow turn the page back
  const keys = {arrowleft: 'vote_left', arrowright: 'vote_right', t: 'vote_tie', n: 'vote_neither'};
  const id = keys[event.key.toLowerCase()];
  const button = id && document.getElementById(id);
  if (button && button.offsetParent) { event.preventDefault(); button.click(); }
});
// Ctrl+Enter compares from any field of the Compare tab.
document.addEventListener('keydown', (event) => {
  const button = document.getElementById('run');
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && button?.offsetParent) button.click();
});
// A chart that was drawn while its tab was hidden has no width until it is told to look again.
document.addEventListener('click', (event) => {
  if (event.target.closest('[role=tab]')) setTimeout(() => window.dispatchEvent(new Event('resize')), 100);
});
const say = (element, name, value) => {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
};
const sayAll = () => {
  for (const group of document.querySelectorAll('fieldset'))
    say(group, 'aria-label', group.querySelector('[data-testid=block-info]')?.textContent.trim() || 'choices');
  for (const heading of document.querySelectorAll('button.label-wrap'))
    say(heading, 'aria-expanded', String(heading.classList.contains('open')));
  // What a chart has no words for, such as the cells that find the point under the pointer.
  for (const mark of document.querySelectorAll('.vega-embed [role=graphics-symbol]:not([aria-label])'))
    say(mark, 'aria-hidden', 'true');
};
new MutationObserver(sayAll).observe(document, {
  subtree: true, childList: true, attributes: true, attributeFilter: ['class'],
});
