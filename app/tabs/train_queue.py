"""The right half of the Train tab: every training with its state, and one of them in full.

Polled while something runs; what is costly to send (plots, pictures, log) is sent only when it changed.
"""

from collections.abc import Callable

import gradio as gr

from app import choices, jobs, models, training_figures
from app.components.reward_plot import RewardPlot
from app.lab import Lab
from app.tabs import compare_form, curves, train_models
from app.tabs.events import EVERY, LAST, ONCE, in_turn
from app.training_html import STYLE, head_html, list_html, pictures_html
from storage.jobs import JobError

POLL_SECONDS = 1.0
TURN = "train-queue"  # a click on another training must not be undone by the answer to a poll that was on its way
LISTED = 30
LOG_LINES = 200
NOTHING = "Nothing has been trained yet. Choose settings and press the button; it appears here."
# The row that was pressed is meant, even if another one lies under the pointer when it is released: a poll may have
# drawn the list anew, with one more. Of the keyboard's press there is a click only.
SELECT = """let pressed = null;
const jobOf = (event) => event.target.closest('[data-job]')?.dataset.job;
const choose = (job) => { if (job) trigger('select', { job }); };
element.addEventListener('pointerdown', (event) => { pressed = event.button === 0 ? jobOf(event) : null; });
element.addEventListener('pointerup', () => { choose(pressed); pressed = null; });
element.addEventListener('click', (event) => { if (event.detail === 0) choose(jobOf(event)); });"""


def build(lab: Lab, chosen: gr.State) -> Callable:
    """Makes the half; `chosen` holds the shown job's id. Returns `refresh(event)`, which redraws it after an event."""
    quiet = in_turn(TURN)
    seen = gr.State(None)  # what was last sent of the costly parts
    listing = gr.HTML(css_template=STYLE, js_on_load=SELECT, apply_default_css=False, elem_id="train-list")
    head = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="train-head")
    with gr.Row():
        # In an order in which what takes the place of a button that goes away does no harm to a hand that is too quick.
        stop, resume = _button("Stop"), _button("Resume")
        look = _button("Look at its curves", "train-look", "primary", 150)
        compare = _button("Compare with the base", "train-compare", "primary", 175)
        duplicate, delete = _button("Duplicate"), _button("Delete")
    doomed = gr.State(None)  # the job that was looked at when Delete was pressed, whichever is looked at by now
    with gr.Row(visible=False) as confirm:
        gr.Markdown("Delete this training and its files? Checkpoints that can be chosen elsewhere stay.")
        yes = gr.Button(
            "Delete it", variant="stop", size="sm", scale=0, min_width=110, elem_id="train-delete-yes",
            elem_classes=ONCE,
        )  # fmt: skip
        no = gr.Button("Keep it", size="sm", scale=0, min_width=110)
    with gr.Tabs(visible=False) as details:
        with gr.Tab("Plots"):
            plot = RewardPlot(height=370, name="training", elem_id="train-plot")
        with gr.Tab("Pictures"):
            pictures = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="train-pictures")
        with gr.Tab("Log"):
            log = gr.Textbox(
                show_label=False,
                lines=16,
                max_lines=16,
                interactive=False,
                autoscroll=True,
                buttons=["copy"],
                elem_id="train-log",
            )
        with gr.Tab("Export", elem_id="train-export") as export:
            saved = gr.State(None)  # the shown job and its checkpoints: what can be exported
            train_models.export_tab(lab, chosen, export, saved)
    timer = gr.Timer(POLL_SECONDS, active=False)
    buttons = [stop, resume, look, compare, duplicate, delete]
    shown = [chosen, seen, saved, listing, head, *buttons, details, plot, pictures, log, timer]

    def draw(job_id, seen):
        rows = jobs.list_jobs(lab, lane="training", limit=LISTED)
        known = [row["id"] for row in rows]
        if not rows:
            hidden = [gr.update(visible=False)] * 7
            return None, None, None, "", NOTHING, *hidden, gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        if job_id not in known:
            job_id = next((row["id"] for row in rows if row["state"] in ("running", "stopping")), known[0])
        job = jobs.describe(lab, job_id)
        signature = [job_id, job["state"], len(job["metrics"]), len(job["samples"]), len(job["log"]), job["log"][-80:]]
        changed = seen != signature
        moving = any(row["state"] in ("queued", "running", "stopping") for row in rows)
        return (
            job_id,
            signature,
            [job_id, *(row.id for row in models.of_run(lab, job_id))],
            list_html(lab, rows, job_id),
            head_html(lab, job),
            *_buttons(job),
            gr.update(visible=True),
            figure(job) if changed else gr.skip(),
            pictures_html(job) if changed else gr.skip(),
            "\n".join(job["log"].splitlines()[-LOG_LINES:]) if changed else gr.skip(),
            gr.Timer(active=moving),
        )

    def refresh(event):
        return event.then(draw, [chosen, seen], shown, **quiet, **LAST)

    timer.tick(draw, [chosen, seen], shown, **quiet)
    selected = listing.select(_chosen_row, None, [chosen, confirm], **quiet, **EVERY)
    refresh(selected)
    for button, act in ((stop, jobs.stop), (resume, jobs.resume), (duplicate, jobs.duplicate)):
        refresh(button.click(_acting(lab, act), chosen, chosen, **quiet))
    delete.click(lambda job_id: (job_id, gr.update(visible=True)), chosen, [doomed, confirm], **quiet)
    no.click(lambda: gr.update(visible=False), None, confirm, **quiet)
    deleted = yes.click(_acting(lab, jobs.delete), doomed, chosen, **quiet)
    refresh(deleted)
    deleted.then(lambda: gr.update(visible=False), None, confirm, **quiet, **LAST)
    for button, hand_over, tab in ((look, to_curves, "curves"), (compare, to_compare, "compare")):
        handed = button.click(_handing(lab, hand_over), chosen, None, **quiet)
        handed.success(None, None, None, js=f"() => document.querySelector('#tab-{tab}-button').click()")
    return refresh


def _chosen_row(event: gr.EventData) -> tuple:
    return event.job, gr.update(visible=False)


def _acting(lab: Lab, act: Callable) -> Callable:
    """A button's callback: does `act` to the chosen job; a new job's id becomes the chosen one."""

    def callback(job_id):
        try:
            result = act(lab, job_id)
        except JobError as error:
            gr.Warning(str(error))
            return job_id
        if act is jobs.delete:
            gr.Info(result)
            return None
        return result if act is jobs.duplicate else job_id

    return callback


def _handing(lab: Lab, hand_over: Callable) -> Callable:
    """A button's callback that hands the chosen job over to another tab; refused, the page stays where it is."""

    def callback(job_id):
        try:
            hand_over(lab, job_id)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return callback


def _button(name: str, elem_id: str = "", variant: str = "secondary", width: int = 110) -> gr.Button:
    return gr.Button(
        name, size="sm", variant=variant, scale=0, min_width=width, visible=False,
        elem_id=elem_id or f"train-{name.lower()}", elem_classes=ONCE,
    )  # fmt: skip


def _buttons(job: dict) -> list:
    """What Stop, Resume, the two next steps, Duplicate and Delete look like for a job."""
    alive = job["state"] in ("queued", "running", "stopping")
    done = job["state"] == "done"
    word = {"queued": "Cancel", "stopping": "Stopping…"}.get(job["state"], "Stop")
    return [
        gr.update(visible=alive, value=word, interactive=job["state"] != "stopping"),
        gr.update(visible=job["resumable"]),
        gr.update(visible=done),
        gr.update(visible=done and job["kind"] == "train-lpo"),
        gr.update(visible=True),
        gr.update(visible=not alive),
    ]


def figure(job: dict) -> dict:
    """The plots of a training; before its first step a sentence stands in their place."""
    if not job["metrics"]:
        note = "There is nothing to plot before the first step."
        return {"figure": {"data": [], "layout": {}}, "curves": [], "note": note}
    if job["kind"] == "train-lrm":
        return training_figures.lrm(job["metrics"], job["result"])
    return training_figures.lpo(job["metrics"])


def _made(lab: Lab, job_id: str) -> str | None:
    """The choice's value of what a training made: its final checkpoint, None if it is gone. ValueError where it is of
    no use: in a study on another base."""
    job = jobs.describe(lab, job_id)
    kind, offered = ("lrm", choices.lrms) if job["kind"] == "train-lrm" else ("adapter", choices.adapters)
    row = next((row for row in choices.checkpoints(lab, kind) if row.job_id == job_id), None)
    if row is not None and str(row.id) not in dict(map(reversed, offered(lab))):
        raise ValueError(
            f"{row.name} belongs to another base than the study's: choose its study in the Label tab first."
        )
    return None if row is None else str(row.id)


def to_compare(lab: Lab, job_id: str) -> None:
    """Lets the form of the Compare tab begin with what this training made, against the base."""
    if value := _made(lab, job_id):
        compare_form.ask(lab, value)


def to_curves(lab: Lab, job_id: str) -> None:
    """Lets the Curves tab begin with what this training made, beside what it started from."""
    value = _made(lab, job_id)
    if value is None:
        return
    last = curves.last_choice(lab)
    if jobs.describe(lab, job_id)["kind"] == "train-lrm":
        wanted = {**last, "lrms": [value, choices.WARM] if lab.current_study().base == "scenes" else [value]}
    else:
        wanted = {**last, "policies": [choices.BASE, value]}
    curves.remember(lab, {**wanted, "go": True})
