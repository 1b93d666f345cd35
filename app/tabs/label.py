"""Label: two pictures, one key. The picker does all of the work; below it, folded, pairs and studies are made.

Nothing here is in the way of a vote: the picker talks to routes of its own (app/label_routes.py).
"""

import gradio as gr
from gradio.context import Context

from app import choices, pairs
from app.components.choice import Choice
from app.components.pair_picker import pair_picker
from app.lab import Lab
from app.tabs.events import EVERY, ONCE, QUIET, in_turn, kept
from app.words import warning
from lpo.export_card import plain
from storage import StorageError
from storage import jobs as queue

SPLIT = (
    "About one prompt in five is held out, decided by a hash of its text: labels on held-out prompts test the reward "
    "model and never train it."
)
OTHERS = (
    "Nothing was made: meanwhile another page has chosen the study “{}”. Open this tab anew to work on that one, or "
    "choose yours again under “Studies”."
)
ACTIVE = ("queued", "running", "stopping")


def build(lab: Lab) -> None:
    """The tab. Its only Gradio state is the id of the form's last job."""
    tab = Context.block
    picker = pair_picker(lambda: {"study": lab.current_study().id}, elem_id="label-picker")
    with gr.Accordion("Pairs for your own prompts", open=False, elem_id="label-pairs"):
        first, second = _pairs_form(lab, picker)
    with gr.Accordion("Studies", open=False, elem_id="label-studies"):
        study, about = _studies_form(lab, picker)

    def enter(a, b):
        """What changes while the tab is not looked at: checkpoints and the current study."""
        known = choices.sampling_policies(lab)
        current = lab.current_study()
        options = [(row.name, row.id) for row in lab.studies()]
        study = gr.Dropdown(options, value=current.id)
        return {"study": current.id}, kept(known, a), kept(known, b), study, describe(lab)

    turns = in_turn("label-study")
    tab.select(enter, [first, second], [picker, first, second, study, about], **turns)
    study.focus(lambda: gr.Dropdown([(row.name, row.id) for row in lab.studies()]), None, study, **turns)


def describe(lab: Lab) -> str:
    """The current study in one line."""
    row = lab.current_study()
    return f"Base {plain(row.base)}, question “{plain(row.question)}”. {SPLIT}"


def _pairs_form(lab: Lab, picker: gr.HTML) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Prompts, where the pictures come from, how many; the button queues a job."""
    job = gr.State(None)
    with gr.Row():
        text = gr.Textbox(
            label="prompts, one a line", lines=4, max_lines=10, scale=3, min_width=280, elem_id="label-prompts"
        )
        with gr.Column(scale=2, min_width=280):
            with gr.Row(equal_height=True):
                known = choices.sampling_policies(lab)
                first = Choice(
                    known, value=choices.BASE, label="one picture from", min_width=140, elem_id="label-first"
                )
                second = Choice(
                    known, value=choices.BASE, label="the other from", min_width=140, elem_id="label-second"
                )
            each = gr.Number(2, label="pairs per prompt", precision=0, elem_id="label-each")
    with gr.Accordion("Sampler", open=False), gr.Row():
        steps = gr.Number(20, label="steps", precision=0)
        guidance = gr.Number(5.0, label="guidance_scale")
        eta = gr.Number(0.0, label="eta", info="0 is deterministic, 1 as LPO samples")
    with gr.Row(equal_height=True):
        told = gr.Markdown(elem_id="label-told", elem_classes="beside-button")
        stop = gr.Button("Stop", visible=False, scale=0, min_width=100)
        go = gr.Button(
            "Make these pairs", variant="primary", scale=0, min_width=200, elem_id="label-make", elem_classes=ONCE
        )
    refused = gr.Markdown(elem_id="label-refused")  # of the buttons alone: what tells of the job must not cover it
    timer = gr.Timer(1.0, active=False)

    def make(shown, text, each, first, second, steps, guidance, eta):
        sampler = {"steps": steps, "guidance_scale": guidance, "eta": eta}
        try:
            if shown["study"] != (current := lab.current_study()).id:
                raise ValueError(OTHERS.format(current.name))
            job_id, _ = pairs.generate(lab, text, each, first, second, sampler)
        except ValueError as error:
            return gr.skip(), gr.skip(), warning(error), gr.skip(), gr.skip()
        return job_id, pairs.job_line(lab, job_id), "", gr.Timer(active=True), gr.Button(visible=True)

    def tick(job_id):
        running = job_id is not None and any(
            row.id == job_id for row in queue.list_jobs(lab.store, kinds=("pairs",), states=ACTIVE)
        )
        return pairs.job_line(lab, job_id), gr.Timer(active=running), gr.Button(visible=running)

    def end(job_id):
        try:
            queue.request_stop(lab.store, job_id)
        except StorageError as error:
            return gr.skip(), warning(error)
        return "Stopping after the pictures in hand.", ""

    turns, asked = in_turn("label-pairs"), [text, each, first, second, steps, guidance, eta]
    go.click(make, [picker, *asked], [job, told, refused, timer, stop], **turns)
    timer.tick(tick, job, [told, timer, stop], **turns)
    stop.click(end, job, [told, refused], **turns)
    gr.on([each.input for each in asked], None, None, refused, js="() => ''", **QUIET)
    return first, second


def _studies_form(lab: Lab, picker: gr.HTML) -> tuple[gr.Dropdown, gr.Markdown]:
    """The chooser, and a form for a new study."""
    current = lab.current_study()
    with gr.Row(equal_height=True):
        options = [(row.name, row.id) for row in lab.studies()]
        study = Choice(options, value=current.id, label="study", scale=1, min_width=220, elem_id="label-study")
        with gr.Column(scale=3, min_width=280):
            about = gr.Markdown(describe(lab), elem_id="label-about")
    with gr.Accordion("New study", open=False, elem_id="label-new"):
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="name", max_lines=1, min_width=160, elem_id="label-new-name")
            base = gr.Textbox(
                "scenes",
                label="base",
                info="scenes, a model folder, a single file or a hub id",
                max_lines=1,
                min_width=200,
                elem_id="label-new-base",
            )
            question = gr.Textbox(
                "Which picture do you prefer?",
                label="question",
                max_lines=1,
                min_width=220,
                elem_id="label-new-question",
            )
        with gr.Row(equal_height=True):
            text = gr.Textbox(
                label="prompts, one a line", lines=5, max_lines=10, scale=3, min_width=280, elem_id="label-new-prompts"
            )
            file = gr.File(
                label="or a .txt or .json file", file_types=[".txt", ".json"], height=150, scale=1, min_width=200
            )
        with gr.Row(equal_height=True):
            told = gr.Markdown(SPLIT, elem_id="label-new-told", elem_classes="beside-button")
            go = gr.Button(
                "Create the study", variant="primary", scale=0, min_width=200, elem_id="label-new-go",
                elem_classes=ONCE,
            )  # fmt: skip

    def choose(study_id):
        try:
            row = lab.choose_study(int(study_id))
        except (TypeError, ValueError) as error:
            return gr.skip(), warning(error), lab.current_study().id
        return {"study": row.id}, describe(lab), row.id

    def create(name, base, question, text, file):
        try:
            row, train, heldout = pairs.new_study(lab, name, base, question, text, file)
        except ValueError as error:
            return gr.skip(), gr.skip(), gr.skip(), warning(error)
        options = [(each.name, each.id) for each in lab.studies()]
        line = f"“{plain(row.name)}” has {train} training and {heldout} held-out prompts; first pairs are on their way."
        if heldout == 0 or train == 0:
            line += " With so few prompts one side is empty; add prompts before you train."
        return {"study": row.id}, gr.Dropdown(options, value=row.id), describe(lab), line

    turns = in_turn("label-study")
    study.input(choose, study, [picker, about, study], **turns, **EVERY)
    go.click(create, [name, base, question, text, file], [picker, study, about, told], **turns)
    return study, about
