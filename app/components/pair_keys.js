// Keys, buttons and taps become answers. Keys count only while the picker is looked at and nobody types.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses it.

const KEYS = { ArrowLeft: 'left', ArrowRight: 'right', ArrowDown: 'tie', x: 'both_bad', s: 'skip' };
const TYPING = 'input, textarea, select, [contenteditable=""], [contenteditable=true], [role=listbox], [role=slider], dialog';

// act: {listening(), vote(choice, 'key' | 'pointer'), undo(), flicker}; `signal` ends it.
function listenToKeys(root, act, signal) {
  function onKey(event) {
    if (!act.listening() || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const at = event.composedPath()[0];
    if (at instanceof Element && at.closest(TYPING)) return;
    if (event.repeat && event.key === 'Enter' && root.contains(at)) { event.preventDefault(); return; }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === ' ') {
      // Space on a button that was reached with Tab presses that button.
      if (at instanceof Element && at.closest('button:not([role=tab]), a, summary')) return;
      event.preventDefault();
      if (!event.repeat) act.flicker.start();
      return;
    }
    const choice = KEYS[key];
    if (!choice && key !== 'u') return;
    event.preventDefault();
    if (event.repeat) return;
    if (choice) act.vote(choice, 'key'); else act.undo();
  }

  function onKeyUp(event) {
    if (event.key !== ' ' || !act.flicker.on) return;
    event.preventDefault();
    act.flicker.stop();
  }

  document.addEventListener('keydown', onKey, { signal });
  document.addEventListener('keyup', onKeyUp, { signal });
  window.addEventListener('blur', () => act.flicker.stop(), { signal });
}

function listenToPointer(root, act) {
  for (const button of root.querySelectorAll('.pp-actions button')) {
    // No focus by mouse or touch: else the next Space would press the button again.
    button.addEventListener('pointerdown', (event) => event.preventDefault());
    if (button.dataset.act === 'flicker') continue;
    button.addEventListener('click', (event) => {
      const source = event.detail === 0 ? 'key' : 'pointer';
      if (button.dataset.choice) act.vote(button.dataset.choice, source);
      else if (source === 'key' || event.detail === 1) act.undo();
    });
  }
  for (const side of ['left', 'right']) {
    root.querySelector(`.pp-${side}`).addEventListener('click', () => act.vote(side, 'pointer'));
  }
}
