// Two images of a comparison, over the whole window.
//
//   views       Flip, Side by side, Slider, Difference: keys 1 to 4
//   arrows      the next image of the grid, along a row or a column; with Shift, the image on the left side
//   space       flips between the two images
//   + - 0       zoom, and back; the wheel zooms, dragging moves; all images of a view move together
//
// The grid is the only source: cells are [data-row][data-column], labels stand in their data attributes. What is looked
// at goes to the server by `viewer.onview`, so that it is kept with the comparison.

const viewer = (() => {
  const VIEWS = ['Flip', 'Side by side', 'Slider', 'Difference'];
  const FULL_DIFFERENCE = 0.5; // of the range of a channel: what the difference shows brightest
  const MAGMA = [[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100],
    [251, 135, 97], [254, 194, 135], [252, 253, 191]];
  const state = {view: VIEWS[0], row: 0, left: 0, right: 0, turned: false, split: 50, zoom: 1, x: 0, y: 0};
  let dialog, opener, onview = () => {};

  const cellAt = (row, column) => document.querySelector(`#grid [data-row="${row}"][data-column="${column}"]`);
  const counts = () => {
    const grid = document.querySelector('#grid .grid');
    return {rows: Number(grid?.dataset.rows || 0), columns: Number(grid?.dataset.columns || 0)};
  };
  const labelOf = (column) => document.querySelector(`#grid th[data-column="${column}"]`)?.dataset.label || '';
  const rowLabel = (row) => document.querySelector(`#grid th[data-row="${row}"]`)?.dataset.label || '';

  function build() {
    dialog = document.createElement('dialog');
    dialog.id = 'viewer';
    dialog.setAttribute('aria-label', 'Two images of the comparison');
    dialog.innerHTML = `<header>
        <div class="views" role="group" aria-label="View">${VIEWS.map((name, n) =>
          `<button type="button" data-view="${name}">${name} <kbd>${n + 1}</kbd></button>`).join('')}</div>
        <label>Left <select class="left"></select></label>
        <label>Right <select class="right"></select></label>
        <button type="button" class="close" aria-label="Close">✕</button>
      </header>
      <div class="stage"></div>
      <input type="range" class="split" min="0" max="100" value="50" aria-label="Where the left image ends">
      <footer><p class="row" aria-live="polite"></p>
        <p class="keys"><kbd>←</kbd><kbd>→</kbd> column · <kbd>↑</kbd><kbd>↓</kbd> row · <kbd>space</kbd> flip ·
        wheel zoom, drag move, <kbd>0</kbd> back</p></footer>`;
    (document.querySelector('.gradio-container') || document.body).append(dialog);
    dialog.querySelector('.views').addEventListener('click', (event) => {
      const name = event.target.closest('[data-view]')?.dataset.view;
      if (name) change({view: name});
    });
    for (const side of ['left', 'right'])
      dialog.querySelector(`select.${side}`).addEventListener('change', (event) =>
        change({[side]: Number(event.target.value)}));
    dialog.querySelector('.close').addEventListener('click', () => dialog.close());
    dialog.querySelector('.split').addEventListener('input', (event) => {
      state.split = Number(event.target.value);
      place();
    });
    dialog.addEventListener('close', () => {
      report('Grid');
      opener?.focus();
    });
    dialog.addEventListener('keydown', keyed);
    moves(dialog.querySelector('.stage'));
  }

  function keyed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches('select') && event.key !== ' ') return; // it has arrows and letters of its own
    const {rows, columns} = counts(), sliding = event.target.matches('.split');
    const side = event.shiftKey ? 'left' : 'right';
    const step = (name, by, count) => change({[name]: (state[name] + by + count) % count});
    const toColumn = (by) => step(side, by, columns), toRow = (by) => step('row', by, rows);
    const turned = document.querySelector('#grid .grid')?.dataset.transposed === 'true';
    const [across, down] = turned ? [toRow, toColumn] : [toColumn, toRow];
    const actions = {
      arrowleft: () => across(-1),
      arrowright: () => across(1),
      arrowup: () => down(-1),
      arrowdown: () => down(1),
      ' ': () => change({turned: !state.turned}),
      '+': () => zoom(1.25),
      '=': () => zoom(1.25),
      '-': () => zoom(0.8),
      0: () => change({zoom: 1, x: 0, y: 0}),
    };
    VIEWS.forEach((name, n) => {
      actions[n + 1] = () => {
        change({view: name});
        if (event.target.matches('[data-view]')) dialog.querySelector(`[data-view="${name}"]`).focus();
      };
    });
    const key = event.key.toLowerCase();
    if (!(key in actions) || (sliding && key.startsWith('arrow'))) return;
    event.preventDefault(); // also where a button has the focus: space flips wherever it is
    event.stopPropagation();
    actions[key]();
  }

  function moves(stage) {
    let held = null;
    stage.addEventListener('wheel', (event) => {
      event.preventDefault();
      zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
    }, {passive: false});
    stage.addEventListener('pointerdown', (event) => {
      held = {x: event.clientX - state.x, y: event.clientY - state.y};
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener('pointermove', (event) => {
      if (!held) return;
      Object.assign(state, {x: event.clientX - held.x, y: event.clientY - held.y});
      place();
    });
    for (const name of ['pointerup', 'pointercancel']) stage.addEventListener(name, () => { held = null; });
  }

  function zoom(factor) {
    state.zoom = Math.min(16, Math.max(1, state.zoom * factor));
    if (state.zoom === 1) Object.assign(state, {x: 0, y: 0});
    place();
  }

  function place() {
    const moved = `translate(${state.x}px, ${state.y}px) scale(${state.zoom})`;
    for (const image of dialog.querySelectorAll('.pane > :is(img, canvas)')) image.style.transform = moved;
    const stage = dialog.querySelector('.stage');
    stage.style.setProperty('--split', `${state.split}%`);
    stage.classList.toggle('turned', state.turned);
  }

  function pane(kind, column) {
    const source = cellAt(state.row, column)?.querySelector('img');
    const figure = document.createElement('figure');
    figure.className = `pane ${kind}`;
    if (source) {
      const image = new Image();
      image.src = source.src;
      image.alt = source.alt;
      image.draggable = false;
      figure.append(image);
    } else {
      figure.insertAdjacentHTML('beforeend', '<p class="missing">not generated</p>');
    }
    const caption = document.createElement('figcaption');
    caption.textContent = labelOf(column);
    figure.append(caption);
    return figure;
  }

  async function difference(figure, left, right) {
    const [a, b] = await Promise.all([left, right].map(async (column) => {
      const image = new Image();
      image.src = cellAt(state.row, column)?.querySelector('img')?.src || '';
      await image.decode();
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      const context = canvas.getContext('2d');
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, canvas.width, canvas.height);
    }));
    if (a.width !== b.width || a.height !== b.height) return;
    const canvas = Object.assign(document.createElement('canvas'), {width: a.width, height: a.height});
    const shown = new ImageData(a.width, a.height);
    let sum = 0, many = 0;
    for (let i = 0; i < a.data.length; i += 4) {
      const d = (Math.abs(a.data[i] - b.data[i]) + Math.abs(a.data[i + 1] - b.data[i + 1])
        + Math.abs(a.data[i + 2] - b.data[i + 2])) / 765;
      sum += d;
      many += d > 0.1;
      const at = Math.min(1, d / FULL_DIFFERENCE) * (MAGMA.length - 1);
      const low = MAGMA[Math.floor(at)], high = MAGMA[Math.ceil(at)];
      for (let c = 0; c < 3; c++) shown.data[i + c] = low[c] + (high[c] - low[c]) * (at % 1);
      shown.data[i + 3] = 255;
    }
    canvas.getContext('2d').putImageData(shown, 0, 0);
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', 'difference, bright where the images differ');
    figure.replaceChildren(canvas, figure.querySelector('figcaption'));
    const pixels = a.width * a.height, percent = (v, digits) => `${(100 * v).toFixed(digits)} %`;
    figure.querySelector('figcaption').innerHTML = `<span class="scale" aria-hidden="true"></span> 0 to ${
      percent(FULL_DIFFERENCE, 0)} of the range · mean ${percent(sum / pixels, 1)}, ${
      percent(many / pixels, 0)} of the pixels differ by more than a tenth`;
    place();
  }

  function draw() {
    const stage = dialog.querySelector('.stage');
    const left = () => pane('first', state.left), right = () => pane('second', state.right);
    const parts = {
      'Flip': () => [right(), left()],
      'Side by side': () => [left(), right()],
      'Slider': () => [right(), left()],
      'Difference': () => {
        const middle = document.createElement('figure');
        middle.className = 'pane heat';
        middle.append(document.createElement('figcaption'));
        difference(middle, state.left, state.right).catch(() => {
          middle.querySelector('figcaption').textContent = 'not both of these images are generated';
        });
        return [left(), middle, right()];
      },
    }[state.view]();
    stage.className = `stage ${state.view.toLowerCase().replaceAll(' ', '-')}`;
    stage.replaceChildren(...parts);
    for (const button of dialog.querySelectorAll('[data-view]'))
      button.setAttribute('aria-pressed', String(button.dataset.view === state.view));
    dialog.querySelector('.split').hidden = state.view !== 'Slider';
    dialog.querySelector('.row').textContent = rowLabel(state.row);
    const {columns} = counts();
    for (const side of ['left', 'right']) {
      const options = [...Array(columns).keys()].map((n) => new Option(labelOf(n), n, n === state[side], n === state[side]));
      dialog.querySelector(`select.${side}`).replaceChildren(...options);
    }
    place();
  }

  function change(values) {
    Object.assign(state, values);
    draw();
    report(state.view);
  }

  const report = (name) => onview({name, row: state.row, left: state.left, right: state.right});

  // Opens on a cell of the grid, against the left image that was looked at last, or on a view that was kept.
  function open(values) {
    if (!dialog?.isConnected) build();
    const {rows, columns} = counts();
    if (!rows || !columns) return;
    opener = document.activeElement;
    Object.assign(state, {turned: false, zoom: 1, x: 0, y: 0}, values);
    state.row = Math.min(state.row, rows - 1);
    state.right = Math.min(state.right, columns - 1);
    if (state.left >= columns || (state.left === state.right && columns > 1))
      state.left = state.right ? 0 : columns - 1;
    draw();
    if (!dialog.open) dialog.showModal();
    dialog.querySelector(`[data-view="${state.view}"]`).focus();
    report(state.view);
  }

  // Turns to the page before or after, of which the last is before the first.
  function turn(nav, by, trigger) {
    const names = JSON.parse(nav.dataset.names), at = (Number(nav.dataset.pageNow) + by + names.length) % names.length;
    nav.dataset.pageNow = at;
    nav.querySelector('b').textContent = names[at];
    nav.querySelector('small').textContent = `page ${at + 1} of ${names.length}`;
    const grid = nav.parentElement.querySelector('.grid');
    for (const part of grid.querySelectorAll('[data-page]')) part.hidden = Number(part.dataset.page) !== at;
    const heads = [...grid.querySelectorAll('thead th')].slice(1).filter((head) => !head.hidden);
    grid.style.setProperty('--columns', heads.length);
    trigger('click', {page: at});
  }

  // Joins the grid: its cells open the viewer, and `trigger` takes what is looked at to the server.
  function attach(element, trigger) {
    onview = (view) => trigger('click', view);
    element.addEventListener('click', (event) => {
      const turned = event.target.closest('[data-turn]');
      if (turned) turn(turned.closest('nav'), Number(turned.dataset.turn), trigger);
      const cell = event.target.closest('button[data-row]');
      if (cell) open({row: Number(cell.dataset.row), right: Number(cell.dataset.column)});
    });
    const restore = () => {
      const kept = element.querySelector('.grid[data-view]');
      if (!kept) return;
      const {name, row, left, right} = JSON.parse(kept.dataset.view);
      kept.removeAttribute('data-view');
      if (VIEWS.includes(name)) open({view: name, row, left, right});
    };
    new MutationObserver(restore).observe(element, {childList: true, subtree: true});
    restore();
  }

  return {attach, open};
})();
window.viewer = viewer;
