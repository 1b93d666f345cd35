// Draws the slider and the grid of a finished comparison. Runs inside gr.HTML: `element`, `props`, `watch` are Gradio's.
const root = element.querySelector('.ba');
const find = (name) => root.querySelector(`.ba-${name}`);
const stage = find('stage');
const PAGE = 8;                // rows of the grid shown at once
const WORDS = { tie: 'tie', both_bad: 'both bad', skip: 'skipped', '': 'no vote' };
let chosen = 0;
let page = 0;

const rows = () => (props.value && props.value.rows) || [];
const picture = (hash) => `media/${hash}`;
const node = (tag, className, content) => {
  const made = document.createElement(tag);
  made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
};

function wipe(share) {
  find('a').style.clipPath = `inset(0 ${100 - share}% 0 0)`;
  find('line').style.left = `${share}%`;
  find('range').value = share;
}

const verdict = (row) => (row.vote === 'a' ? `chosen: ${props.value.a}` : row.vote === 'b' ? `chosen: ${props.value.b}`
  : WORDS[row.vote]);

function choose(index) {
  const row = rows()[index];
  if (!row) return;
  chosen = index;
  page = Math.floor(index / PAGE);
  find('prompt').textContent = row.prompt;
  find('a').src = picture(row.a);
  find('b').src = picture(row.b);
  find('a').alt = props.value.a;
  find('b').alt = props.value.b;
  const judged = row.judge_a === null || row.judge_a === undefined ? ''
    : ` · judge ${row.judge_a.toFixed(2)} against ${row.judge_b.toFixed(2)}`;
  find('facts').textContent = `seed ${row.seed} · ${verdict(row)}${judged}`;
  list();
}

function cell(row, side) {
  const made = node('span', `ba-cell${row.vote === side ? ' ba-won' : ''}`);
  const image = node('img', '');
  image.loading = 'lazy';
  image.src = picture(row[side]);
  image.alt = props.value[side];
  made.append(image);
  const score = row[`judge_${side}`];
  if (score !== null && score !== undefined) made.append(node('small', '', score.toFixed(2)));
  return made;
}

function list() {
  const pages = Math.max(1, Math.ceil(rows().length / PAGE));
  find('rows').replaceChildren(...rows().slice(page * PAGE, (page + 1) * PAGE).map((row, offset) => {
    const index = page * PAGE + offset;
    const button = node('button', `ba-row${index === chosen ? ' ba-chosen' : ''}`);
    button.type = 'button';
    const text = node('span', 'ba-text', row.prompt);
    text.append(node('small', '', `seed ${row.seed} · ${verdict(row)}`));
    button.append(text, cell(row, 'a'), cell(row, 'b'));
    button.onclick = () => choose(index);
    return button;
  }));
  find('where').textContent = `${page + 1} of ${pages}`;
  find('back').disabled = page === 0;
  find('on').disabled = page >= pages - 1;
  find('nav').style.display = pages > 1 ? '' : 'none';
}

function draw() {
  root.style.display = rows().length ? '' : 'none';
  if (!rows().length) return;
  find('left').textContent = find('name-a').textContent = find('name-a').title = props.value.a;
  find('right').textContent = find('name-b').textContent = find('name-b').title = props.value.b;
  wipe(50);
  choose(0);
}

function drag(event) {
  const box = stage.getBoundingClientRect();
  wipe(Math.round(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width))));
}
stage.addEventListener('pointerdown', (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
stage.addEventListener('pointermove', (event) => { if (event.buttons) drag(event); });
find('range').addEventListener('input', (event) => wipe(Number(event.target.value)));
find('back').addEventListener('click', () => { page -= 1; list(); });
find('on').addEventListener('click', () => { page += 1; list(); });
root.addEventListener('keydown', (event) => {
  if (event.target !== root && !event.target.classList.contains('ba-row')) return;
  const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  choose(Math.min(rows().length - 1, Math.max(0, chosen + by)));
  root.focus({ preventScroll: true });
});
watch('value', draw);
draw();
