// Draws a page of pictures, pairs or labels. Runs inside gr.HTML: `element`, `props`, `watch`, `trigger` are Gradio's.
const root = element.querySelector('.br');
const CHOICES = { first: 'first', second: 'second', tie: 'tie', both_bad: 'both bad', skip: 'skipped', '': 'undo' };

const node = (tag, className, content) => {
  const made = document.createElement(tag);
  made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
};
const picture = (hash, alt, className = '') => {
  const image = node('img', className);
  image.loading = 'lazy';
  image.src = `media/${hash}`;
  image.alt = alt;
  return image;
};
const ask = (kind, item) => trigger('select', { kind, item });

function tile(kind, item, ...content) {
  const button = node('button', 'br-tile');
  button.type = 'button';
  button.title = item.prompt;
  button.append(...content);
  button.onclick = () => ask(kind, item.id);
  return button;
}

// "2 of 3 chose first": which picture the answers favour, if any, and the words for it
function said(labels) {
  if (!labels.length) return ['', 'no label yet'];
  const count = {};
  labels.forEach((choice) => { count[choice] = (count[choice] || 0) + 1; });
  const words = Object.entries(count).map(([choice, n]) => (labels.length > 1 ? `${n}× ` : '') + CHOICES[choice]);
  const [first, second] = [count.first || 0, count.second || 0];
  return [first > second ? 'first' : second > first ? 'second' : '', words.join(', ')];
}

const pictures = (items) => items.map((item) => tile('picture', item, picture(item.hash, item.prompt),
  node('span', 'br-name', item.prompt || 'no prompt')));

const pairs = (items) => items.map((item) => {
  const [won, words] = said(item.labels);
  const two = node('span', 'br-two');
  two.append(picture(item.first, 'first', won === 'first' ? 'br-won' : ''),
    picture(item.second, 'second', won === 'second' ? 'br-won' : ''));
  return tile('pair', item, two, node('span', 'br-name', item.prompt), node('span', 'br-sub', `${words} · ${item.origin}`));
});

function labels(items) {
  const table = node('table', 'br-table');
  const head = table.createTHead().insertRow();
  for (const name of ['When', 'Annotator', 'Choice', 'Prompt', 'Seconds', 'Status']) head.append(node('th', '', name));
  const body = table.createTBody();
  for (const item of items) {
    const row = body.insertRow();
    row.className = item.status === 'taken back' ? 'br-gone' : '';
    row.tabIndex = 0;
    row.append(node('td', '', item.when), node('td', '', item.kind === 'human' ? item.annotator : `${item.annotator} (simulated)`),
      node('td', 'br-choice', CHOICES[item.choice]), node('td', '', item.prompt),
      node('td', '', item.seconds === null ? '' : item.seconds.toFixed(1)), node('td', '', item.status));
    row.onclick = () => ask('pair', item.pair);
    row.onkeydown = (event) => { if (event.key === 'Enter') ask('pair', item.pair); };
  }
  return table;
}

function draw() {
  if (!props.value) return; // nothing was looked for yet
  const { kind, items } = props.value;
  if (!items.length) {
    root.replaceChildren(node('div', 'br-empty', props.value.empty));
    return;
  }
  if (kind === 'labels') {
    root.replaceChildren(labels(items));
    return;
  }
  const grid = node('div', `br-grid br-${kind}`);
  grid.append(...(kind === 'pairs' ? pairs(items) : pictures(items)));
  root.replaceChildren(grid);
}
watch('value', draw);
draw();
