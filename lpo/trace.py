"""A trajectory kept whole: x_t, mean, std and predicted x0 at every step, and what LRMs and siblings have to say on it.

The trace is stored once; scores are computed from it, so a new LRM can score old traces without sampling again.
The noise is that of lpo/sampling.py: the trace of a seed ends in the very picture that `sample` draws.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpo.backbones import Backbone, transitions
from lpo.config import ConfigError
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.sampling import encode_rows, start_noise, step_noise, trajectory
from lpo.selection import choose_pair, thresholds

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Trace:
    """One stored trajectory of S steps.

    timesteps: S + 1 numbers, descending, the last 0; x_t (S + 1, C, H, W), the last the finished latents;
    mean, x0 (S, C, H, W); std (S,); prompt, seed; meta: plain JSON values (policy, guidance_scale, eta, ...).
    """

    prompt: str
    seed: int
    timesteps: list[int]
    x_t: Tensor
    mean: Tensor
    std: Tensor
    x0: Tensor
    meta: dict


def trace(
    backbone: Backbone,
    prompt: str,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: float = 5.0,
    eta: float = 1.0,
    siblings: int = 0,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
) -> Iterator[dict]:
    """One dict per step for all B seeds together: step, t, prev_t; x_t, mean, x0, next (B, C, H, W), std (B,); and
    siblings (K, B, C, H, W) if asked for and the step has noise, else None. Sibling 0 is `next`, the one taken."""
    shape = backbone.latent_shape(height, width)
    rows = [(seed, prompt) for seed in seeds]
    conditioning = encode_rows(backbone, [prompt] * len(rows), negative_prompt)

    def noise(step: int) -> Tensor:
        return step_noise(backbone, rows, shape, step)

    x_t = start_noise(backbone, rows, shape)
    for step in trajectory(backbone, conditioning, x_t, steps, guidance_scale, eta, noise):
        candidates = None
        if siblings > 1 and bool((step.std > 0).all()):
            others = sibling_noise(shape, prompt, seeds, step.index, siblings).to(backbone.device)
            candidates = torch.cat([step.next[None], step.mean + step.std.view(1, -1, 1, 1, 1) * others])
        yield {
            "step": step.index,
            "t": step.t,
            "prev_t": step.prev_t,
            "x_t": step.x_t,
            "mean": step.mean,
            "std": step.std,
            "x0": step.x0,
            "next": step.next,
            "siblings": candidates,
        }


def sibling_noise(shape: tuple[int, ...], prompt: str, seeds: Sequence[int], step: int, siblings: int) -> Tensor:
    """(K - 1, B, C, H, W): the draws of siblings 1 to K - 1 of one step; sibling 0 is the one taken."""
    return torch.stack(
        [torch.stack([normal(shape, seed, "sibling", prompt, step, k) for seed in seeds]) for k in range(1, siblings)]
    )


def replay(stored: Trace, siblings: int = 0) -> Iterator[dict]:
    """The items that `trace` yielded for this trajectory (B = 1, on the CPU), so that a new LRM can score it and its
    siblings without a policy. The stored mean is fp16, so siblings agree to about three digits."""
    ends = [*stored.timesteps[1:-1], -1]
    for step, (t, prev_t) in enumerate(zip(stored.timesteps[:-1], ends, strict=True)):
        following, candidates = stored.x_t[step + 1][None], None
        if siblings > 1 and stored.std[step] > 0:
            others = sibling_noise(tuple(following.shape[1:]), stored.prompt, [stored.seed], step, siblings)
            candidates = torch.cat([following[None], stored.mean[step] + stored.std[step] * others])
        yield {
            "step": step,
            "t": t,
            "prev_t": prev_t,
            "x_t": stored.x_t[step][None],
            "mean": stored.mean[step][None],
            "std": stored.std[step][None],
            "x0": stored.x0[step][None],
            "next": following,
            "siblings": candidates,
        }


def collect(items: Sequence[dict], prompt: str, seeds: Sequence[int], meta: dict) -> list[Trace]:
    """The steps that `trace` yielded, as one Trace per seed (on the CPU)."""
    timesteps = [item["t"] for item in items] + [0]

    def row(name: str, b: int) -> Tensor:
        return torch.stack([item[name][b] for item in items]).cpu()

    traces = []
    for b, seed in enumerate(seeds):
        x_t = torch.cat([row("x_t", b), items[-1]["next"][b][None].cpu()])
        traces.append(Trace(prompt, seed, timesteps, x_t, row("mean", b), row("std", b), row("x0", b), meta))
    return traces


@torch.no_grad()
def score_step(lrm: LatentRewardModel, item: dict, prompt: str) -> list[float]:
    """Scores of x_t at t, one per seed, of one item of `trace` (for curves that grow while sampling)."""
    return lrm.score(item["x_t"], item["t"], [prompt] * len(item["x_t"])).tolist()


@torch.no_grad()
def score_trace(lrm: LatentRewardModel, stored: Trace) -> list[float]:
    """Scores of x_t at every timestep of `stored.timesteps`, the finished latents (t = 0) included: S + 1 numbers."""
    t = torch.tensor(stored.timesteps)
    return lrm.score(stored.x_t, t, [stored.prompt] * len(t), batch_size=64).tolist()


@torch.no_grad()
def score_siblings(
    lrm: LatentRewardModel, item: dict, prompt: str, threshold: float, score_timestep: str = "own"
) -> dict | None:
    """What LPO would make of the siblings of one item: scores [K][B], and per seed winner, loser, gap and kept.

    None for a step without siblings. score_timestep: 'own' scores x_{t-1} at its own timestep, 'parent' at t.
    """
    if item["siblings"] is None:
        return None
    count, batch = item["siblings"].shape[:2]
    t = item["t"] if score_timestep == "parent" else max(item["prev_t"], 0)
    scores = lrm.score(item["siblings"].flatten(0, 1), t, [prompt] * (count * batch)).view(count, batch)
    choice = choose_pair(scores, threshold)
    return {
        "t": t,
        "scores": scores.tolist(),
        "winner": choice.winner.tolist(),
        "loser": choice.loser.tolist(),
        "gap": choice.gap.tolist(),
        "threshold": threshold,
        "kept": choice.kept.tolist(),
    }


def step_thresholds(backbone: Backbone, steps: int, eta: float, kind: str, low: float, high: float) -> list[float]:
    """The keep threshold of every step of the live scheduler."""
    pairs = list(transitions(backbone.timesteps(steps)))
    stds = torch.cat([backbone.step_std(t, prev_t, eta) for t, prev_t in pairs]).cpu()
    if not bool((stds > 0).any()):
        return [low] * len(pairs)
    return thresholds(kind, low, high, torch.tensor([t for t, _ in pairs]), stds).tolist()


def save_trace(stored: Trace, path: str | Path) -> None:
    """Write one .safetensors file, whole or not at all. Tensors in fp16 but for x_t and std."""
    info = {"format_version": FORMAT_VERSION, "prompt": stored.prompt, "seed": stored.seed}
    info |= {"timesteps": stored.timesteps, "meta": stored.meta}
    tensors = {"x_t": stored.x_t, "std": stored.std, "mean": stored.mean.half(), "x0": stored.x0.half()}
    partial = f"{path}.partial"
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"trace": json.dumps(info)})
    os.replace(partial, path)


def load_trace(path: str | Path) -> Trace:
    """Read a trace. Raises ConfigError if the file is not one."""
    try:
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["trace"])
            tensors = {key: file.get_tensor(key).float() for key in ("x_t", "mean", "std", "x0")}
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not a trace file.") from error
    if info["format_version"] > FORMAT_VERSION:
        raise ConfigError(f"{path} was written by a newer version of this program: update the program.")
    return Trace(info["prompt"], info["seed"], info["timesteps"], meta=info["meta"], **tensors)
