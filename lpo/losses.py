"""The two losses of the method. Pure tensor functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_loss(
    first: Tensor, second: Tensor, target: Tensor, weight: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """LRM loss: cross-entropy between softmax([first, second]) and [target, 1 - target], weighted mean over pairs.

    first, second (B,) scores; target (B,) = P(first is chosen), 0.5 for a tie; weight (B,) or None for equal weights.
    `total` is the sum of all weights where these pairs are a part of the batch: the parts' losses then add up to it.
    A tie has log 2 subtracted, as in the official code: its lowest possible value is then 0 (gradients are unchanged).
    """
    margin = first - second
    loss = -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin))
    loss = torch.where(target == 0.5, loss - math.log(2), loss)
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / (weight.sum() if total is None else total)


@dataclass(frozen=True)
class LPOTerms:
    """The parts of the LPO loss, each (B,): `loss` before weighting, `margin` = log_ratio winner - loser after
    the clamp (times beta inside the loss), the raw ratios, and whether each lies outside the clamp."""

    loss: Tensor
    margin: Tensor
    ratio_winner: Tensor
    ratio_loser: Tensor
    clamped_winner: Tensor
    clamped_loser: Tensor


def lpo_loss(log_ratio_winner: Tensor, log_ratio_loser: Tensor, beta: float, clamp: float) -> LPOTerms:
    """LPO loss per pair: -log sigmoid(beta (log r_w - log r_l)), with r = exp(log_ratio) clamped to 1 +- clamp.

    log_ratio = log p_policy - log p_reference of x_{t-1}, (B,), averaged over C, H, W. clamp 0 switches clamping off.
    The clamp is applied to the log-ratio, between log(1 - clamp) and log(1 + clamp): the same values and gradients as
    log(clamp(exp(log_ratio))), without the round trip.
    """
    low, high = (math.log1p(-clamp), math.log1p(clamp)) if clamp else (-math.inf, math.inf)
    margin = log_ratio_winner.clamp(low, high) - log_ratio_loser.clamp(low, high)
    outside = [(r < low) | (r > high) for r in (log_ratio_winner.detach(), log_ratio_loser.detach())]
    return LPOTerms(
        -F.logsigmoid(beta * margin), margin, log_ratio_winner.exp(), log_ratio_loser.exp(), outside[0], outside[1]
    )
