"""Traces: samples the trajectories that the Curves tab asked for, scores them, and shows every step as it comes.

A trajectory that is stored already is not sampled again; an LRM that has not seen it yet scores it from the file.
What the page reads meanwhile is described in app/traces.py.
"""

import json
from pathlib import Path

from torch import Tensor

from app import traces
from app.worker_task import Stopped, Task
from lpo.backbones import Backbone
from lpo.backbones.latent_space import require_same
from lpo.config import Policy, TraceConfig, from_dict, to_dict
from lpo.lrm_files import latent_space
from lpo.reward_model import LatentRewardModel
from lpo.sampling import to_pil
from lpo.trace import collect, load_trace, replay, save_trace, score_siblings, score_step, step_thresholds, trace
from storage import traces as stored_traces

PICTURE_QUALITY = 90
FILE = "trace.safetensors"


def run(task: Task) -> dict:
    """Does {"trace": TraceConfig, "policies", "traces" (the plan), "lrms"}. Raises Stopped or ConfigError."""
    request = task.job.config
    config = from_dict(TraceConfig, request["trace"])
    device = task.device if config.device == "auto" else config.device
    task.say(0.0, "Loading the models")
    task.beat()
    models = task.worker.models
    lrms = {path: models.lrm(path, config.policy.base, device, config.dtype) for _, path in request["lrms"]}
    for place, plain in enumerate(request["policies"]):
        policy = from_dict(Policy, plain)
        planned = [item for item in request["traces"] if item["place"] == place]
        fresh = [item for item in planned if stored_traces.find_trace(task.store, item["key"]) is None]
        backbone = models.policy(policy, device, config.dtype)
        for lrm in lrms.values():
            spaces = latent_space(lrm, policy.base), backbone.fingerprint()
            require_same(*spaces, lrm.name, policy.base, config.allow_latent_mismatch)
        if fresh:
            _sample(task, config, policy, backbone, lrms, fresh, (place, len(request["policies"])))
        for item in planned:
            if item not in fresh:
                _score_again(task, config, backbone, lrms, item["key"])
    shown = [stored_traces.find_trace(task.store, item["key"]).id for item in request["traces"]]
    stored_traces.evict(task.store, keep=shown)
    return {"traces": len(shown)}


def _sample(
    task: Task,
    config: TraceConfig,
    policy: Policy,
    backbone: Backbone,
    lrms: dict[str, LatentRewardModel],
    planned: list[dict],
    place: tuple[int, int],
) -> None:
    """All seeds of one policy together; every step is on the page before the next one is computed."""
    seeds = [item["seed"] for item in planned]
    folders = [traces.folder(task.store, item["key"]) for item in planned]
    for folder in folders:
        (folder / "x0").mkdir(parents=True, exist_ok=True)
        (folder / "progress.jsonl").write_text("")
    limits = _thresholds(config, backbone)
    rows: dict[str, list[list[dict]]] = {path: [[] for _ in seeds] for path in lrms}
    spread: dict[str, dict | None] = dict.fromkeys(lrms)  # of the siblings that the step before drew
    items = []
    steps = trace(
        backbone, config.prompt, seeds, config.steps, config.guidance_scale, config.eta, config.siblings,
        config.height, config.width, config.negative_prompt,
    )  # fmt: skip
    for item in steps:
        if task.stopping:
            raise Stopped
        _show(task, backbone, folders, rows, lrms, config.prompt, item, item["x0"], spread)
        spread = {
            path: score_siblings(lrm, item, config.prompt, limits[item["step"]], config.score_timestep)
            for path, lrm in lrms.items()
        }
        items.append({name: value for name, value in item.items() if name != "siblings"})
        done = (place[0] + (item["step"] + 1) / config.steps) / place[1]
        which = f" of policy {place[0] + 1} of {place[1]}" if place[1] > 1 else ""
        task.say(done, f"Sampling: step {item['step'] + 1} of {config.steps}{which}")
    end = {"step": config.steps, "t": 0, "x_t": items[-1]["next"]}
    _show(task, backbone, folders, rows, lrms, config.prompt, end, items[-1]["next"], spread)
    meta = {"policy": to_dict(policy), "config": to_dict(config)}
    for b, (kept, item) in enumerate(zip(collect(items, config.prompt, seeds, meta), planned, strict=True)):
        save_trace(kept, folders[b] / FILE)
        row = stored_traces.add_trace(
            task.store, key=item["key"], path=folders[b], prompt=config.prompt, seed=item["seed"],
            policy=meta["policy"], config=meta["config"], study_id=task.job.study_id, job_id=task.job.id,
        )  # fmt: skip
        for path in lrms:
            stored_traces.save_scores(task.store, row.id, path, rows[path][b])


def _show(
    task: Task,
    backbone: Backbone,
    folders: list[Path],
    rows: dict[str, list[list[dict]]],
    lrms: dict[str, LatentRewardModel],
    prompt: str,
    item: dict,
    latents: Tensor,
    spread: dict[str, dict | None],
) -> None:
    """Scores one step of every seed and puts it, with its picture, where the page looks. Appends to `rows`."""
    for path, lrm in lrms.items():
        for b, score in enumerate(score_step(lrm, item, prompt)):
            rows[path][b].append(_row(item, score, spread[path], b))
    for b, picture in enumerate(to_pil(backbone.decode(latents))):
        target = traces.picture_path(task.store, folders[b].name, item["step"])
        partial = target.with_suffix(".partial")
        picture.save(partial, "WEBP", quality=PICTURE_QUALITY)
        partial.replace(target)
        scores = {path: rows[path][b][-1] for path in lrms}
        with open(folders[b] / "progress.jsonl", "a") as file:
            file.write(json.dumps({"step": item["step"], "t": item["t"], "scores": scores}) + "\n")


def _row(item: dict, score: float, siblings: dict | None, b: int) -> dict:
    """One step of one curve. Siblings stand where they arrive: the one taken is the curve's own point."""
    row = {"step": item["step"], "t": item["t"], "score": score}
    if siblings is not None:
        candidates = [scores[b] for scores in siblings["scores"]]
        row |= {"low": min(candidates), "high": max(candidates), "threshold": siblings["threshold"]}
    return row


def _score_again(
    task: Task, config: TraceConfig, backbone: Backbone, lrms: dict[str, LatentRewardModel], key: str
) -> None:
    """Scores of the LRMs that have not seen this stored trajectory yet."""
    found = stored_traces.find_trace(task.store, key)
    known = stored_traces.scores_of(task.store, found.id)
    missing = {path: lrm for path, lrm in lrms.items() if path not in known}
    if not missing:
        return
    kept = load_trace(stored_traces.trace_path(task.store, found) / FILE)
    limits = _thresholds(config, backbone)
    for path, lrm in missing.items():
        rows, siblings = [], None
        for item in replay(kept, config.siblings):
            if task.stopping:
                raise Stopped
            item = {k: v.to(backbone.device) if isinstance(v, Tensor) else v for k, v in item.items()}
            rows.append(_row(item, score_step(lrm, item, kept.prompt)[0], siblings, 0))
            siblings = score_siblings(lrm, item, kept.prompt, limits[item["step"]], config.score_timestep)
        end = {"step": len(rows), "t": 0, "x_t": kept.x_t[-1][None].to(backbone.device)}
        rows.append(_row(end, score_step(lrm, end, kept.prompt)[0], siblings, 0))
        stored_traces.save_scores(task.store, found.id, path, rows)


def _thresholds(config: TraceConfig, backbone: Backbone) -> list[float]:
    return step_thresholds(
        backbone, config.steps, config.eta, config.threshold, config.threshold_min, config.threshold_max
    )
