"""The pair picker: two pictures, one key. Used by the Label tab, and blind by the Compare tab.

A `gr.HTML` component that talks to the routes of app/label_routes.py by itself, so that no vote waits in a Gradio
queue. It keeps decoded pairs ahead, shows the next one in the frame after the key, and lets votes that the server
has not acknowledged wait in the browser (pair_outbox.js).

The value is {"study": id} for the label queue, {"study": id, "comparison": id} for a blind comparison, None to rest.
In a comparison it triggers `submit` once the planned votes are in: `picker.submit(f, ...)`.
"""

import gradio as gr

from app.components.pair_files import FOLDER, script


def pair_picker(value: dict | None, elem_id: str, visible: bool = True) -> gr.HTML:
    """The component. Set its value to move it to another study or comparison."""
    return gr.HTML(
        value=value,
        html_template=(FOLDER / "pair_picker.html").read_text(),
        css_template=(FOLDER / "pair_picker.css").read_text(),
        js_on_load=script(),
        apply_default_css=False,
        elem_id=elem_id,
        visible=visible,
    )
