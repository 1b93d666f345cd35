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
from lpo.config import ConfigError, Policy, Search, from_dict
from lpo.reward_model import LatentRewardModel
from lpo.sampling import sibling_noise, start_noise, step_noise, trajectory
from lpo.search import StepSearch, candidate_rows
from lpo.selection import choose_pair, thresholds

FORMAT_VERSION = 2  # 2 may hold the other candidates of a best-of-n search; 1 never did
SCORED_TOGETHER = 64  # latents


@dataclass(frozen=True)
class Trace:
    """One stored trajectory of S steps.

    timesteps: S + 1 numbers, descending, the last 0; x_t (S + 1, C, H, W), the last the finished latents;
    mean, x0 (S, C, H, W); std (S,); prompt, seed; meta: plain JSON values (policy, guidance_scale, eta, ...).
    candidates: x_t of all trajectories that a best-of-n search chose from, (S + 1, N, C, H, W); None without one.
    """

    prompt: str
    seed: int
    timesteps: list[float]
    x_t: Tensor
    mean: Tensor
    std: Tensor
    x0: Tensor
    meta: dict
    candidates: Tensor | None = None

    @property
    def search(self) -> Search | None:
        """The search that chose this trajectory."""
        policy = self.meta.get("policy")
        return from_dict(Policy, policy).search if isinstance(policy, dict) else None


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
    search: Search | None = None,
    lrm: LatentRewardModel | None = None,
    batch_size: int | None = None,
) -> Iterator[dict]:
    """One dict per step for all B seeds together: step, t, prev_t; x_t, mean, x0, next (B, C, H, W), std (B,); and
    siblings (K, B, C, H, W) if asked for and the step has noise, else None. Sibling 0 is the plain draw and, without a
    search, `next`.

    search: a search over steps by `lrm` chooses `next` among its own siblings. Under best-of-n B is N x seeds (as
    `lpo.search.candidate_rows` orders them), and the caller takes the best trajectories with `take`. At most
    `batch_size` trajectories go through the network together.
    """
    shape = backbone.latent_shape(height, width)
    rows = [(seed, prompt) for seed in seeds]
    choose = None
    if search is not None and search.method == "steps":
        choose = StepSearch(backbone, lrm, search, rows, batch_size or SCORED_TOGETHER)
    elif search is not None:
        rows, siblings = candidate_rows(rows, search.candidates), 0
    conditioning = backbone.encode_prompts([prompt] * len(rows), negative_prompt)

    def noise(step: int) -> Tensor:
        return step_noise(backbone, rows, shape, step)

    x_t = start_noise(backbone, rows, shape)
    for step in trajectory(backbone, conditioning, x_t, steps, guidance_scale, eta, noise, choose, batch_size):
        candidates = None
        if choose is not None and choose.last is not None:
            candidates = choose.last.latents
        elif siblings > 1 and bool((step.std > 0).all()):
            others = sibling_noise(backbone, rows, shape, step.index, siblings)
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


def take(items: Sequence[dict], chosen: Tensor) -> list[dict]:
    """Of items over N x B candidates those of the chosen ones: chosen (B,), each below N. No siblings."""
    kept = []
    for item in items:
        rows = chosen.cpu() * len(chosen) + torch.arange(len(chosen))
        own = {name: item[name][rows.to(item[name].device)] for name in ("x_t", "mean", "std", "x0", "next")}
        kept.append({**item, **own, "siblings": None})
    return kept


def replay(backbone: Backbone, stored: Trace, siblings: int = 0) -> Iterator[dict]:
    """The items that `trace` yielded for this trajectory (B = 1), so that a new LRM can score it and its siblings
    without sampling. The stored mean is fp16, so siblings agree to about three digits."""
    ends = [*stored.timesteps[1:-1], -1]
    rows, shape, search = [(stored.seed, stored.prompt)], tuple(stored.x_t.shape[1:]), stored.search
    siblings = 0 if search is not None and search.method == "best-of-n" else siblings
    for step, (t, prev_t) in enumerate(zip(stored.timesteps[:-1], ends, strict=True)):
        x_t, following, mean, x0 = (
            row[None].to(backbone.device)
            for row in (stored.x_t[step], stored.x_t[step + 1], stored.mean[step], stored.x0[step])
        )
        std, candidates = stored.std[step].to(backbone.device), None
        searched = search is not None and search.covers(t)
        count = search.candidates if searched else siblings
        if count > 1 and std > 0:
            first = mean + std * step_noise(backbone, rows, shape, step) if searched else following
            candidates = torch.cat([first[None], mean + std * sibling_noise(backbone, rows, shape, step, count)])
        yield {
            "step": step,
            "t": t,
            "prev_t": prev_t,
            "x_t": x_t,
            "mean": mean,
            "std": std[None],
            "x0": x0,
            "next": following,
            "siblings": candidates,
        }


def collect(
    items: Sequence[dict], prompt: str, seeds: Sequence[int], meta: dict, everyone: Sequence[dict] | None = None
) -> list[Trace]:
    """The steps that `trace` yielded, as one Trace per seed (on the CPU). `everyone`: of a best-of-n search the items
    of all N x B candidates, which are kept beside the chosen ones."""
    timesteps = [item["t"] for item in items] + [0]

    def row(name: str, b: int) -> Tensor:
        return torch.stack([item[name][b] for item in items]).cpu()

    def others(b: int) -> Tensor | None:
        if everyone is None:
            return None
        whole = [*(item["x_t"] for item in everyone), everyone[-1]["next"]]
        return torch.stack([x_t[b :: len(seeds)].cpu() for x_t in whole])

    traces = []
    for b, seed in enumerate(seeds):
        x_t = torch.cat([row("x_t", b), items[-1]["next"][b][None].cpu()])
        own = row("mean", b), row("std", b), row("x0", b)
        traces.append(Trace(prompt, seed, timesteps, x_t, *own, meta, others(b)))
    return traces


@torch.no_grad()
def score_step(lrm: LatentRewardModel, item: dict, prompt: str) -> list[float]:
    """Scores of x_t at t, one per seed, of one item of `trace` (for curves that grow while sampling)."""
    return lrm.score(item["x_t"], item["t"], [prompt] * len(item["x_t"]), SCORED_TOGETHER).tolist()


@torch.no_grad()
def score_trace(lrm: LatentRewardModel, stored: Trace) -> list[float]:
    """Scores of x_t at every timestep of `stored.timesteps`, the finished latents (t = 0) included: S + 1 numbers."""
    t = torch.tensor(stored.timesteps)
    return lrm.score(stored.x_t, t, [stored.prompt] * len(t), batch_size=SCORED_TOGETHER).tolist()


@torch.no_grad()
def score_candidates(lrm: LatentRewardModel, stored: Trace) -> list[list[float]] | None:
    """Scores of the candidates of a best-of-n search at every timestep, the finished latents included: S + 1 lists of
    N numbers; None for a trace without them."""
    if stored.candidates is None:
        return None
    steps, count = stored.candidates.shape[:2]
    t = torch.tensor(stored.timesteps).repeat_interleave(count)
    scores = lrm.score(stored.candidates.flatten(0, 1), t, [stored.prompt] * len(t), batch_size=SCORED_TOGETHER)
    return scores.view(steps, count).tolist()


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
    prompts = [prompt] * (count * batch)
    scores = lrm.score(item["siblings"].flatten(0, 1), t, prompts, SCORED_TOGETHER).view(count, batch)
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


def step_thresholds(
    backbone: Backbone,
    steps: int,
    eta: float,
    kind: str,
    low: float,
    high: float,
    shape: tuple[int, int, int] | None = None,
) -> list[float]:
    """The keep threshold of every step of the live scheduler; shape: of the latents, None for the model's own."""
    pairs = list(transitions(backbone.timesteps(steps, shape)))
    stds = torch.cat([backbone.step_std(t, prev_t, eta) for t, prev_t in pairs]).cpu()
    if not bool((stds > 0).any()):
        return [low] * len(pairs)
    return thresholds(kind, low, high, torch.tensor([t for t, _ in pairs]), stds).tolist()


def save_trace(stored: Trace, path: str | Path) -> None:
    """Write one .safetensors file, whole or not at all. Tensors in fp16 but for x_t and std."""
    info = {"format_version": FORMAT_VERSION, "prompt": stored.prompt, "seed": stored.seed}
    info |= {"timesteps": stored.timesteps, "meta": stored.meta}
    tensors = {"x_t": stored.x_t, "std": stored.std, "mean": stored.mean.half(), "x0": stored.x0.half()}
    if stored.candidates is not None:
        tensors["candidates"] = stored.candidates.half()
    partial = f"{path}.partial"
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"trace": json.dumps(info)})
    os.replace(partial, path)


def load_trace(path: str | Path) -> Trace:
    """Read a trace. Raises ConfigError if the file is not one."""
    try:
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["trace"])
            tensors = {key: file.get_tensor(key).float() for key in ("x_t", "mean", "std", "x0")}
            if "candidates" in file.keys():  # noqa: SIM118  (a safe_open file is no dictionary)
                tensors["candidates"] = file.get_tensor("candidates").float()
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not a trace file.") from error
    if info["format_version"] > FORMAT_VERSION:
        raise ConfigError(f"{path} was written by a newer version of this program: update the program.")
    return Trace(info["prompt"], info["seed"], info["timesteps"], meta=info["meta"], **tensors)
