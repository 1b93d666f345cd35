// Gives the pictures the room that the window has: the largest two boxes of their shape, beside or above each other.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses it.

const GAP = 12;

// `picture` has the width and height of what is shown. Everything above and below the stage stays in sight.
function fitPictures(root, picture) {
  const $ = (selector) => root.querySelector(selector);
  const below = $('.pp-actions').offsetHeight + $('.pp-foot').offsetHeight + 26;
  const top = $('.pp-stage').getBoundingClientRect().top + window.scrollY;
  const height = Math.max(150, window.innerHeight - top - below);
  const ratio = Math.min(2, Math.max(0.5, picture.width / picture.height));
  const beside = Math.min((root.clientWidth - GAP) / 2, height * ratio);
  const above = Math.min(root.clientWidth, ((height - GAP) / 2) * ratio);
  const stacked = above > beside * 1.15;
  const side = Math.floor(Math.max(96, stacked ? above : beside));
  root.classList.toggle('pp-stacked', stacked);
  root.style.setProperty('--side', `${side}px`);
  root.style.setProperty('--tall', `${Math.floor(side / ratio)}px`);
  const words = stacked ? { left: 'Top', right: 'Bottom' } : { left: 'Left', right: 'Right' };
  for (const [name, word] of Object.entries(words)) {
    $(`.pp-word-${name}`).textContent = word;
    $(`.pp-${name} .pp-tag`).textContent = word.toLowerCase();
  }
}
