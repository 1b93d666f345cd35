// The form in which a person says who is voting. The first visitor of an empty lab never sees it.
// Runs in the same function as the other pair_*.js files; pair_picker.js uses it.

class NameForm {
  static MOST_KNOWN = 12;

  // chosen(name): somebody is known to the server now; moved(): the form was opened or closed
  constructor(form, chosen, moved) {
    this.form = form;
    this.chosen = chosen;
    this.moved = moved;
    this.input = form.querySelector('.pp-name-input');
    form.addEventListener('submit', (event) => { event.preventDefault(); this.choose(this.input.value); });
  }

  get open() { return !this.form.hidden; }

  show(why, known, value) {
    this.form.hidden = false;
    this.form.querySelector('.pp-name-why').textContent = why;
    this.tell('');
    this.input.value = value;
    const buttons = known.slice(0, NameForm.MOST_KNOWN).map((name) => this.button(name));
    this.form.querySelector('.pp-name-known').replaceChildren(...(known.length ? ['Already here: '] : []), ...buttons);
    this.moved();
    this.input.focus({ preventScroll: true });
    this.input.select();
  }

  button(name) {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'pp-link';
    button.textContent = name;
    button.onclick = () => this.choose(name);
    return button;
  }

  close() {
    this.form.hidden = true;
    this.moved();
  }

  tell(sentence) { this.form.querySelector('.pp-name-error').textContent = sentence; }

  // Whether the server knows the name now.
  async choose(name) {
    const answer = await ask('api/annotator', { name });
    if (!answer || answer.error) {
      this.tell(answer ? answer.error : 'The server does not answer; try again in a moment.');
      return false;
    }
    this.chosen(answer.name);
    return true;
  }
}
