"""The pair picker: two pictures, one key. Used by the Label tab, and blind by the Compare tab.

A `gr.HTML` component that talks to the routes of app/label_routes.py by itself, so that no vote waits in a Gradio
queue. It keeps decoded pairs ahead, shows the next one in the frame after the key, and lets votes that the server
has not acknowledged wait in the browser (pair_outbox.js).

The value is {"study": id} for the label queue, {"study": id, "comparison": id} for a blind comparison, None to rest.
In a comparison it triggers `submit` once the planned votes are in: `picker.submit(f, ...)`.
"""

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent

TEMPLATE = """
<section class="pp" data-state="loading" data-armed="no" aria-label="Which picture is better?">
  <div class="pp-head">
    <p class="pp-question"></p>
    <p class="pp-prompt" aria-live="polite"></p>
  </div>
  <div class="pp-stage">
    <figure class="pp-slot pp-left"><span class="pp-tag" aria-hidden="true">left</span></figure>
    <figure class="pp-slot pp-right"><span class="pp-tag" aria-hidden="true">right</span></figure>
    <div class="pp-empty" role="status"><p class="pp-empty-title"></p><p class="pp-empty-text"></p>
      <div class="pp-bar" role="progressbar" aria-label="Pairs being made" hidden><i></i></div></div>
  </div>
  <div class="pp-actions">
    <button type="button" class="pp-main" data-choice="left" aria-label="The left picture is better">
      <kbd>←</kbd><span class="pp-word-left">Left</span></button>
    <div class="pp-minor">
      <button type="button" data-choice="tie" aria-label="Both are equally good"><kbd>↓</kbd><span>Tie</span></button>
      <button type="button" data-choice="both_bad" aria-label="Both are bad"><kbd>X</kbd><span>Both bad</span></button>
      <button type="button" data-choice="skip" aria-label="Skip this pair"><kbd>S</kbd><span>Skip</span></button>
      <button type="button" data-act="undo" aria-label="Undo the last answer"><kbd>U</kbd><span>Undo</span></button>
      <button type="button" data-act="flicker"
        aria-label="Hold to flicker between the two pictures" aria-pressed="false">
        <kbd>Space</kbd><span>Flicker</span></button>
    </div>
    <button type="button" class="pp-main" data-choice="right" aria-label="The right picture is better">
      <span class="pp-word-right">Right</span><kbd>→</kbd></button>
  </div>
  <div class="pp-foot">
    <span class="pp-saved" role="status"><i class="pp-dot"></i><span class="pp-saved-text"></span>
      <button type="button" class="pp-retry pp-link" hidden>try now</button></span>
    <span class="pp-stats"></span>
    <span class="pp-who"><span class="pp-who-text"></span>
      <button type="button" class="pp-rename pp-link" hidden>change</button></span>
  </div>
  <form class="pp-name" hidden autocomplete="off">
    <p class="pp-name-why"></p>
    <div class="pp-name-row"><input class="pp-name-input" type="text" maxlength="80" required aria-label="Your name">
      <button type="submit">Label under this name</button></div>
    <p class="pp-name-known"></p>
    <p class="pp-name-error" role="alert"></p>
  </form>
</section>
"""


def pair_picker(value: dict | None, elem_id: str, visible: bool = True) -> gr.HTML:
    """The component. Set its value to move it to another study or comparison."""
    return gr.HTML(
        value=value,
        html_template=TEMPLATE,
        css_template=(FOLDER / "pair_picker.css").read_text(),
        js_on_load=(FOLDER / "pair_outbox.js").read_text() + (FOLDER / "pair_picker.js").read_text(),
        apply_default_css=False,
        elem_id=elem_id,
        visible=visible,
    )
