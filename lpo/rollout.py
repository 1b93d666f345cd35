"""The roll-out of LPO: at every step draw K siblings of x_{t-1}, score them all, keep the best and the worst as a pair
if the LRM is sure enough, and go on from a random one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lpo.backbones import Backbone, Conditioning, transitions
from lpo.config import LPOConfig
from lpo.reward_model import LatentRewardModel
from lpo.rng import integers, normal
from lpo.selection import choose_pair, thresholds


@dataclass(frozen=True)
class Pair:
    """Two siblings x_{t-1} of one x_t, each (C, H, W), with the row of the iteration's prompts they belong to."""

    x_t: Tensor
    winner: Tensor
    loser: Tensor
    t: float
    prev_t: float
    row: int


@dataclass(frozen=True)
class Branching:
    """One branched step of B rows: the scores (K, B), the gaps p_w - p_l (B,) and the pairs that were kept."""

    scores: Tensor
    gap: Tensor
    pairs: list[Pair]


class PlannedStep(NamedTuple):
    """A step of a roll-out: from t to prev_t, branched or not, with its threshold on p_w - p_l."""

    t: float
    prev_t: float
    branched: bool
    threshold: float


def plan(policy: Backbone, config: LPOConfig) -> list[PlannedStep]:
    """The steps that are sampled, up to the last branched one. Branched are those with noise, t_min <= t <= t_max.

    Thresholds span the noisy steps of the whole schedule, whatever window is trained.
    """
    shape = policy.latent_shape(config.height, config.width)
    pairs = list(transitions(policy.timesteps(config.steps, shape)))
    stds = torch.cat([policy.step_std(t, prev_t, config.eta) for t, prev_t in pairs]).cpu()
    times = torch.tensor([t for t, _ in pairs])
    limits = thresholds(config.threshold, config.threshold_min, config.threshold_max, times, stds).tolist()
    useful = [std > 0 and config.t_min <= t <= config.t_max for (t, _), std in zip(pairs, stds.tolist(), strict=True)]
    length = max((i + 1 for i, yes in enumerate(useful) if yes), default=0)
    return [PlannedStep(*pairs[i], useful[i], limits[i]) for i in range(length)]


def sibling_noise(config: LPOConfig, iteration: int, rows: Sequence[int], step: int, shape: tuple) -> Tensor:
    """(K, B, C, H, W) standard normal, keyed by row and sibling. Antithetic: the second half mirrors the first."""
    drawn = config.siblings // 2 if config.antithetic else config.siblings
    noise = torch.stack(
        [
            torch.stack([normal(shape, config.seed, "branch", iteration, row, step, k) for row in rows])
            for k in range(drawn)
        ]
    )
    return torch.cat([noise, -noise]) if config.antithetic else noise


@torch.no_grad()
def rollout(
    policy: Backbone,
    lrm: LatentRewardModel,
    prompts: Sequence[str],
    conditioning: Conditioning,
    config: LPOConfig,
    iteration: int,
    steps: Sequence[PlannedStep],
    first_row: int = 0,
) -> Iterator[Branching | None]:
    """Sample B prompts once. Yields a Branching after every branched step and None after the others.

    prompts and conditioning have B rows; first_row is the place of the first in the iteration (keys the noise).
    """
    shape = policy.latent_shape(config.height, config.width)
    rows = [first_row + b for b in range(len(prompts))]
    x_t = torch.stack([normal(shape, config.seed, "start", iteration, row) for row in rows]).to(policy.device)
    for index, (t, prev_t, branched, limit) in enumerate(steps):
        prediction = policy.predict(x_t, t, conditioning, config.guidance_scale)
        _, mean, std = policy.transition(x_t, prediction, t, prev_t, config.eta)
        if not branched:
            noise = torch.stack([normal(shape, config.seed, "step", iteration, row, index) for row in rows])
            x_t = mean + std.view(-1, 1, 1, 1) * noise.to(x_t)
            yield None
            continue
        noise = sibling_noise(config, iteration, rows, index, shape).to(x_t)
        siblings = mean + std.view(1, -1, 1, 1, 1) * noise  # (K, B, C, H, W)
        scored_at = t if config.score_timestep == "parent" else max(prev_t, 0)
        flat = siblings.flatten(0, 1)
        scores = lrm.score(flat, scored_at, list(prompts) * config.siblings, config.score_batch_size)
        scores = scores.view(config.siblings, -1).to(x_t.device)
        choice = choose_pair(scores, limit)
        # as lists at once: every number read from a GPU by itself makes it wait
        chosen = zip(choice.winner.tolist(), choice.loser.tolist(), choice.kept.tolist(), strict=True)
        pairs = [
            Pair(x_t[b], siblings[winner, b], siblings[loser, b], t, prev_t, rows[b])
            for b, (winner, loser, kept) in enumerate(chosen)
            if kept
        ]
        yield Branching(scores, choice.gap, pairs)
        onward = [int(integers(config.siblings, (1,), config.seed, "continue", iteration, row, index)) for row in rows]
        x_t = siblings[torch.tensor(onward), torch.arange(len(rows))]
