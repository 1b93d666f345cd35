// Shows the two pictures in one place by turns, for as long as the button is held: small differences jump to the eye.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses it.

class Flicker {
  static FACE_MS = 400;          // slow enough never to flash more than three times a second

  // may(): whether there is a pair to look at
  constructor(root, button, may) {
    this.root = root;
    this.button = button;
    this.may = may;
    this.timer = 0;
    button.addEventListener('pointerdown', (event) => { button.setPointerCapture(event.pointerId); this.start(); });
    for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) button.addEventListener(end, () => this.stop());
    button.addEventListener('click', (event) => { if (event.detail === 0) this.on ? this.stop() : this.start(); });
    button.addEventListener('contextmenu', (event) => event.preventDefault());
  }

  get on() { return this.timer !== 0; }

  turn() { this.root.dataset.face = this.root.dataset.face === 'left' ? 'right' : 'left'; }

  start() {
    if (this.on || !this.may()) return;
    this.turn();
    this.root.classList.add('pp-flicker');
    this.button.setAttribute('aria-pressed', 'true');
    this.timer = setInterval(() => this.turn(), Flicker.FACE_MS);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.root.classList.remove('pp-flicker');
    delete this.root.dataset.face;
    this.button.setAttribute('aria-pressed', 'false');
  }
}
