"""The right half of the Train tab: every training with its state, and one of them in full.

Polled while something runs; what is costly to send (plots, pictures, log) is sent only when it changed.
"""

import base64
import io
import json
import re
import time
from collections.abc import Callable
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from app import choices, jobs, training, training_figures
from app.components.reward_plot import RewardPlot
from app.lab import Lab
from app.tabs import curves
from storage.jobs import JobError

POLL_SECONDS = 1.0
LISTED = 30
LOG_LINES = 200
THUMB = 96
STATES = {
    "queued": "waiting", "running": "running", "stopping": "saving", "stopped": "stopped", "done": "done",
    "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
NOTHING = "Nothing has been trained yet. Choose settings at the left and press the button; it appears here."
STYLE = """
.tq-list { display: flex; flex-direction: column; gap: 2px; max-height: 150px; overflow-y: auto; }
.tq-row { display: grid; grid-template-columns: 70px 1fr 84px 120px 110px; gap: 10px; align-items: center; border: 0;
  background: none; color: var(--body-text-color); text-align: left; padding: 4px 8px; border-radius: 6px;
  cursor: pointer; font-size: 13px; width: 100%; border-left: 3px solid transparent; }
.tq-row:hover { background: var(--background-fill-secondary); }
.tq-row[aria-pressed=true] { background: var(--background-fill-secondary); border-left-color: var(--color-accent); }
.tq-row b { font-weight: 600; }
.tq-row span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tq-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.tq-bar i { display: block; height: 100%; background: var(--color-accent); }
.tq-soft { color: color-mix(in srgb, currentColor 65%, transparent); font-size: 12px; }
.tq-failed { color: #b3261e; } .dark .tq-failed { color: #f2b8b5; }
.tq-grid { border-collapse: collapse; font-size: 12px; }
.tq-grid th { font-weight: 500; text-align: left; padding: 2px 8px 2px 0; }
.tq-grid td { padding: 0 4px 4px 0; }
.tq-grid img { display: block; width: 84px; border-radius: 4px; }
.tq-scroll { overflow: auto; max-height: 380px; }
"""
SELECT = """element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-job]');
  if (row) trigger('select', { job: row.dataset.job });
});"""


def build(lab: Lab, chosen: gr.State) -> Callable:
    """Makes the half; `chosen` holds the shown job's id. Returns `refresh(event)`, which redraws it after an event."""
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    seen = gr.State(None)  # what was last sent of the costly parts
    listing = gr.HTML(css_template=STYLE, js_on_load=SELECT, apply_default_css=False, elem_id="train-list")
    head = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="train-head")
    with gr.Row():
        actions = {
            name: gr.Button(name, size="sm", min_width=80, visible=False, elem_id=f"train-{name.lower()}")
            for name in ("Stop", "Resume", "Duplicate", "Delete")
        }
        look = gr.Button("Look at its curves", size="sm", variant="primary", visible=False, elem_id="train-look")
        compare = gr.Button(
            "Compare with the base", size="sm", variant="primary", visible=False, elem_id="train-compare"
        )
    with gr.Row(visible=False) as confirm:
        gr.Markdown("Delete this training and its files? Checkpoints that can be chosen elsewhere stay.")
        yes = gr.Button("Delete it", variant="stop", size="sm", min_width=80, elem_id="train-delete-yes")
        no = gr.Button("Keep it", size="sm", min_width=80)
    with gr.Tabs(visible=False) as details:
        with gr.Tab("Plots"):
            plot = RewardPlot(height=370, name="training", elem_id="train-plot")
        with gr.Tab("Pictures"):
            pictures = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="train-pictures")
        with gr.Tab("Log"):
            log = gr.Textbox(
                label="",
                lines=16,
                max_lines=16,
                interactive=False,
                autoscroll=True,
                buttons=["copy"],
                elem_id="train-log",
            )
    timer = gr.Timer(POLL_SECONDS, active=False)
    shown = [chosen, seen, listing, head, *actions.values(), look, compare, details, plot, pictures, log, timer]

    def draw(job_id, seen):
        rows = jobs.list_jobs(lab, lane="training", limit=LISTED)
        known = [row["id"] for row in rows]
        if not rows:
            hidden = [gr.update(visible=False)] * 7
            return None, None, "", NOTHING, *hidden, gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        if job_id not in known:
            job_id = next((row["id"] for row in rows if row["state"] in ("running", "stopping")), known[0])
        job = jobs.describe(lab, job_id)
        signature = [job_id, job["state"], len(job["metrics"]), len(job["samples"]), len(job["log"]), job["log"][-80:]]
        changed = seen != signature
        moving = any(row["state"] in ("queued", "running", "stopping") for row in rows)
        return (
            job_id,
            signature,
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
        return event.then(draw, [chosen, seen], shown, **quiet)

    timer.tick(draw, [chosen, seen], shown, **quiet)
    refresh(listing.select(_chosen_row, None, chosen, **quiet))
    for name, act in (("Stop", jobs.stop), ("Resume", jobs.resume), ("Duplicate", jobs.duplicate)):
        refresh(actions[name].click(_acting(lab, act), chosen, chosen, **quiet))
    actions["Delete"].click(lambda: gr.update(visible=True), None, confirm, **quiet)
    no.click(lambda: gr.update(visible=False), None, confirm, **quiet)
    deleted = yes.click(_acting(lab, jobs.delete), chosen, chosen, **quiet)
    refresh(deleted)
    deleted.then(lambda: gr.update(visible=False), None, confirm, **quiet)
    went = look.click(lambda job_id: to_curves(lab, job_id), chosen, None, **quiet)
    went.then(None, None, None, js="() => document.querySelector('#tab-curves-button').click()")
    compare.click(None, None, None, js="() => document.querySelector('#tab-compare-button').click()")
    return refresh


def _chosen_row(event: gr.EventData) -> str:
    return event.job


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


def _buttons(job: dict) -> list:
    """Visibility of Stop, Resume, Duplicate, Delete, then of the two next steps."""
    alive = job["state"] in ("queued", "running")
    ended = job["state"] in ("done", "stopped", "failed", "cancelled")
    done = job["state"] == "done"
    return [
        gr.update(visible=alive, value="Cancel" if job["state"] == "queued" else "Stop"),
        gr.update(visible=job["resumable"]),
        gr.update(visible=True),
        gr.update(visible=ended),
        gr.update(visible=done),
        gr.update(visible=done and job["kind"] == "train-lpo"),
    ]


def list_html(lab: Lab, rows: list[dict], chosen: str) -> str:
    """The queue, newest first: name, what it is, state, progress, time."""
    return '<div class="tq-list">' + "".join(_row_html(lab, row, row["id"] == chosen) for row in rows) + "</div>"


def _row_html(lab: Lab, row: dict, pressed: bool) -> str:
    progress = 1.0 if row["state"] == "done" else row["progress"] or 0.0
    when = left_words(lab, row) or time.strftime("%d %b %H:%M", time.localtime(row["created_at"]))
    words = escape(settings_words(row))
    failed = ' class="tq-failed"' if row["state"] == "failed" else ""
    return (
        f'<button type="button" class="tq-row" data-job="{row["id"]}" aria-pressed="{str(pressed).lower()}">'
        f"<b>{escape(training.run_name(lab, row))}</b><span class='tq-soft' title='{words}'>{words}</span>"
        f"<span{failed}>{STATES[row['state']]}</span>"
        f'<div class="tq-bar"><i style="width:{progress:.0%}"></i></div><span class="tq-soft">{when}</span></button>'
    )


def left_words(lab: Lab, row: dict) -> str:
    """ "3 minutes left" for a running training that has taken its first steps."""
    metrics = jobs.read_metrics(jobs.run_dir(lab, row["id"]) / "metrics.jsonl", 1) if row["state"] == "running" else []
    return f"{training.duration(metrics[-1]['left_s'])} left" if metrics else ""


def settings_words(row: dict) -> str:
    """The settings that tell one training from another."""
    config = row["config"]
    if row["kind"] == "train-lrm":
        return f"{config['steps']} steps, lr {config['lr']:g}, {config['train']}"
    top = config["policy"]["adapters"]
    on = f", on {Path(top[-1]['path']).parent.parent.name[:6]}" if top else ""
    return f"{config['iterations']} iterations, β {config['beta']:g}, lr {config['lr']:g}{on}"


def head_html(lab: Lab, job: dict) -> str:
    """The chosen training in words: state, time left, what looks wrong, what came out."""
    name = escape(training.run_name(lab, job))
    parts = [f"<b>{name}</b>: {state_words(job)}"]
    if job["state"] == "failed":
        parts = [
            f'<b>{name}</b>: <span class="tq-failed">{escape(job["error"] or "It failed; the log says why.")}</span>'
        ]
    parts += [f"⚠️ {escape(w)}" for w in training.warnings(job["kind"], job["metrics"])]
    if job["state"] == "done":
        parts.append(_bold(escape(training.outcome(job["kind"], job["result"]))))
    return "".join(f'<div style="margin:3px 0;font-size:13px">{part}</div>' for part in parts)


def _bold(text: str) -> str:
    """**x** -> <b>x</b>, the only markup that the sentences of app/training.py use."""
    pieces = text.split("**")
    return "".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(pieces))


def state_words(job: dict) -> str:
    """One line on where a training stands."""
    if job["state"] == "queued":
        return "waiting for the training before it to end."
    if job["state"] == "running" and not job["metrics"]:
        return "starting: loading the models and preparing the data."
    if job["state"] == "running":
        last = job["metrics"][-1]
        left = f", about {training.duration(job['left_s'])} left" if job["left_s"] is not None else ""
        return f"step {last['step']} of {last['total']}{left}."
    if job["state"] == "done":
        took = f" in {training.duration(job['metrics'][-1]['seconds'])}" if job["metrics"] else ""
        return f"finished{took}."
    return {
        "stopping": "saving itself, then it stops.",
        "stopped": f"{job['message'] or 'stopped'}; Resume goes on from there.".replace("it can be resumed; ", ""),
        "cancelled": "cancelled before it began.",
    }.get(job["state"], "")


def figure(job: dict) -> dict:
    return (
        training_figures.lrm(job["metrics"], job["result"])
        if job["kind"] == "train-lrm"
        else training_figures.lpo(job["metrics"])
    )


def pictures_html(job: dict) -> str:
    """Samples while training: a row per prompt, a column per step."""
    samples = job["samples"]
    if not samples:
        kind = (
            "An LRM makes no pictures."
            if job["kind"] == "train-lrm"
            else "No pictures yet: they come with each evaluation."
        )
        return f'<p class="tq-soft">{kind}</p>'
    steps = sorted({s["step"] for s in samples})
    names = list(dict.fromkeys(s["prompt"] for s in samples))
    found = {(s["prompt"], s["step"]): s["path"] for s in samples}
    texts = row_names(Path(job["run_dir"]), names)
    head = "<tr><th></th>" + "".join(f"<th>step {step}</th>" for step in steps) + "</tr>"
    body = "".join(
        f"<tr><th>{escape(texts.get(name, name.replace('_', ' ')))}</th>"
        + "".join(f"<td>{_image(found.get((name, step)), name, step)}</td>" for step in steps)
        + "</tr>"
        for name in names
    )
    return f'<div class="tq-scroll"><table class="tq-grid">{head}{body}</table></div>'


def row_names(run_dir: Path, names: list[str]) -> dict[str, str]:
    """{"prompt0_seed1": "a red star, seed 1"}: the held-out prompts that the worker wrote beside the run."""
    path = run_dir / "eval_prompts.json"
    texts = json.loads(path.read_text()) if path.exists() else []
    out = {}
    for name in names:
        match = re.fullmatch(r"prompt(\d+)_seed(\d+)", name)
        known = match and int(match[1]) < len(texts)
        out[name] = f"{texts[int(match[1])]} · seed {match[2]}" if known else name.replace("_", " ")
    return out


def _image(path: str | None, name: str, step: int) -> str:
    if path is None:
        return ""
    with Image.open(path) as picture:
        picture.thumbnail((THUMB * 2, THUMB * 2))
        out = io.BytesIO()
        picture.convert("RGB").save(out, "WEBP", quality=82)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{escape(name)} at step {step}" src="data:image/webp;base64,{data}">'


def to_curves(lab: Lab, job_id: str) -> None:
    """Lets the Curves tab begin with what this training made, beside what it started from."""
    kind = "lrm" if jobs.describe(lab, job_id)["kind"] == "train-lrm" else "adapter"
    made = [row for row in choices.checkpoints(lab, kind) if row.job_id == job_id]
    made.sort(key=lambda row: row.meta.get("final", False), reverse=True)
    if not made:
        return
    value = str(made[0].id)
    last = curves.last_choice(lab)
    if kind == "lrm":
        wanted = {**last, "lrms": [value, choices.WARM] if lab.current_study().base == "scenes" else [value]}
    else:
        wanted = {**last, "policies": [choices.BASE, value]}
    curves.remember(lab, {**wanted, "go": True})
