// Shows pairs, takes answers, keeps decoded pairs ahead. Runs inside gr.HTML after the other pair_*.js files, in one
// function with them (pair_files.py): `element`, `props`, `trigger` and `watch` come from Gradio. Every text goes into
// the page as text, never as HTML.
const AHEAD = 10;              // decoded pairs kept ready
const REFILL_BELOW = 8;
const POLL_MS = 1000;          // while there is nothing to show
const SETTLE_MS = { key: 80, pointer: 350 };   // a second click of a double click must not answer the next pair
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
let finished = false;
let said = '';                 // the last word beside the dot

const over = new AbortController();   // ends every listener outside of the element
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
const flicker = new Flicker(root, $('[data-act=flicker]'), () => armed);
const names = new NameForm($('.pp-name'), (who) => { others.postMessage({ what: 'name' }); welcome(who); }, fit);

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
    if (!(await names.choose(answer.suggested))) pollTimer = setTimeout(meet, retryDelay());
    return;
  }
  name = null;
  setState('name', '', '');
  showSaved();
  names.show('Whose labels are these? They are kept apart by name.', answer.known, answer.suggested);
}

function welcome(who) {
  const same = who === name;
  name = who;
  names.close();
  $('.pp-who-text').textContent = `labelling as ${name}`;
  $('.pp-rename').hidden = false;
  outbox.release(name);
  showSaved();
  if (same) refill(); else restart();
}

async function rename() {
  if (names.open) { names.close(); return; }
  const answer = await ask('api/annotator');
  const known = answer && answer.known ? answer.known.filter((each) => each !== name) : [];
  names.show(`Labels given so far stay with “${name}”.`, known, name);
}

// ---- pairs -------------------------------------------------------------------------------------------------------
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
  if (finished) return;          // the last vote overtook this answer, which is older
  if (!answer) { wait('The server does not answer. Trying again…', 'loading'); return; }
  if (answer.status === 401) { meet(); return; }
  if (answer.error) { wait(answer.error, 'stuck'); return; }
  studyKey = answer.study_key;
  $('.pp-question').textContent = answer.question;
  stats = answer.stats;
  showStats();
  const have = new Set([...queue.map((item) => item.pair), ...unsent(), current && current.pair]);
  for (const item of answer.pairs) if (!have.has(item.pair)) queue.push(prepare(item, fail));
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
  flicker.stop();
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
const whose = () => ({ study: target.study, study_key: studyKey, annotator: name, comparison: target.comparison, client_key: uniqueKey() });

function vote(choice, source) {
  const took = performance.now() - shownAt;
  if (!armed || !current || !name || took < SETTLE_MS[source]) return;
  const item = current;
  past.push(item);
  if (past.length > PAST) past.shift();
  outbox.add('vote', { ...whose(), pair: item.pair, choice, left: item.left, milliseconds: Math.round(took) }, choiceWords(root, choice));
  others.postMessage({ what: 'vote', study: target.study, pair: item.pair, annotator: name });
  advance();
  if (!current) setState('loading', 'One moment', '');
  refill();
}

function undo() {
  if (!target || !name || !studyKey) return;
  const item = past.pop();
  outbox.add('undo', whose(), 'taken back');
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
  const here = (current && current.pair === pair.pair) || past.some((item) => item.pair === pair.pair);
  if (!voted && !here) bringBack(prepare(pair, fail));
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

// ---- what is shown -----------------------------------------------------------------------------------------------
const visible = () => root.offsetParent !== null;

function fit() {
  if (visible()) fitPictures(root, current ? current.left_picture : { width: 1, height: 1 });
}

function setState(state, title, text) {
  root.dataset.state = state;
  $('.pp-empty-title').textContent = title;
  $('.pp-empty-text').textContent = text;
  if (state !== 'pair') $('.pp-prompt').textContent = '';
  if (state !== 'filling') $('.pp-bar').hidden = true;
}

function empty(answer) {
  if (target.comparison && answer.state === 'done' && stats.votes >= stats.planned) { finish(); return; }
  const [state, title, text] = emptyWords(answer, target.comparison, unsent().size > 0);
  setState(state, title, text);
  if (state !== 'filling') return;
  $('.pp-bar').hidden = answer.progress === null;
  $('.pp-bar i').style.width = `${Math.round(100 * (answer.progress || 0))}%`;
}

function showSaved() {
  const [state, line] = savedWords(outbox, name, said);
  $('.pp-saved').dataset.state = state;
  $('.pp-saved-text').textContent = line;
  $('.pp-retry').hidden = !outbox.retryAt;
}

function showStats() {
  if (stats) $('.pp-stats').textContent = statsWords(stats, target.comparison);
}

// ---- beginning and end -------------------------------------------------------------------------------------------
function onWake() {
  flicker.stop();
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

function aim() {
  const value = props.value;
  const wanted = value && value.study ? { study: value.study, comparison: value.comparison || null } : null;
  if (JSON.stringify(wanted) === JSON.stringify(target)) { refill(); return; }
  target = wanted;
  studyKey = '';
  broken = new Map();
  restart();
}

// Gradio may throw the element away and make a new one; this one must then be silent.
function gone() {
  if (element.isConnected) return false;
  over.abort();
  outbox.close();
  others.close();
  resized.disconnect();
  clearInterval(ticker);
  clearTimeout(pollTimer);
  return true;
}

const ticker = setInterval(() => { if (!gone() && outbox.retryAt) showSaved(); }, 1000);
const resized = new ResizeObserver(fit);
const act = { listening: () => !gone() && visible() && target !== null, vote, undo, flicker };
resized.observe(root);
listenToKeys(root, act, over.signal);
listenToPointer(root, act);
$('.pp-retry').addEventListener('click', () => outbox.release(name));
$('.pp-rename').addEventListener('click', rename);
$('.pp-name').addEventListener('keydown', (event) => { if (event.key === 'Escape' && name) names.close(); });
document.addEventListener('visibilitychange', onWake, { signal: over.signal });
window.addEventListener('online', onWake, { signal: over.signal });
window.addEventListener('resize', fit, { signal: over.signal });
watch('value', aim);
setState('loading', 'One moment', '');
disarm();
aim();
outbox.flush();
