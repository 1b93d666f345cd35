"""Which siblings make a training pair: the best and the worst, if the LRM is sure enough of the order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpo.config import ConfigError


def thresholds(kind: str, low: float, high: float, timesteps: Tensor, stds: Tensor) -> Tensor:
    """The keep threshold of every step, (S,), between `low` and `high` (paper, eq. of the dynamic threshold).

    timesteps, stds (S,): all steps of the live scheduler with their standard deviations. kind: none (always `low`),
    linear in t, linear in the variance, or linear in sigma. Steps with std 0 are never branched; they get `low`.
    """
    if kind == "none":
        return torch.full_like(stds, low)
    position = {"linear": timesteps.to(stds), "variance": stds**2, "sigma": stds}.get(kind)
    if position is None:
        raise ConfigError(f"threshold is {kind!r}; choose one of none, linear, variance, sigma.")
    noisy = stds > 0
    least, most = position[noisy].min(), position[noisy].max()
    share = (position - least) / (most - least).clamp(min=1e-12)
    return torch.where(noisy, low + share * (high - low), torch.full_like(stds, low))


@dataclass(frozen=True)
class Choice:
    """Of siblings (K, B), each (B,): best and worst index, their softmax gap p_w - p_l, and whether it is kept."""

    winner: Tensor
    loser: Tensor
    gap: Tensor
    kept: Tensor


def choose_pair(scores: Tensor, threshold: Tensor | float) -> Choice:
    """Best against worst of K siblings. scores (K, B); threshold a number or (B,). Kept if p_w - p_l > threshold, where
    p is the softmax over the two scores only."""
    best, winner = scores.max(dim=0)
    worst, loser = scores.min(dim=0)
    probabilities = torch.softmax(torch.stack([best, worst]), dim=0)
    gap = probabilities[0] - probabilities[1]
    return Choice(winner, loser, gap, gap > threshold)
