// What the picker says while it has no pair, beside the dot, and of the labels so far. Numbers in, plain words out.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses them.

const WORDS = { tie: 'tie', both_bad: 'both bad', skip: 'skipped' };
const BELOW = 'under “Pairs for your own prompts”.';

// [state, title, text] from the server's answer without pairs (app/label_routes.py: state).
function emptyWords({ state, message, stats }, comparison, saving) {
  if (state === 'ready' && saving) return ['loading', 'One moment', 'Your answers are being saved.'];
  if (state === 'filling' || state === 'ready') {
    let title = comparison ? 'The pictures of this comparison are being drawn' : 'The first pairs are on their way';
    if (stats.labels) title = 'You are faster than the model: new pairs are being drawn';
    const text = [message, 'They appear here by themselves.'].filter(Boolean).join(message.endsWith('.') ? ' ' : '. ');
    return ['filling', title, text];
  }
  if (comparison) {
    return ['done', 'You have answered every pair of this comparison', `${stats.votes} of ${stats.planned} planned votes are in.`];
  }
  if (state === 'done') return ['done', 'All done: you have answered every pair', `More can be made below, ${BELOW}`];
  return ['stuck', 'No pairs yet', message];
}

// What was answered; where the pictures are above each other the sides are called so, as on the buttons.
function choiceWords(root, choice) {
  return WORDS[choice] ?? `${root.querySelector(`.pp-word-${choice}`).textContent.toLowerCase()} chosen`;
}

// [state of the dot, line]; `said` is the last word, such as "left chosen".
function savedWords(outbox, name, said) {
  const waiting = outbox.waiting();
  if (!waiting.length) {
    const plain = /^(not|a pair|nothing)/.test(said);
    return [said ? 'saved' : 'none', plain || !said ? said : `saved · ${said}`];
  }
  const theirs = waiting.filter((entry) => entry.body.annotator !== name);
  if (!outbox.retryAt && !theirs.length && name) return ['saving', `saving…${keeping(outbox)}`];
  let line = `${waiting.length} ${waiting.length === 1 ? 'vote' : 'votes'} waiting`;
  if (outbox.retryAt) line += `, sent again in ${Math.max(0, Math.ceil((outbox.retryAt - Date.now()) / 1000))} s`;
  else if (theirs.length && name) line += ` for ${theirs[0].body.annotator}`;
  return ['waiting', line + keeping(outbox)];
}

const keeping = (outbox) => (outbox.volatile ? ' (this browser cannot keep them over a reload)' : '');

function statsWords(stats, comparison) {
  if (comparison) return `${stats.votes} of ${stats.planned} votes`;
  const parts = [`${stats.today} today`, `${stats.labels} in this study`];
  if (stats.total > stats.labels) parts[1] += ` (${stats.total} by everybody)`;
  if (stats.pace) parts.push(`${Math.round(stats.pace)} a minute, ${(60 / stats.pace).toFixed(1)} s each`);
  parts.push(`${stats.left} ${stats.left === 1 ? 'pair' : 'pairs'} left`);
  return parts.join(' · ');
}
