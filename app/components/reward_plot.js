// Draws the value with Plotly, shows the pictures of the step under the pointer, enlarges them on click.
// Runs inside gr.HTML: `element`, `props`, `server` and `watch` come from Gradio.
const root = element.querySelector('.rp');
const plot = root.querySelector('.rp-plot');
const side = root.querySelector('.rp-side');
const note = root.querySelector('.rp-note');
const zoom = root.querySelector('.rp-zoom');
const fetchPictures = root.dataset.thumbnails ? server[root.dataset.thumbnails] : null;
const height = Number(root.dataset.height);
const pictures = new Map();   // "trace/step" -> data URI, small; "trace/step/full" -> data URI, full size
const asked = new Set();
let pointed = null;           // {step, curve}: what the pointer or the arrow keys chose; null = the last step
let drawn = false;
let narrow = false;           // as on a phone: fewer numbers on the axes, long lines in two
let siblingsOf = 0;           // of more than three curves only this one's siblings are shown: the one pointed at last

const view = () => (props.value && props.value.figure ? props.value : { figure: { data: [], layout: {} }, curves: [] });
const text = (tag, content, className) => {
  const node = document.createElement(tag);
  node.textContent = content;
  if (className) node.className = className;
  return node;
};

// ---- drawing -------------------------------------------------------------------------------------------------
const ink = (alpha) => {
  const [r, g, b] = getComputedStyle(root).color.match(/[\d.]+/g);
  return `rgba(${r},${g},${b},${alpha})`;
};

// What lies behind the plot: the page, or a fold of another colour.
function behind() {
  for (let node = root; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor;
    if (!/^(transparent|rgba\(.*, 0\))$/.test(color)) return color;
  }
  return '#fff';
}

function themed(layout) {
  const soft = ink(0.65);
  const grid = ink(0.14);
  const out = structuredClone(layout);
  // not transparent: Plotly gives the line under the pointer a rim of the background's colour
  out.paper_bgcolor = out.plot_bgcolor = behind();
  out.font = { family: 'system-ui, sans-serif', size: 12, color: ink(1) };
  out.height = height;
  for (const key of Object.keys(out).filter((k) => /^[xy]axis\d*$/.test(k))) {
    Object.assign(out[key], { gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickcolor: grid });
    if (out[key].showspikes) out[key].spikecolor = soft;
    if (key[0] === 'x') out[key].tickangle = 0;  // numbers that stand upright push the title out of the plot
    if (narrow && out[key].dtick === 100) out[key].dtick = 250;
  }
  for (const a of (narrow && out.annotations) || []) if (!a.text.includes('<')) a.text = a.text.replace(/^(.{30,}? )(.{12,})$/, '$1<br>$2');
  for (const a of out.annotations || []) if (a.font && a.font.color === 'soft') a.font.color = soft;
  for (const s of out.shapes || []) if (s.line && s.line.color === 'soft') s.line.color = soft;
  return out;
}

const crowded = () => view().curves.length > 3;
const visible = (d) => !d.meta || !crowded() || d.meta.siblings === siblingsOf;

function pointAtSiblings() {
  const { data } = view().figure;
  const lines = data.map((d, i) => i).filter((i) => data[i].meta);
  if (!crowded() || !lines.length || !pointed || pointed.curve === siblingsOf) return;
  siblingsOf = pointed.curve;
  Plotly.restyle(plot, { visible: lines.map((i) => visible(data[i])) }, lines);
}

function themedData(data) {
  const soft = ink(0.65);
  return structuredClone(data).map((d) => {
    d.visible = visible(d);
    if (d.line && d.line.color === 'soft') d.line.color = soft;
    if (d.marker && d.marker.color === 'soft') d.marker.color = soft;
    return d;
  });
}

const isNarrow = () => plot.clientWidth > 0 && plot.clientWidth < 520;

function draw() {
  const { figure } = view();
  note.textContent = view().note || '';
  root.querySelector('.rp-export').style.visibility = figure.data.length ? 'visible' : 'hidden';
  plot.style.display = figure.data.length ? '' : 'none';
  plot.style.minHeight = `${height}px`;  // while Plotly measures anew, what is below stays where it is
  root.classList.toggle('rp-many-plots', 'xaxis3' in figure.layout);
  narrow = isNarrow();
  if (!figure.data.length) { showSide(); return; }
  const config = { displayModeBar: false, responsive: true, doubleClick: 'reset' };
  Plotly.react(plot, themedData(figure.data), themed(figure.layout), config);
  if (!drawn) {
    drawn = true;
    plot.on('plotly_hover', hovered);
    plot.on('plotly_unhover', () => { if (!zoom.open) { pointed = null; showSide(); } });
    plot.on('plotly_click', (event) => { hovered(event); openZoom(); });
  }
  preload();
  showSide();
  if (zoom.open) showZoom();
}

function hovered(event) {
  let best = null;
  for (const p of event.points) {
    if (!p.customdata) continue;
    const away = Math.abs(p.y - (event.yvals ? event.yvals[0] : p.y));
    if (!best || away < best.away) best = { away, curve: p.customdata[0], step: p.customdata[1] };
  }
  if (!best) return;
  pointed = best;
  pointAtSiblings();
  preload();
  showSide();
}

// ---- pictures ------------------------------------------------------------------------------------------------
const uri = (curve, step, full) =>
  (full && pictures.get(`${curve.trace}/${step}/full`)) || pictures.get(`${curve.trace}/${step}`) || null;

async function load(trace, steps, full) {
  const end = full ? '/full' : '';
  const missing = steps.filter((s) => !asked.has(`${trace}/${s}${end}`));
  if (!fetchPictures || !missing.length) return;
  missing.forEach((s) => asked.add(`${trace}/${s}${end}`));
  let answer = {};
  try {
    answer = await fetchPictures({ trace, steps: missing, size: full ? 0 : 224 });
  } catch (error) {
    console.warn('pictures of a trace could not be fetched', error);
  }
  for (const s of missing) {
    if (answer[s]) pictures.set(`${trace}/${s}${end}`, answer[s]);
    else asked.delete(`${trace}/${s}${end}`);        // not decoded yet: ask again with the next value
  }
  showSide();
  if (zoom.open) showZoom();
}

function preload() {
  const done = new Set();
  for (const curve of view().curves) {
    if (!curve.pictures || done.has(curve.trace)) continue;
    done.add(curve.trace);
    load(curve.trace, curve.steps.slice(0, curve.pictures).map((s) => s.step), false);
  }
}

// One card per trajectory: two LRMs that score the same trajectory share its picture.
function trajectories() {
  const seen = new Map();
  view().curves.forEach((curve, index) => {
    if (!seen.has(curve.trace)) seen.set(curve.trace, { ...curve, index, scored: [] });
    seen.get(curve.trace).scored.push(curve);
  });
  return [...seen.values()];
}

function chosenStep() {
  const steps = view().curves.flatMap((c) => c.steps.map((s) => s.step));
  if (!steps.length) return null;
  return pointed ? Math.min(pointed.step, Math.max(...steps)) : Math.max(...steps);
}

function scoreLines(card, step, full) {
  return card.scored.flatMap((curve) => {
    const at = curve.steps.find((s) => s.step === step);
    if (!at || at.score === null) return [];
    const name = card.scored.length > 1 ? `${curve.lrm}: ` : '';
    return [`${name}${at.score.toFixed(2)}${at.verdict ? ` · ${full ? at.verdict : at.kept ? 'kept' : 'not kept'}` : ''}`];
  });
}

function image(card, step, full) {
  const source = uri(card, step, full);
  if (!source) return text('div', '', 'rp-blank');
  const node = document.createElement('img');
  node.src = source;
  node.alt = `picture predicted by ${card.label} at step ${step + 1}`;
  return node;
}

// A trajectory of N steps has N + 1 points; the last, at t = 0, is the finished picture.
const place = (at, total) => (!at ? '' : at.t === 0 ? 't = 0 · the finished picture' : `t = ${Math.round(at.t)} · step ${at.step + 1} of ${total}`);

function showSide() {
  side.replaceChildren();
  const step = chosenStep();
  const cards = trajectories();
  if (!fetchPictures || step === null) return;
  const sample = cards.map((c) => c.steps.find((s) => s.step === step)).find(Boolean);
  const total = Math.max(...cards.map((c) => c.total));
  side.append(text('div', pointed ? place(sample, total) : step < total ? `Sampling: step ${step + 1} of ${total}` : 'The pictures', 'rp-head'));
  side.append(text('div', pointed ? 'What the model predicts here. Click to enlarge.'
    : 'Point at the plot, or tap it: what the model predicted at that step.', 'rp-sub'));
  // Two policies: a row per seed, so that the two samples that started from the same noise stand side by side.
  const seeds = [...new Set(cards.map((c) => c.seed))];
  const paired = new Set(cards.map((c) => c.policy)).size === 2;
  if (paired) cards.sort((a, b) => seeds.indexOf(a.seed) - seeds.indexOf(b.seed));
  const size = cards.length < 3 && !paired ? 'rp-few' : cards.length > 6 && !paired ? 'rp-many' : cards.length > 4 ? 'rp-six' : '';
  const grid = text('div', '', `rp-cards ${size}`);
  cards.forEach((card, i) => {
    if (paired && (i === 0 || cards[i - 1].seed !== card.seed)) grid.append(text('div', `seed ${card.seed}`, 'rp-row'));
    const near = pointed && view().curves[pointed.curve] && view().curves[pointed.curve].trace === card.trace;
    const button = text('button', '', `rp-card${near ? ' rp-near' : ''}`);
    button.type = 'button';
    const name = text('b', paired ? card.policy : card.label);
    name.style.color = button.style.color = card.color;
    button.title = card.label;
    button.append(image(card, step, false), name);
    for (const line of scoreLines(card, step)) {
      const row = text('span', line);
      row.style.color = 'var(--body-text-color)';
      button.append(row);
    }
    button.onclick = () => { pointed = { curve: card.index, step }; openZoom(); };
    grid.append(button);
  });
  side.append(grid);
}

function openZoom() {
  if (!fetchPictures || chosenStep() === null) return;
  if (!zoom.open) zoom.showModal();
  showZoom();
}

// The nearest trajectory, and the one to hold beside it: the same seed under another policy, else the next seed.
function compared(cards) {
  const curve = pointed && view().curves[pointed.curve];
  const first = cards.find((c) => curve && c.trace === curve.trace) || cards[0];
  const other = cards.find((c) => c !== first && c.seed === first.seed) || cards.find((c) => c !== first);
  return other ? [first, other] : [first];
}

function showZoom() {
  const step = chosenStep();
  const shown = compared(trajectories());
  shown.forEach((card) => load(card.trace, [step], true));
  const at = shown[0].steps.find((s) => s.step === step);
  const figures = text('div', '', 'rp-big');
  for (const card of shown) {
    const figure = document.createElement('figure');
    const caption = text('figcaption', [card.label, ...scoreLines(card, step, true)].join(' · '));
    caption.style.color = card.color;
    figure.append(image(card, step, true), caption);
    figures.append(figure);
  }
  const nav = document.createElement('nav');
  const button = (label, action) => {
    const node = text('button', label);
    node.type = 'button';
    node.onclick = action;
    nav.append(node);
  };
  button('← earlier', () => move(-1));
  button('later →', () => move(1));
  button('Close', () => zoom.close());
  zoom.replaceChildren(text('div', place(at, shown[0].total), 'rp-head'), figures, nav);
}

function move(by) {
  const step = chosenStep();
  if (step === null) return;
  const last = Math.max(...view().curves.flatMap((c) => c.steps.map((s) => s.step)));
  pointed = { curve: pointed ? pointed.curve : 0, step: Math.min(last, Math.max(0, step + by)) };
  showSide();
  if (zoom.open) showZoom();
}

root.addEventListener('keydown', (event) => {
  if (event.key === 'ArrowLeft') move(-1);
  else if (event.key === 'ArrowRight') move(1);
  else if (event.key === 'Enter' && event.target === root) openZoom();
  else return;
  event.preventDefault();
});
zoom.addEventListener('click', (event) => { if (event.target === zoom) zoom.close(); });
zoom.addEventListener('close', () => { pointed = null; showSide(); });

// ---- keep up with the page -----------------------------------------------------------------------------------
watch('value', draw);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ['class'] });
new ResizeObserver(() => {
  if (!drawn || !plot.clientWidth) return;
  if (isNarrow() !== narrow) draw();
  Plotly.Plots.resize(plot);
}).observe(plot);
draw();
