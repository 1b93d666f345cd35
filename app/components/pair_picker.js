// Shows pairs, takes answers, keeps decoded pairs ahead. Runs inside gr.HTML after pair_outbox.js: `element`, `props`,
// `trigger` and `watch` come from Gradio. Every text goes into the page as text, never as HTML.
const AHEAD = 10;              // decoded pairs kept ready
const REFILL_BELOW = 8;
const POLL_MS = 1000;          // while there is nothing to show
const SETTLE_MS = { key: 80, pointer: 350 };   // a second click of a double click must not answer the next pair
const FLICKER_MS = 400;        // slow enough never to flash more than three times a second
const KEYS = { ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'tie', x: 'both_bad', s: 'skip' };
const PAST = 30;

const root = element.querySelector('.pp');
const $ = (selector) => root.querySelector(selector);
const slots = { left: $('.pp-left'), right: $('.pp-right') };
const buttons = [...root.querySelectorAll('.pp-actions button')];

let target = null;             // {study, comparison} of the value
let round = 0;                 // answers to an older target are thrown away
let studyKey = '';
let name = null;               // who votes; null: nobody yet
let current = null;
let queue = [];
let past = [];                 // what U brings back
let broken = new Map();        // pair -> how often its pictures did not load
let stats = null;
let armed = false;
let shownAt = 0;
let fetching = false;
let pollTimer = 0;
let failures = 0;
let finished = false;
let said = '';                 // the last word beside the dot
let flickerTimer = 0;

const outbox = new Outbox({
  changed: showSaved,
  saved(entry, answer) {
    said = entry.shown;
    if (!isOurs(entry.body)) return;
    stats = answer.stats;
    showStats();
    if (entry.route === 'undo') undone(entry, answer.pair);
    if (target.comparison && stats.votes >= stats.planned) finish();
  },
  refused(entry, sentence) { said = `not saved: ${sentence}`; },
  held(entry, status) { if (status !== 410) meet(); },
});
const others = new BroadcastChannel('preference-lab');

// ---- who ---------------------------------------------------------------------------------------------------------
async function meet() {
  const mine = round;
  const answer = await ask('api/annotator');
  if (mine !== round) return;
  if (!answer || answer.error) {
    setState('loading', 'One moment', answer ? answer.error : 'The server does not answer. Trying again…');
    pollTimer = setTimeout(meet, retryDelay());
    return;
  }
  if (answer.name) { welcome(answer.name); return; }
  if (answer.known.length === 0) {   // the very first visit needs no click
    if (!(await choose(answer.suggested))) pollTimer = setTimeout(meet, retryDelay());
    return;
  }
  name = null;
  openName('Whose labels are these? They are kept apart by name.', answer.known, answer.suggested);
}

async function choose(wanted) {
  const answer = await ask('api/annotator', { name: wanted });
  if (!answer || answer.error) {
    $('.pp-name-error').textContent = answer ? answer.error : 'The server does not answer; try again in a moment.';
    return false;
  }
  others.postMessage({ what: 'name' });
  welcome(answer.name);
  return true;
}

function welcome(who) {
  const same = who === name;
  name = who;
  $('.pp-name').hidden = true;
  $('.pp-who-text').textContent = `labelling as ${name}`;
  $('.pp-rename').hidden = false;
  outbox.release(name);
  showSaved();
  if (same) { refill(); return; }
  restart();
}

function openName(why, known, value) {
  $('.pp-name').hidden = false;
  $('.pp-name-why').textContent = why;
  $('.pp-name-error').textContent = '';
  $('.pp-name-input').value = value;
  $('.pp-name-known').replaceChildren(...(known.length ? ['Already here: '] : []), ...known.slice(0, 12).map((each) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'pp-link';
    button.textContent = each;
    button.onclick = () => choose(each);
    return button;
  }));
  if (!name) setState('name', '', '');
  showSaved();
  $('.pp-name-input').focus({ preventScroll: true });
  $('.pp-name-input').select();
  fit();
}

// ---- pairs -------------------------------------------------------------------------------------------------------
async function ask(url, body) {
  try {
    const response = await fetch(url, body && {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (response.ok || (response.status >= 400 && response.status < 500)) {
      failures = 0;
      return { ...answer, status: response.status };
    }
  } catch { /* no server: the caller tries again */ }
  failures += 1;
  return null;
}

const retryDelay = () => Math.min(500 * 2 ** failures, 15000);
const isOurs = (body) => target && body.study === target.study && (body.comparison || null) === target.comparison;

function unsent() {
  const gone = new Set();        // an undo after a vote makes the pair due again
  for (const entry of outbox.entries()) {
    if (isOurs(entry.body) && entry.route === 'vote') gone.add(entry.body.pair);
  }
  return gone;
}

async function refill() {
  if (!target || !name || fetching || finished || queue.length >= REFILL_BELOW) return;
  clearTimeout(pollTimer);
  fetching = true;
  const mine = round;
  const known = new Set([...queue.map((item) => item.pair), ...unsent()]);
  if (current) known.add(current.pair);
  for (const [pair, times] of broken) if (times > 1) known.add(pair);
  const query = new URLSearchParams({ study: target.study, n: AHEAD - queue.length + 2, exclude: [...known].join(',') });
  if (target.comparison) query.set('comparison', target.comparison);
  const answer = await ask(`api/pairs/next?${query}`);
  fetching = false;
  if (mine !== round) { refill(); return; }
  if (!answer) { wait('The server does not answer. Trying again…', 'loading'); return; }
  if (answer.status === 401) { meet(); return; }
  if (answer.error) { wait(answer.error, 'stuck'); return; }
  studyKey = answer.study_key;
  $('.pp-question').textContent = answer.question;
  stats = answer.stats;
  showStats();
  const have = new Set([...queue.map((item) => item.pair), ...unsent(), current && current.pair]);
  for (const item of answer.pairs) if (!have.has(item.pair)) queue.push(prepare(item));
  if (!current) advance();
  if (!current) empty(answer);
  if (queue.length < REFILL_BELOW) poll(answer.pairs.length ? 200 : POLL_MS);
}

function poll(after) {
  clearTimeout(pollTimer);
  pollTimer = setTimeout(() => (visible() ? refill() : poll(POLL_MS)), after);
}

function wait(sentence, state) {
  if (!current) setState(state, state === 'stuck' ? 'No pair to show' : 'One moment', sentence);
  poll(retryDelay());
}

function prepare(item) {
  const load = (side) => {
    const image = new Image();
    image.decoding = 'sync';
    image.draggable = false;
    image.alt = side === 'left' ? 'Left picture' : 'Right picture';
    image.width = item[`${side}_picture`].width;
    image.height = item[`${side}_picture`].height;
    image.src = item[`${side}_picture`].url;
    return image;
  };
  const made = { ...item, images: { left: load('left'), right: load('right') }, decoded: false };
  made.ready = Promise.all([made.images.left.decode(), made.images.right.decode()])
    .then(() => { made.decoded = true; })
    .catch(() => fail(made));
  return made;
}

// A picture that does not load: not a reason to stop. It is asked for once more, then left out until a reload.
function fail(item) {
  broken.set(item.pair, (broken.get(item.pair) || 0) + 1);
  queue = queue.filter((each) => each !== item);
  said = 'a pair whose pictures do not load was left out';
  showSaved();
  if (current === item) { current = null; advance(); }
  poll(retryDelay());
}

function advance() {
  const next = queue.shift();
  if (next) show(next);
  else { current = null; disarm(); }
}

function show(item) {
  current = item;
  disarm();
  setState('pair', '', '');
  $('.pp-prompt').textContent = item.prompt;
  for (const side of ['left', 'right']) {
    const old = slots[side].querySelector('img');
    if (old) old.replaceWith(item.images[side]);
    else slots[side].prepend(item.images[side]);
  }
  fit();
  const arm = () => {
    if (current !== item || armed) return;
    armed = true;
    shownAt = performance.now();
    root.dataset.armed = 'yes';
    for (const button of buttons) button.setAttribute('aria-disabled', 'false');
  };
  if (item.decoded) requestAnimationFrame(arm);
  else item.ready.then(() => { if (item.decoded) requestAnimationFrame(arm); });
}

function disarm() {
  armed = false;
  root.dataset.armed = 'no';
  stopFlicker();
  // not `disabled`: a button that was reached with Tab would lose the focus at every vote
  for (const button of buttons) button.setAttribute('aria-disabled', String(button.dataset.act !== 'undo'));
}

function restart() {
  round += 1;
  clearTimeout(pollTimer);
  queue = [];
  past = [];
  current = null;
  stats = null;
  finished = false;
  disarm();
  $('.pp-stats').textContent = '';
  if (!target) { setState('rest', '', ''); return; }
  if (name) { setState('loading', 'One moment', ''); refill(); } else meet();
}

// ---- answers -----------------------------------------------------------------------------------------------------
const WORDS = { left: 'left chosen', right: 'right chosen', tie: 'tie', both_bad: 'both bad', skip: 'skipped' };

function vote(choice, source) {
  const took = performance.now() - shownAt;
  if (!armed || !current || !name || took < SETTLE_MS[source]) return;
  const item = current;
  const body = {
    study: target.study, study_key: studyKey, annotator: name, comparison: target.comparison, client_key: uniqueKey(),
    pair: item.pair, choice, left: item.left, milliseconds: Math.round(took),
  };
  past.push(item);
  if (past.length > PAST) past.shift();
  outbox.add('vote', body, WORDS[choice]);
  others.postMessage({ what: 'vote', study: target.study, pair: item.pair, annotator: name });
  advance();
  if (!current) setState('loading', 'One moment', '');
  refill();
}

function undo() {
  if (!target || !name || !studyKey) return;
  const item = past.pop();
  const body = { study: target.study, study_key: studyKey, annotator: name, comparison: target.comparison, client_key: uniqueKey() };
  outbox.add('undo', body, 'taken back');
  if (item) bringBack(item);
}

function bringBack(item) {
  if (current && current.pair === item.pair) return;
  finished = false;
  queue = queue.filter((each) => each.pair !== item.pair);
  if (current) queue.unshift(current);
  show(item);
}

// The server's word: which answer was the last one. Another window or an earlier visit may have given it.
function undone(entry, pair) {
  if (!pair) { said = 'nothing to take back'; return; }
  const voted = outbox.entries().some((each) => each.route === 'vote' && each.at > entry.at && each.body.pair === pair.pair);
  if (!voted && !(current && current.pair === pair.pair) && !past.some((item) => item.pair === pair.pair)) bringBack(prepare(pair));
}

function finish() {
  if (finished) return;
  finished = true;
  queue = [];
  current = null;
  disarm();
  setState('done', 'All planned votes are in', 'The verdict can be read now.');
  trigger('submit', { votes: stats.votes });
}

// ---- flicker -----------------------------------------------------------------------------------------------------
function startFlicker() {
  if (flickerTimer || !armed) return;
  const face = (side) => { root.dataset.face = side; };
  face(root.dataset.face === 'left' ? 'right' : 'left');
  root.classList.add('pp-flicker');
  $('[data-act=flicker]').setAttribute('aria-pressed', 'true');
  flickerTimer = setInterval(() => face(root.dataset.face === 'left' ? 'right' : 'left'), FLICKER_MS);
}

function stopFlicker() {
  clearInterval(flickerTimer);
  flickerTimer = 0;
  root.classList.remove('pp-flicker');
  delete root.dataset.face;
  $('[data-act=flicker]').setAttribute('aria-pressed', 'false');
}

// ---- keys and pointers -------------------------------------------------------------------------------------------
const visible = () => root.offsetParent !== null;

function onKey(event) {
  if (!element.isConnected) { close(); return; }
  if (!visible() || !target || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const at = event.composedPath()[0];
  if (at instanceof Element && at.closest('input, textarea, select, [contenteditable=""], [contenteditable=true], [role=listbox], [role=slider], dialog')) return;
  if (event.repeat && event.key === 'Enter' && root.contains(at)) { event.preventDefault(); return; }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === ' ') {
    // Space on a button that was reached with Tab presses that button.
    if (at instanceof Element && at.closest('button:not([role=tab]), a, summary')) return;
    event.preventDefault();
    if (!event.repeat) startFlicker();
    return;
  }
  const choice = KEYS[key];
  if (!choice && key !== 'u') return;
  event.preventDefault();
  if (event.repeat) return;
  if (choice) vote(choice, 'key'); else undo();
}

function onKeyUp(event) {
  if (event.key !== ' ' || !flickerTimer) return;
  event.preventDefault();
  stopFlicker();
}

for (const button of buttons) {
  // No focus by mouse or touch: else the next Space would press the button again.
  button.addEventListener('pointerdown', (event) => event.preventDefault());
  if (button.dataset.act === 'flicker') continue;
  button.addEventListener('click', (event) => {
    const source = event.detail === 0 ? 'key' : 'pointer';
    if (button.dataset.choice) vote(button.dataset.choice, source);
    else if (source === 'key' || event.detail === 1) undo();
  });
}
const flickerButton = $('[data-act=flicker]');
flickerButton.addEventListener('pointerdown', (event) => { flickerButton.setPointerCapture(event.pointerId); startFlicker(); });
for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) flickerButton.addEventListener(end, stopFlicker);
flickerButton.addEventListener('click', (event) => { if (event.detail === 0) (flickerTimer ? stopFlicker : startFlicker)(); });
flickerButton.addEventListener('contextmenu', (event) => event.preventDefault());
for (const side of ['left', 'right']) slots[side].addEventListener('click', () => vote(side, 'pointer'));

$('.pp-retry').addEventListener('click', () => outbox.release(name));
$('.pp-rename').addEventListener('click', async () => {
  if (!$('.pp-name').hidden) { $('.pp-name').hidden = true; fit(); return; }
  const answer = await ask('api/annotator');
  const known = answer && answer.known ? answer.known.filter((each) => each !== name) : [];
  openName(`Labels given so far stay with “${name}”.`, known, name);
});
$('.pp-name').addEventListener('submit', (event) => { event.preventDefault(); choose($('.pp-name-input').value); });
$('.pp-name').addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && name) { $('.pp-name').hidden = true; fit(); }
});

// ---- what is said ------------------------------------------------------------------------------------------------
function setState(state, title, text) {
  root.dataset.state = state;
  $('.pp-empty-title').textContent = title;
  $('.pp-empty-text').textContent = text;
  if (state !== 'pair') $('.pp-prompt').textContent = '';
  if (state !== 'filling') $('.pp-bar').hidden = true;
}

function empty(answer) {
  const comparison = target.comparison;
  if (answer.state === 'ready' && unsent().size) { setState('loading', 'One moment', 'Your answers are being saved.'); return; }
  if (answer.state === 'filling' || answer.state === 'ready') {
    setState('filling', comparison ? 'The pictures of this comparison are being drawn' : 'The first pairs are on their way',
      [answer.message, 'They appear here by themselves.'].filter(Boolean).join(answer.message.endsWith('.') ? ' ' : '. '));
    if (stats.labels) $('.pp-empty-title').textContent = 'You are faster than the model: new pairs are being drawn';
    $('.pp-bar').hidden = answer.progress === null;
    $('.pp-bar i').style.width = `${Math.round(100 * (answer.progress || 0))}%`;
  } else if (comparison) {
    if (stats.votes >= stats.planned) finish();
    else setState('done', 'You have answered every pair of this comparison', `${stats.votes} of ${stats.planned} planned votes are in.`);
  } else if (answer.state === 'done') {
    setState('done', 'All done: you have answered every pair', 'More can be made below, under “Pairs for your own prompts”.');
  } else {
    setState('stuck', 'No pairs yet', `${answer.message || 'Nothing makes pairs for this study.'} Make some below, under “Pairs for your own prompts”.`);
  }
}

function showSaved() {
  const waiting = outbox.waiting();
  const theirs = waiting.filter((entry) => entry.body.annotator !== name);
  const seconds = Math.max(0, Math.ceil((outbox.retryAt - Date.now()) / 1000));
  const votes = `${waiting.length} ${waiting.length === 1 ? 'vote' : 'votes'} waiting`;
  let line = said ? `saved · ${said}` : '';
  if (said.startsWith('not') || said.startsWith('a pair') || said.startsWith('nothing')) line = said;
  let state = 'saved';
  if (waiting.length) {
    state = outbox.retryAt || theirs.length || !name ? 'waiting' : 'saving';
    line = state === 'saving' ? 'saving…' : votes;
    if (outbox.retryAt) line += `, sent again in ${seconds} s`;
    else if (theirs.length && name) line += ` for ${theirs[0].body.annotator}`;
    if (outbox.volatile) line += ' (this browser cannot keep them over a reload)';
  }
  $('.pp-saved').dataset.state = line ? state : 'none';
  $('.pp-saved-text').textContent = line;
  $('.pp-retry').hidden = !outbox.retryAt;
}
const ticker = setInterval(() => { if (!element.isConnected) close(); else if (outbox.retryAt) showSaved(); }, 1000);

function showStats() {
  if (!stats) return;
  if (target.comparison) { $('.pp-stats').textContent = `${stats.votes} of ${stats.planned} votes`; return; }
  const parts = [`${stats.today} today`, `${stats.labels} in this study`];
  if (stats.total > stats.labels) parts[1] += ` (${stats.total} by everybody)`;
  if (stats.pace) parts.push(`${Math.round(stats.pace)} a minute, ${(60 / stats.pace).toFixed(1)} s each`);
  parts.push(`${stats.left} ${stats.left === 1 ? 'pair' : 'pairs'} left`);
  $('.pp-stats').textContent = parts.join(' · ');
}

// ---- room --------------------------------------------------------------------------------------------------------
// The largest two boxes of the pictures' shape that fit the window, beside or above each other.
function fit() {
  if (!visible()) return;
  const stage = $('.pp-stage');
  const width = root.clientWidth;
  const gap = 12;
  const below = $('.pp-actions').offsetHeight + $('.pp-foot').offsetHeight + 26;
  const top = stage.getBoundingClientRect().top + window.scrollY;
  const height = Math.max(150, window.innerHeight - top - below);
  const picture = current ? current.left_picture : { width: 1, height: 1 };
  const ratio = Math.min(2, Math.max(0.5, picture.width / picture.height));
  const beside = Math.min((width - gap) / 2, height * ratio);
  const above = Math.min(width, ((height - gap) / 2) * ratio);
  const stacked = above > beside * 1.15;
  const side = Math.floor(Math.max(96, stacked ? above : beside));
  root.classList.toggle('pp-stacked', stacked);
  root.style.setProperty('--side', `${side}px`);
  root.style.setProperty('--tall', `${Math.floor(side / ratio)}px`);
  $('.pp-word-left').textContent = stacked ? 'Top' : 'Left';
  $('.pp-word-right').textContent = stacked ? 'Bottom' : 'Right';
  root.querySelector('.pp-left .pp-tag').textContent = stacked ? 'top' : 'left';
  root.querySelector('.pp-right .pp-tag').textContent = stacked ? 'bottom' : 'right';
}
const resized = new ResizeObserver(fit);
resized.observe(root);

// ---- beginning and end -------------------------------------------------------------------------------------------
function onWake() {
  stopFlicker();
  if (document.hidden) return;
  fit();
  outbox.flush();
  refill();
}

others.onmessage = ({ data }) => {
  if (data.what === 'name') {
    if (target) meet(); else name = null;
    return;
  }
  if (!target || data.study !== target.study || data.annotator !== name) return;
  queue = queue.filter((item) => item.pair !== data.pair);
  if (current && current.pair === data.pair) advance();
  refill();
};

function close() {
  outbox.close();
  others.close();
  resized.disconnect();
  clearInterval(ticker);
  clearTimeout(pollTimer);
  document.removeEventListener('keydown', onKey);
  document.removeEventListener('keyup', onKeyUp);
  document.removeEventListener('visibilitychange', onWake);
  window.removeEventListener('blur', stopFlicker);
  window.removeEventListener('online', onWake);
  window.removeEventListener('resize', fit);
}

function aim() {
  const value = props.value;
  const wanted = value && value.study ? { study: value.study, comparison: value.comparison || null } : null;
  if (JSON.stringify(wanted) === JSON.stringify(target)) { refill(); return; }
  target = wanted;
  studyKey = '';
  broken = new Map();
  restart();
}

document.addEventListener('keydown', onKey);
document.addEventListener('keyup', onKeyUp);
document.addEventListener('visibilitychange', onWake);
window.addEventListener('blur', stopFlicker);
window.addEventListener('online', onWake);
window.addEventListener('resize', fit);
watch('value', aim);
setState('loading', 'One moment', '');
disarm();
aim();
outbox.flush();
