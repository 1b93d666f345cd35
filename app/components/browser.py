"""Thumbnails of pictures, cards of pairs, or rows of labels; a click (or Enter) asks Python for the story behind one.

The value is {"kind": "pictures" | "pairs" | "labels", "items": [...] as `storage/browse.py` makes them, "empty": what
is said if there are none}; a click triggers `select` with {"kind": "picture" | "pair", "item": id}. Texts go into the
page as text, never as HTML.
"""

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent


def browser(elem_id: str = "browser") -> gr.HTML:
    """The component; listen with `.select(f)` where `f(event: gr.EventData)` reads `event.kind` and `event.item`."""
    return gr.HTML(
        value=None,
        html_template='<div class="br"></div>',
        css_template=(FOLDER / "browser.css").read_text(),
        js_on_load=(FOLDER / "browser.js").read_text(),
        apply_default_css=False,
        elem_id=elem_id,
    )
