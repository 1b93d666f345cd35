"""The Train tab's pieces of HTML: the queue, one training in words, its samples.

Everything that a person or a file wrote goes through `escape`.
"""

import base64
import io
import json
import re
import time
from html import escape
from pathlib import Path

from PIL import Image

from app import choices, devices, jobs, training
from app.lab import Lab
from storage import checkpoints as stored

THUMB = 96
STATES = {
    "queued": "waiting", "running": "running", "stopping": "saving", "stopped": "stopped", "done": "done",
    "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
STYLE = """
.tq-list { display: flex; flex-direction: column; gap: 2px; max-height: 150px; overflow-y: auto; }
.tq-row { display: grid; grid-template-columns: 70px 1fr 62px 90px 96px; gap: 10px; align-items: center; border: 0;
  background: none; color: var(--body-text-color); text-align: left; padding: 4px 8px; border-radius: 6px;
  cursor: pointer; font-size: 13px; width: 100%; border-left: 3px solid transparent; }
@media (max-width: 720px) { .tq-row { grid-template-columns: 52px 0 56px 1fr 92px; gap: 6px; } }
.tq-row:hover { background: var(--background-fill-secondary); }
.tq-row[aria-pressed=true] { background: var(--background-fill-secondary); border-left-color: var(--color-accent); }
.tq-row b { font-weight: 600; }
.tq-row span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tq-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.tq-bar i { display: block; height: 100%; background: var(--color-accent); }
.tq-soft { color: color-mix(in srgb, currentColor 65%, transparent); font-size: 12px; }
.tq-failed { color: #b3261e; } .dark .tq-failed { color: #f2b8b5; }
.tq-grid { border-collapse: collapse; font-size: 12px; }
.tq-grid th { font-weight: 500; text-align: left; padding: 2px 8px 2px 0; max-width: 190px; }
.tq-grid td { padding: 0 4px 4px 0; }
.tq-grid img { display: block; width: 84px; min-width: 84px; border-radius: 4px; }
.tq-scroll { overflow: auto; max-height: 380px; }
"""


def list_html(lab: Lab, rows: list[dict], chosen: str) -> str:
    """The queue, newest first: name, what it is, state, progress, time."""
    names = {row.path: row.name for row in stored.list_checkpoints(lab.store, include_hidden=True)}
    return '<div class="tq-list">' + "".join(_row_html(lab, r, names, r["id"] == chosen) for r in rows) + "</div>"


def _row_html(lab: Lab, row: dict, names: dict[str, str], pressed: bool) -> str:
    progress = 1.0 if row["state"] == "done" else row["progress"] or 0.0
    when = left_words(lab, row) or time.strftime("%d %b %H:%M", time.localtime(row["created_at"]))
    words = escape(settings_words(row, names))
    failed = ' class="tq-failed"' if row["state"] == "failed" else ""
    return (
        f'<button type="button" class="tq-row" data-job="{row["id"]}" aria-pressed="{str(pressed).lower()}">'
        f"<b>{escape(training.run_name(lab, row))}</b><span class='tq-soft' title='{words}'>{words}</span>"
        f"<span{failed}>{STATES['queued' if _waits(row) else row['state']]}</span>"
        f'<div class="tq-bar"><i style="width:{progress:.0%}"></i></div><span class="tq-soft">{when}</span></button>'
    )


def _waits(row: dict) -> bool:
    return row["state"] == "running" and devices.waits(row["message"])


def left_words(lab: Lab, row: dict) -> str:
    """ "3 minutes left" for a running training that has taken its first steps."""
    if row["state"] != "running" or _waits(row):
        return ""
    metrics = jobs.read_metrics(jobs.run_dir(lab, row["id"]) / "metrics.jsonl", 1)
    return f"{training.duration(metrics[-1]['left_s'])} left" if metrics else ""


def settings_words(row: dict, names: dict[str, str]) -> str:
    """The settings that tell one training from another; `names` of checkpoints by their path."""
    config = row["config"]
    if row["kind"] == "train-lrm":
        start = {"base": "the base", choices.WARM: "Scenes"}.get(config["init"]) or names.get(config["init"], "an LRM")
        return f"from {start}, {config['steps']} steps, lr {config['lr']:g}, {config['train']}"
    judge = "Scenes" if config["lrm"] == choices.WARM else names.get(config["lrm"], "an LRM")
    below = "".join(f" on {names.get(a['path'], 'an adapter')}" for a in config["policy"]["adapters"][-1:])
    return f"judged by {judge}{below}, {config['iterations']} iterations, β {config['beta']:g}, lr {config['lr']:g}"


def head_html(lab: Lab, job: dict) -> str:
    """The chosen training in words: state, time left, what looks wrong, what came out."""
    name = escape(training.run_name(lab, job))
    words = state_words(job)
    if job["state"] == "queued" and not lab.settings.workers:
        words = jobs.waiting(lab)
    parts = [f"<b>{name}</b>: {words}"]
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
    if _waits(job):
        return f"{job['message']}."
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
