"""Traces: samples the trajectories that a tab asked for, scores them, and shows every step as it comes.

A trajectory that is stored already is not sampled again; an LRM that has not seen it yet scores it from the file.
What the page reads meanwhile is described in app/traces.py. Of a best-of-n search the plain candidate's curve grows
among the others' until the best is known; then its own takes the place, with its pictures.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from app import traces
from app.worker_models import SMALL
from app.worker_task import Stopped, Task
from lpo.backbones import Backbone
from lpo.config import Policy, TraceConfig, from_dict, to_dict
from lpo.reward_model import LatentRewardModel
from lpo.sampling import to_pil
from lpo.search import best, require_fit
from lpo.trace import (
    collect,
    load_trace,
    replay,
    save_trace,
    score_candidates,
    score_siblings,
    score_step,
    step_thresholds,
    take,
    trace,
)
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
        backbone = models.policy(policy, device, config.dtype, config.allow_latent_mismatch)
        backbone.tune(config)
        for lrm in lrms.values():
            require_fit(lrm, policy, backbone, config.allow_latent_mismatch)
            lrm.tune(config)
        if fresh:
            chooser = models.chooser(policy, backbone, device, config.dtype, config.allow_latent_mismatch)
            if chooser is not None:
                chooser.tune(config)
            part = place, len(request["policies"])
            _sample(Work(task, config, policy, backbone, lrms, chooser, fresh, part))
        for item in planned:
            if item not in fresh:
                _score_again(task, config, backbone, lrms, item["key"])
    shown = [stored_traces.find_trace(task.store, item["key"]).id for item in request["traces"]]
    stored_traces.evict(task.store, keep=shown)
    stored_traces.sweep(task.store)
    return {"traces": len(shown)}


@dataclass(frozen=True)
class Work:
    """What `_sample` needs: the trajectories `planned` of one policy, the `place`-th of so many."""

    task: Task
    config: TraceConfig
    policy: Policy
    backbone: Backbone
    lrms: dict[str, LatentRewardModel]
    chooser: LatentRewardModel | None  # of the policy's search
    planned: list[dict]
    place: tuple[int, int]

    @property
    def seeds(self) -> list[int]:
        return [item["seed"] for item in self.planned]

    @property
    def together(self) -> int:
        """How many rows go through the networks at once."""
        _, rows, columns = self.backbone.latent_shape(self.config.height, self.config.width)
        return 16 if rows * columns <= SMALL else 4

    def folder(self, b: int) -> Path:
        return traces.folder(self.task.store, self.planned[b]["key"])

    def say(self, step: int, doing: str) -> None:
        done = (self.place[0] + step / self.config.steps) / self.place[1]
        which = f" of policy {self.place[0] + 1} of {self.place[1]}" if self.place[1] > 1 else ""
        self.task.say(done, f"{doing}: step {step} of {self.config.steps}{which}")


def _sample(work: Work) -> None:
    """All seeds of one policy together; every step is on the page before the next one is computed."""
    config, search, task = work.config, work.policy.search, work.task
    for b in range(len(work.planned)):
        (work.folder(b) / "x0").mkdir(parents=True, exist_ok=True)
        for old in (work.folder(b) / "x0").iterdir():  # of a trace that was stopped
            old.unlink()
        _write_progress(work.folder(b), [])
    steps = trace(
        work.backbone, config.prompt, work.seeds, config.steps, config.guidance_scale, config.eta, config.siblings,
        config.height, config.width, config.negative_prompt, search, work.chooser, work.together,
    )  # fmt: skip
    if search is not None and search.method == "best-of-n":
        items, everyone, rows = _best(work, steps)
    else:
        (items, rows), everyone = _followed(work, steps), None
    meta = {"policy": to_dict(work.policy), "config": to_dict(config)}
    kept = collect(items, config.prompt, work.seeds, meta, everyone)
    for b, (stored, item) in enumerate(zip(kept, work.planned, strict=True)):
        save_trace(stored, work.folder(b) / FILE)
        row = stored_traces.add_trace(
            task.store, key=item["key"], path=work.folder(b), prompt=config.prompt, seed=item["seed"],
            policy=meta["policy"], config=meta["config"], study_id=task.job.study_id, job_id=task.job.id,
        )  # fmt: skip
        for path in work.lrms:
            stored_traces.save_scores(task.store, row.id, path, rows[path][b])


def _followed(work: Work, steps: Iterator[dict]) -> tuple[list[dict], dict[str, list[list[dict]]]]:
    """The items of trajectories that are known from the start, and their rows by LRM and seed."""
    config, limits, items = work.config, _thresholds(work.config, work.backbone), []
    rows: dict[str, list[list[dict]]] = {path: [[] for _ in work.seeds] for path in work.lrms}
    spread: dict[str, dict | None] = dict.fromkeys(work.lrms)  # of the siblings that the step before drew

    def show(item: dict, latents: Tensor) -> None:
        for path, lrm in work.lrms.items():
            for b, score in enumerate(score_step(lrm, item, config.prompt)):
                rows[path][b].append(_row(item, score, spread[path], b))
        _show_pictures(work, item["step"], latents)
        _show_rows(work, rows)

    for item in steps:
        if work.task.stopping:
            raise Stopped
        show(item, item["x0"])
        spread = {
            path: score_siblings(lrm, item, config.prompt, limits[item["step"]], config.score_timestep)
            for path, lrm in work.lrms.items()
        }
        items.append({name: value for name, value in item.items() if name != "siblings"})
        work.say(item["step"] + 1, "Sampling")
    show(_end(items), items[-1]["next"])
    return items, rows


def _best(work: Work, steps: Iterator[dict]) -> tuple[list[dict], list[dict], dict[str, list[list[dict]]]]:
    """The items of the best candidates, of all candidates, and the best ones' rows by LRM and seed."""
    config, seeds, items = work.config, len(work.planned), []
    scores: dict[str, list[list[float]]] = {path: [] for path in work.lrms}  # per step those of all candidates

    def rows(chosen: list[int]) -> dict[str, list[list[dict]]]:
        points = [*items, _end(items)] if len(items) == config.steps else items
        return {
            path: [
                [_among(item, of[b::seeds], chosen[b]) for item, of in zip(points, every, strict=False)]
                for b in range(seeds)
            ]
            for path, every in scores.items()
        }

    def score(item: dict) -> None:
        for path, lrm in work.lrms.items():
            scores[path].append(score_step(lrm, item, config.prompt))

    for item in steps:
        if work.task.stopping:
            raise Stopped
        score(item)
        items.append(item)
        _show_rows(work, rows([0] * seeds))
        work.say(item["step"] + 1, f"Sampling {work.policy.search.candidates} candidates")
    score(_end(items))
    _, chosen = best(work.chooser, items[-1]["next"], [config.prompt] * seeds, work.together)
    found, taken = rows(chosen.tolist()), take(items, chosen)
    _show_rows(work, found)
    for item in taken:
        _show_pictures(work, item["step"], item["x0"])
    _show_pictures(work, config.steps, taken[-1]["next"])
    return taken, items, found


def _end(items: list[dict]) -> dict:
    """The finished latents as one more point, at t = 0."""
    return {"step": len(items), "t": 0, "x_t": items[-1]["next"]}


def _among(item: dict, scores: list[float], chosen: int) -> dict:
    """One step of the chosen candidate's curve, with the spread of all candidates."""
    row = {"step": item["step"], "t": item["t"], "score": scores[chosen]}
    return {**row, "low": min(scores), "high": max(scores)}


def _show_pictures(work: Work, step: int, latents: Tensor) -> None:
    """Puts the picture of one step of every seed where the page looks."""
    pictures = [picture for part in latents.split(work.together) for picture in to_pil(work.backbone.decode(part))]
    for b, picture in enumerate(pictures):
        target = traces.picture_path(work.task.store, work.folder(b).name, step)
        partial = target.with_suffix(".partial")
        picture.save(partial, "WEBP", quality=PICTURE_QUALITY)
        partial.replace(target)


def _show_rows(work: Work, rows: dict[str, list[list[dict]]]) -> None:
    """Puts the rows of every seed so far, by LRM, where the page looks."""
    for b in range(len(work.planned)):
        points = zip(*(rows[path][b] for path in work.lrms), strict=True)
        lines = [
            {"step": row[0]["step"], "t": row[0]["t"], "scores": dict(zip(work.lrms, row, strict=True))}
            for row in points
        ]
        _write_progress(work.folder(b), lines)


def _write_progress(folder: Path, lines: list[dict]) -> None:
    partial = folder / "progress.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(folder / "progress.jsonl")


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
        rows, siblings, among = [], None, score_candidates(lrm, kept)
        for item in replay(backbone, kept, config.siblings):
            if task.stopping:
                raise Stopped
            rows.append(_row(item, score_step(lrm, item, kept.prompt)[0], siblings, 0))
            siblings = score_siblings(lrm, item, kept.prompt, limits[item["step"]], config.score_timestep)
        end = {"step": len(rows), "t": 0, "x_t": kept.x_t[-1][None].to(backbone.device)}
        rows.append(_row(end, score_step(lrm, end, kept.prompt)[0], siblings, 0))
        if among is not None:
            rows = [{**row, "low": min(of), "high": max(of)} for row, of in zip(rows, among, strict=True)]
        stored_traces.save_scores(task.store, found.id, path, rows)


def _thresholds(config: TraceConfig, backbone: Backbone) -> list[float]:
    return step_thresholds(
        backbone, config.steps, config.eta, config.threshold, config.threshold_min, config.threshold_max,
        backbone.latent_shape(config.height, config.width),
    )  # fmt: skip
