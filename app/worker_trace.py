"""Traces: trajectories sampled once and kept, their predicted pictures, and what LRMs say along them, live.

The job's config is what app/tabs/curves.py submits: {"trace": a TraceConfig, "policies", "traces": [{"key", "place",
"seed", ...}], "lrms": [[name, path]], "total"}; app/traces.py says what lies where. A trajectory that is stored is
scored by a new LRM without sampling it again.
"""

import json
import os
from pathlib import Path

import torch

from app import traces as layout
from app.worker_models import device_of
from app.worker_task import Stopped, Task
from lpo import trace as lpo_trace
from lpo.backbones import Backbone
from lpo.config import TraceConfig, from_dict
from lpo.reward_model import LatentRewardModel
from lpo.sampling import to_pil
from storage import traces as stored

Lrms = dict[str, LatentRewardModel]


def run(task: Task) -> dict:
    """Samples what is not stored yet, scores everything by every LRM. A stop loses the trajectories in hand."""
    config = task.job.config
    settings = from_dict(TraceConfig, config["trace"])
    task.worker.models.breathe(task.store)
    for place, policy in enumerate(config["policies"]):
        items = [item for item in config["traces"] if item["place"] == place]
        known = {item["key"]: stored.find_trace(task.store, item["key"]) for item in items}
        new = [item for item in items if known[item["key"]] is None]
        for item in items:
            if known[item["key"]] is not None:
                score_again(task, known[item["key"]], policy, settings)
        if new:
            sample_new(task, new, policy, settings, place)
    stored.evict(
        task.store, keep=[t.id for t in (stored.find_trace(task.store, i["key"]) for i in config["traces"]) if t]
    )
    return {"traces": [item["key"] for item in config["traces"]]}


def load(task: Task, policy: dict, settings: TraceConfig) -> tuple[Backbone, Lrms]:
    """The policy and the LRMs of the job, on the job's device."""
    models, device = task.worker.models, device_of(task, settings.device)
    backbone = models.policy(policy, device, settings.dtype)
    lrms = {
        path: models.lrm(path, backbone, device, settings.dtype, settings.allow_latent_mismatch)
        for _, path in task.job.config["lrms"]
    }
    return backbone, lrms


@torch.no_grad()
def sample_new(task: Task, items: list[dict], policy: dict, settings: TraceConfig, place: int) -> None:
    """Samples the trajectories of one policy together; every step's scores and pictures are written at once."""
    backbone, lrms = load(task, policy, settings)
    limits = lpo_trace.step_thresholds(
        backbone, settings.steps, settings.eta, settings.threshold, settings.threshold_min, settings.threshold_max
    )
    folders = [layout.folder(task.store, item["key"]) for item in items]
    for folder in folders:
        (folder / "x0").mkdir(parents=True, exist_ok=True)
        (folder / "progress.jsonl").write_text("")
    seeds, kept, scored = [item["seed"] for item in items], [], []
    policies = len(task.job.config["policies"])
    steps = lpo_trace.trace(
        backbone,
        settings.prompt,
        seeds,
        settings.steps,
        settings.guidance_scale,
        settings.eta,
        settings.siblings,
        settings.height,
        settings.width,
        settings.negative_prompt,
    )
    for step in steps:
        if task.stopping:
            raise Stopped
        scores = score(lrms, step, settings, limits[step["step"]])
        pictures = to_pil(backbone.decode(step["x0"]))
        for row, (folder, picture) in enumerate(zip(folders, pictures, strict=True)):
            save_picture(picture, layout.picture_path(task.store, folder.name, step["step"]))
            append(folder / "progress.jsonl", {**line(step), "scores": {path: s[row] for path, s in scores.items()}})
        scored.append((line(step), scores))
        kept.append({**step, "siblings": None})
        done = (place + (step["step"] + 1) / settings.steps) / policies
        task.say(done, f"Step {step['step'] + 1} of {settings.steps}")
    meta = {"policy": policy, "thresholds": limits}
    for row, trajectory in enumerate(lpo_trace.collect(kept, settings.prompt, seeds, meta)):
        lpo_trace.save_trace(trajectory, folders[row] / "trace.safetensors")
        record = stored.add_trace(
            task.store,
            key=items[row]["key"],
            path=folders[row],
            prompt=settings.prompt,
            seed=seeds[row],
            policy=policy,
            config=task.job.config["trace"],
            study_id=task.job.study_id,
            job_id=task.job.id,
        )
        for path in lrms:
            stored.save_scores(task.store, record.id, path, [{**about, **s[path][row]} for about, s in scored])


@torch.no_grad()
def score_again(task: Task, record: stored.Trace, policy: dict, settings: TraceConfig) -> None:
    """Lets the LRMs that have not scored a stored trajectory do so."""
    known = stored.scores_of(task.store, record.id)
    missing = [path for _, path in task.job.config["lrms"] if path not in known]
    if not missing:
        return
    trajectory = lpo_trace.load_trace(stored.trace_path(task.store, record) / "trace.safetensors")
    backbone, lrms = load(task, policy, settings)
    steps = [moved(step, backbone.device) for step in lpo_trace.replay(trajectory, settings.siblings)]
    for path in missing:
        rows = []
        for step, limit in zip(steps, trajectory.meta["thresholds"], strict=True):
            if task.stopping:
                raise Stopped
            rows.append({**line(step), **score({path: lrms[path]}, step, settings, limit)[path][0]})
        stored.save_scores(task.store, record.id, path, rows)


def score(lrms: Lrms, step: dict, settings: TraceConfig, limit: float) -> dict[str, list[dict]]:
    """{LRM path: for every seed {"score"} and, with siblings, "low", "high" (worst and best) and "threshold"}}."""
    out = {}
    for path, lrm in lrms.items():
        rows = [{"score": value} for value in lpo_trace.score_step(lrm, step, settings.prompt)]
        siblings = lpo_trace.score_siblings(lrm, step, settings.prompt, limit, settings.score_timestep)
        if siblings is not None:
            for row, values in zip(rows, zip(*siblings["scores"], strict=True), strict=True):
                row |= {"low": min(values), "high": max(values), "threshold": limit}
        out[path] = rows
    return out


def line(step: dict) -> dict:
    return {"step": step["step"], "t": int(step["t"])}


def moved(step: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in step.items()}


def save_picture(picture, path: Path) -> None:
    """Whole or not at all: the page may read at any moment."""
    partial = path.with_suffix(".partial")
    picture.save(partial, "WEBP", quality=90)
    os.replace(partial, path)


def append(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
