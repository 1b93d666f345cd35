"""How good a latent reward model is, said honestly: temperature, accuracy, log-loss, calibration error, intervals.

Works on margins (score of the first picture minus score of the second) and targets (P(first is chosen)), as plain
numpy arrays; it knows no model. Everything that has an interval is a ratio of sums over pairs, so the cluster
bootstrap needs only the sums of each prompt: pairs of one prompt are not independent, prompts are.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TEMPERATURE_RANGE = (0.02, 50.0)
BINS = 5  # of the confidence max(p, 1 - p), equal width over [0.5, 1]: few, since held-out labels are few


@dataclass(frozen=True)
class Estimate:
    """A value with a two-sided bootstrap interval. All are None where there is nothing to measure, the interval alone
    where there are too few prompts for one."""

    value: float | None
    low: float | None
    high: float | None


def log_loss(margins: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(N,) nats a pair: cross-entropy of sigmoid(margin / temperature) against the target; ln 2 = knows nothing."""
    scaled = margins / temperature
    return np.logaddexp(0.0, scaled) - targets * scaled


def fit_temperature(margins: np.ndarray, targets: np.ndarray, weights: np.ndarray, prior: float = math.inf) -> float:
    """The temperature T in TEMPERATURE_RANGE that minimises the weighted log-loss of sigmoid(margin / T).

    (Guo et al. 2017, "On Calibration of Modern Neural Networks", for a pair instead of a class.) `prior` is the
    standard deviation of a normal prior on ln T around 0, in the units of `weights`: with a handful of calibration
    pairs that are all right, or all wrong, the likelihood alone would run to an end of the range.
    """
    margins, targets, weights = (np.asarray(one, dtype=np.float64).reshape(-1) for one in (margins, targets, weights))
    if len(margins) == 0:
        raise ValueError("A temperature needs at least one calibration pair.")

    def cost(log_t: float) -> float:
        return float(weights @ log_loss(margins, targets, math.exp(log_t))) + (log_t / prior) ** 2 / 2

    low, high = (math.log(edge) for edge in TEMPERATURE_RANGE)
    grid = np.linspace(low, high, 40)
    best = int(np.argmin([cost(one) for one in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    for _ in range(60):  # ternary search inside the bracket
        third = (high - low) / 3
        low, high = (low, high - third) if cost(low + third) <= cost(high - third) else (low + third, high)
    return math.exp((low + high) / 2)


def describe(margins: np.ndarray, targets: np.ndarray, weights: np.ndarray, prompts: Sequence[str],
             temperature: float = 1.0, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Accuracy, log-loss and expected calibration error of N pairs with intervals, ready for JSON.

    margins, targets, weights: (N,) or (N, D) with D noise draws of the same pair; a draw is a D-th of its pair.
    - accuracy: weighted share of pairs whose chosen picture has the higher score; a tie in the labels (target 0.5)
      is left out, equal scores count half, a soft label counts as its majority.
    - log_loss: nats a pair, of sigmoid(margin / temperature), ties included.
    - ece: sum over BINS of |mean P - mean target| for the side that the model favours, weighted by the bin's share.
    Intervals: percentiles of a bootstrap that resamples prompts, None for a single one. Where every prompt agrees (0 or
    1), or one alone decided, it would have no width: accuracy then has the Wilson interval of that many prompts.
    `resamples` 0: no intervals.
    """
    margins = np.asarray(margins, dtype=np.float64)
    draws = margins.shape[1] if margins.ndim == 2 else 1
    margins = margins.reshape(-1)
    targets, weights = (np.repeat(np.asarray(one, dtype=np.float64), draws) for one in (targets, weights))
    _, cluster = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    n = int(cluster.max()) + 1 if len(cluster) else 0
    cluster = np.repeat(cluster, draws)
    weights = weights / draws

    counts = weights * (targets != 0.5)
    correct = counts * np.where(margins == 0, 0.5, (margins > 0) == (targets > 0.5))
    loss = weights * log_loss(margins, targets, temperature)
    p = np.exp(-np.logaddexp(0.0, -margins / temperature))  # the sigmoid, without overflow
    confidence = np.maximum(p, 1 - p)
    favoured = np.where(p >= 0.5, targets, 1 - targets)
    bins = np.minimum((confidence - 0.5) / 0.5 * BINS, BINS - 1).astype(int)

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(cluster, weights=values, minlength=n)

    gap = np.stack([per_prompt(weights * (confidence - favoured) * (bins == b)) for b in range(BINS)], axis=-1)
    total = per_prompt(weights)
    rng = np.random.default_rng(seed)
    picks = rng.multinomial(n, np.full(n, 1 / n), size=resamples) if n > 1 else np.zeros((0, n))
    accuracy = _ratio(per_prompt(correct), per_prompt(counts), picks, level)
    decided = int((per_prompt(counts) > 0).sum())
    if accuracy.value in (0.0, 1.0) or decided == 1:
        accuracy = Estimate(accuracy.value, *wilson(accuracy.value, decided))
    return {"pairs": len(targets) // draws, "decided": int((counts > 0).sum()) // draws, "prompts": n,
            "accuracy": asdict(accuracy), "log_loss": asdict(_ratio(per_prompt(loss), total, picks, level)),
            "ece": asdict(_ratio(gap, total, picks, level))}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share in [0, 1] of n independent observations."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return min(low, share), max(high, share)  # at 0 and 1 rounding would leave it outside


def _ratio(top: np.ndarray, bottom: np.ndarray, picks: np.ndarray, level: float) -> Estimate:
    """sum(top) / sum(bottom) with its interval. top (n,) or (n, BINS), whose columns' sums count by their size; bottom
    (n,); picks (resamples, n): how often each of n prompts was drawn."""
    if bottom.sum() <= 0:
        return Estimate(None, None, None)
    below = picks @ bottom
    above = picks @ top
    above = np.abs(above).sum(-1) if above.ndim == 2 else above
    whole = np.abs(top.sum(0)).sum() if top.ndim == 2 else top.sum()
    value = float(whole / bottom.sum())
    if not (below > 0).any():  # no interval was asked for, or every resample drew nothing but ties
        return Estimate(value, None, None)
    tails = ((1 - level) / 2 * 100, (1 + level) / 2 * 100)
    low, high = np.percentile(above[below > 0] / below[below > 0], tails)
    return Estimate(value, float(low), float(high))
