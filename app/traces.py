"""Traces as the page sees them: what is to be sampled, how far it is, its scores and its pictures. Imports no torch.

A trace is one trajectory (policy, prompt, seed, sampler). It lives in `traces/<key>/`:

    trace.safetensors   x_t, mean, std of every step, stored once      x0/step_00.webp ...  the predicted pictures
    progress.jsonl      one line a step while a job works on it: {"step", "t", "scores": {lrm: {"score", ...}}}

Scores that are complete are TraceScore rows, one per (trace, LRM); the worker (app/worker_trace.py) writes them.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from pathlib import Path

from PIL import Image
from sqlmodel import select

import storage
from app import weights
from lpo.config import Policy, TraceConfig, from_dict, to_dict
from lpo.search_costs import count
from storage.models import Trace, TraceScore

KEY = re.compile(r"[0-9a-f]{32}")
NOT_SAMPLED = {"format_version", "policy", "lrm", "prompt", "seeds", "allow_latent_mismatch", "device"}
NOT_SAMPLED |= {"channels_last", "compile", "tf32"}  # for speed; the trajectory is the same but for rounding
SIBLINGS_ONLY = {"threshold", "threshold_min", "threshold_max", "score_timestep"}


def plan(policies: list[tuple[str, dict]], config: TraceConfig) -> list[dict]:
    """The trajectories of a request: {"key", "policy" (its name), "seed"} for every (name, Policy) and seed.

    Raises ConfigError for a policy that these settings cannot follow.
    """
    for _, policy in policies:
        dataclasses.replace(config, policy=from_dict(Policy, policy))
    return [
        {"key": key(policy, config.prompt, seed, config), "policy": name, "place": place, "seed": seed}
        for place, (name, policy) in enumerate(policies)
        for seed in config.seeds
    ]


def key(policy: dict, prompt: str, seed: int, config: TraceConfig) -> str:
    """Names what a trajectory and its siblings depend on, and nothing else: a new LRM finds an old trajectory again.

    The weights belong to it: a base folder or an adapter that was changed in place is sampled anew.
    """
    policy = to_dict(from_dict(Policy, policy))
    shows_siblings = config.siblings or (policy["search"] or {}).get("method") == "steps"
    ignored = NOT_SAMPLED if shows_siblings else NOT_SAMPLED | SIBLINGS_ONLY
    sampled = {name: value for name, value in to_dict(config).items() if name not in ignored}
    text = json.dumps([policy, weights.identity(policy), prompt, seed, sampled], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def folder(store: "storage.Storage", trace_key: str) -> Path:
    """The folder of a trace. Raises ValueError for anything that is no key, so that no path can be smuggled in."""
    if not KEY.fullmatch(trace_key):
        raise ValueError("That is not the name of a trace.")
    return store.traces_dir / trace_key


def picture_path(store: "storage.Storage", trace_key: str, step: int) -> Path:
    return folder(store, trace_key) / "x0" / f"step_{step:02d}.webp"


def curves(store: "storage.Storage", planned: list[dict], lrms: list[tuple[str, str]], total: int) -> list[dict]:
    """What there is so far, as `app.figures.rewards` wants it. `lrms` are (name, path) pairs."""
    keys = [item["key"] for item in planned]
    with store.reader() as session:
        query = select(Trace.key, TraceScore.lrm, TraceScore.scores).join(TraceScore, TraceScore.trace_id == Trace.id)
        done = {(k, lrm): scores for k, lrm, scores in session.exec(query.where(Trace.key.in_(keys)))}
    out = []
    for item in planned:
        live = _progress(store, item["key"])
        pictures = len(list((folder(store, item["key"]) / "x0").glob("step_*.webp")))
        for name, path in lrms:
            steps = done.get((item["key"], path))
            if steps is None:
                steps = [{"step": r["step"], "t": r["t"], "score": None, **r["scores"].get(path, {})} for r in live]
            curve = {"trace": item["key"], "policy": item["policy"], "seed": item["seed"], "lrm": name}
            out.append({**curve, "total": total, "pictures": pictures, "steps": [_judged(s) for s in steps]})
    return out


def _judged(s: dict) -> dict:
    """A step with its siblings' `gap`, `kept` and a few words.

    The winner's and loser's chances are the softmax of the best and the worst score: p_w - p_l = tanh(spread / 2).
    `threshold` was written by the worker, from the live scheduler.
    """
    if s.get("low") is None or s.get("threshold") is None:
        return s  # the candidates of a best-of-n search make no pair
    gap = math.tanh((s["high"] - s["low"]) / 2)
    kept = gap > s["threshold"]
    words = f"best − worst {gap:.2f}, threshold {s['threshold']:.2f}: {'kept' if kept else 'not kept'}"
    return {**s, "gap": gap, "kept": kept, "verdict": words}


def complete(store: "storage.Storage", planned: list[dict], lrms: list[str]) -> bool:
    """Whether every trajectory is stored and every LRM has scored it: nothing is left for a job to do."""
    keys = [item["key"] for item in planned]
    with store.reader() as session:
        query = select(Trace.key, TraceScore.lrm).join(TraceScore, TraceScore.trace_id == Trace.id)
        done = set(session.exec(query.where(Trace.key.in_(keys))).all())
    return all((k, lrm) in done for k in keys for lrm in lrms)


def costs(curves: list[dict], policies: list[dict], planned: list[dict], guidance_scale: float) -> str:
    """What a picture of each policy takes, in words; empty unless one of them searches. `policies` as in the request.

    All policies of a request share the schedule, so one whole trajectory tells the steps; empty until there is one.
    """
    searches = {item["policy"]: from_dict(Policy, policies[item["place"]]).search for item in planned}
    whole = next((c for c in curves if len(c["steps"]) > c["total"]), None)
    if whole is None or all(search is None for search in searches.values()):
        return ""
    noisy = [s["t"] for s in whole["steps"][:-1]]
    said = [f"{count(s, whole['total'], guidance_scale, noisy).in_words()} ({n})" for n, s in searches.items()]
    return f"A picture takes {'; '.join(said)}."


def _progress(store: "storage.Storage", trace_key: str) -> list[dict]:
    path = folder(store, trace_key) / "progress.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # the text after the last newline is a line still being written
    return [json.loads(line) for line in lines]


def thumbnails(store: "storage.Storage"):
    """The server function of the reward plot: {"trace", "steps", "size"} -> {step: data URI}; size 0 is full size."""

    def thumbnails(payload: dict) -> dict[str, str]:
        out = {}
        for step in [int(s) for s in payload["steps"]][:1000]:
            path = picture_path(store, str(payload["trace"]), step)
            if path.exists():
                out[str(step)] = (
                    "data:image/webp;base64," + base64.b64encode(_sized(path, int(payload["size"]))).decode()
                )
        return out

    return thumbnails


def _sized(path: Path, size: int) -> bytes:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        if size == 0 or max(picture.size) <= size:
            return data
        picture.thumbnail((size, size))
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=85)
        return out.getvalue()
