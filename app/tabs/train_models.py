"""Two small forms of the Train tab: the exports of one training, and models from elsewhere."""

from collections.abc import Callable

import gradio as gr

from app import models
from app.components.choice import Choice
from app.lab import Lab
from app.tabs.events import EVERY, LAST, ONCE, QUIET, in_turn, kept
from app.words import warning

STYLE = """
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { padding: 6px 10px 6px 0; border-top: 1px solid var(--border-color-primary); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { width: 30%; }
small { color: var(--body-text-color-subdued); }
"""
HELLO = (
    "A LoRA of another tool (kohya or diffusers layout), an LRM of the official code, or a merged UNet such as the "
    "published LPO models: name where it lies on the machine that the lab runs on. It is checked against the study's "
    "base and can then be chosen in Train, Curves and Compare. The file stays where it is."
)


def export_tab(lab: Lab, chosen: gr.State, tab: gr.Tab, saved: gr.State) -> None:
    """Inside the details of a training: its checkpoints for other tools, as download links. `saved` changes with the
    training that is looked at and with its checkpoints."""
    with gr.Row(equal_height=True):
        which = Choice([], label="checkpoint", scale=3, min_width=160, elem_id="export-which")
        layout = Choice([], label="format", scale=3, min_width=170, elem_id="export-format")
        dtype = gr.Dropdown(models.DTYPES, value="float16", label="precision", scale=2, min_width=110)
    with gr.Row(equal_height=True):
        go = gr.Button(
            "Export", variant="primary", size="sm", scale=0, min_width=160, elem_id="export-go", elem_classes=ONCE
        )
        alone = gr.Checkbox(False, label="without the adapters that it was trained on top of", container=False)
    note = gr.Markdown(elem_id="export-note")
    listing = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="export-list")
    timer = gr.Timer(1.0, active=False)

    def fill(job_id, value, format_):
        rows = models.of_run(lab, job_id)
        kind = rows[0].kind if rows else "adapter"
        below = any(row.meta.get("policy", {}).get("adapters") for row in rows)
        return (
            kept([(row.name, row.id) for row in rows], value),
            kept(models.FORMATS[kind], format_),
            gr.Dropdown(visible=kind == "adapter"),
            gr.Checkbox(visible=True) if below else gr.Checkbox(visible=False, value=False),
            "" if rows else "Nothing was saved yet; checkpoints can be exported from their first one on.",
            *state(job_id),
        )

    def state(job_id):
        html, moving = models.listing(lab, models.EXPORT, [row.id for row in models.of_run(lab, job_id)])
        return html, gr.Timer(active=moving)

    def begin(job_id, which, layout, dtype, alone):
        try:
            models.export(lab, which, layout, dtype, alone)
        except ValueError as error:
            return warning(error), gr.skip(), gr.skip()
        return "", *state(job_id)

    filled = [which, layout, dtype, alone, note, listing, timer]
    turns = in_turn("train-export")
    gr.on([tab.select, saved.change], fill, [chosen, which, layout], filled, **turns, **EVERY)
    go.click(begin, [chosen, which, layout, dtype, alone], [note, listing, timer], **turns)
    timer.tick(state, chosen, [listing, timer], **turns)


def import_form(lab: Lab) -> Callable:
    """At the foot of the left half. Returns `refresh(event)`, which redraws its list after an event."""
    with gr.Accordion("Models from elsewhere", open=False, elem_id="import-model"):
        gr.Markdown(HELLO)
        with gr.Row(equal_height=True):
            kind = gr.Radio(
                models.KINDS, value="adapter", label="what it is", scale=3, min_width=330, elem_id="import-kind"
            )
            name = gr.Textbox(label="its name here", placeholder="as the file", max_lines=1, min_width=110)
        path = gr.Textbox(label="file or folder", placeholder="/models/lora.safetensors", max_lines=1,
                          elem_id="import-path")  # fmt: skip
        base = gr.Textbox(label="its base model, if not the study's", placeholder="as the study", visible=False,
                          info="an official LRM brings no tokenizer: it takes its base's", max_lines=1)  # fmt: skip
        with gr.Row():
            go = gr.Button("Check and add", size="sm", scale=0, min_width=160, elem_id="import-go", elem_classes=ONCE)
        note = gr.Markdown(elem_id="import-note")
        listing = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="import-list")
    timer = gr.Timer(1.0, active=False)

    def state():
        html, moving = models.listing(lab, models.IMPORT)
        return html, gr.Timer(active=moving)

    def begin(kind, path, name, base):
        try:
            models.take_in(lab, kind, path, name, base if kind == "lrm" else "")
        except ValueError as error:
            return warning(error), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return "", "", "", *state()

    kind.change(lambda value: gr.Textbox(visible=value == "lrm"), kind, base, **QUIET)
    turns = in_turn("train-import")
    gr.on([go.click, path.submit], begin, [kind, path, name, base], [note, path, name, listing, timer], **turns)
    timer.tick(state, None, [listing, timer], **turns)
    return lambda event: event.then(state, None, [listing, timer], **turns, **LAST)
