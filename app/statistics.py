"""What a handful of votes proves: win rates with honest intervals, and words for them.

Everything here is a pure function of arrays and lists (numpy only), so that the compare tab, the study
and the tests share one arithmetic. Three rules hold throughout:

* a tie is half a win for either side, and so is "both bad": neither picture was preferred; a skip is no vote;
* votes on one prompt resemble each other, so the *prompt* is the unit that is resampled or bet on, never the vote;
* an interval for a number of votes fixed beforehand (`win_rate`) and one that may be looked at after
  every vote (`win_rate_peeking`) are different things, and the result says which one it is.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
FEW_PROMPTS = 10  # under this many prompts the verdict says that the sample is too small, whatever the interval
PRACTICALLY_EQUAL = 0.05  # an interval within 0.5 +- this is called "practically equal"
PLUS_FOUR = (1.0, 1.0, 0.0, 0.0)  # two imaginary prompts won and two lost, see `win_rate`

OUTCOME_VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
OUTCOMES = (*OUTCOME_VALUES, "skip")


class StatisticsError(ValueError):
    """The input cannot be summarised; the message is one sentence for the page."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval: `value` in the unit of the data, `low` <= `value` <= `high`, `prompts` clusters."""

    value: float
    low: float
    high: float
    count: int
    prompts: int


@dataclass(frozen=True)
class WinRate:
    """Votes of A against B. `rate`, `low`, `high` in [0, 1] are A's wins + ties / 2 over all votes but skips.

    `method` is "fixed" (valid for a number of votes fixed beforehand) or "peeking" (valid at any time, as often
    as one looks). `counted` is the number of prompts behind the interval: with "peeking" only completed ones.
    """

    wins: int
    ties: int
    losses: int
    both_bad: int
    skipped: int
    prompts: int
    counted: int
    rate: float
    low: float
    high: float
    method: str

    @property
    def votes(self) -> int:
        """Votes that count: everything but skips."""
        return self.wins + self.ties + self.losses + self.both_bad

    @property
    def decided(self) -> bool:
        """True when the interval leaves out one half, i.e. a draw."""
        return self.low > 0.5 or self.high < 0.5


def win_rate(votes: Sequence[tuple[Hashable, str]], level: float = LEVEL, draws: int = 4000, seed: int = 0) -> WinRate:
    """Win rate of A with a bootstrap interval over prompts, for a number of votes fixed beforehand.

    `votes` are (prompt, outcome) with outcome "a", "b", "tie", "both_bad" or "skip". Whole prompts are drawn with
    replacement (the cluster bootstrap; Davison & Hinkley, *Bootstrap Methods and their Application*, 1997, 3.8).
    Four imaginary prompts, two won and two lost, join the draw (Agresti & Coull 1998, "Approximate is better than
    'exact'"): without them five wins out of five would give the interval [1, 1]. They move the interval only,
    never `rate`. No votes: rate 0.5 in [0, 1].
    """
    order, values = _by_prompt(votes)
    counts = _counts(votes)
    if not order:
        return WinRate(**counts, prompts=0, counted=0, rate=0.5, low=0.0, high=1.0, method="fixed")
    sums = np.array([sum(values[p]) for p in order])
    sizes = np.array([len(values[p]) for p in order], dtype=float)
    rate = float(sums.sum() / sizes.sum())
    imaginary = np.array(PLUS_FOUR) * sizes.mean()
    low, high = _ratio_bootstrap(
        np.concatenate([sums, imaginary]),
        np.concatenate([sizes, np.full(len(PLUS_FOUR), sizes.mean())]),
        level,
        draws,
        seed,
    )
    return WinRate(
        **counts,
        prompts=len(order),
        counted=len(order),
        rate=rate,
        low=min(low, rate),
        high=max(high, rate),
        method="fixed",
    )


def win_rate_peeking(
    votes: Sequence[tuple[Hashable, str]], complete: Sequence[Hashable], level: float = LEVEL
) -> WinRate:
    """Win rate of A with an interval that stays valid however often one looks and whenever one stops.

    `complete` lists, in the order fixed by the plan, the prompts whose pairs have all been voted on. One prompt is one
    bet on its mean outcome, so that votes on one prompt may depend on each other; votes on prompts that
    are not complete enter the counts and `rate`, not the interval. Interval: `betting_interval`.
    """
    order, values = _by_prompt(votes)
    means = [float(np.mean(values[p])) for p in complete if p in values]
    low, high = betting_interval(means, level)
    everything = [v for p in order for v in values[p]]
    rate = float(np.mean(everything)) if everything else 0.5
    return WinRate(
        **_counts(votes), prompts=len(order), counted=len(means), rate=rate, low=low, high=high, method="peeking"
    )


def betting_interval(values: Sequence[float], level: float = LEVEL, grid: int = 1000) -> tuple[float, float]:
    """Time-uniform confidence interval for the mean of independent values in [0, 1], after the last of them.

    The hedged capital process of Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting"
    (JRSS-B 2024, arXiv 2010.09686), Theorem 3, with their predictable plug-in bets: somebody who believes that the
    mean is m cannot, whatever the time, have lost 1 / (1 - level) times the stake with probability above 1 - level
    (Ville's inequality); every m that has lost so much is dropped for good. Intersected over time; widened by
    one grid step to either side, because only `grid` + 1 values of m are tried. No values: (0, 1).
    """
    x = np.asarray(values, dtype=float)
    if x.size and not (np.all(x >= 0) and np.all(x <= 1)):
        raise StatisticsError(f"Outcomes must lie between 0 and 1, got {x.min():g} to {x.max():g}.")
    alpha = 1.0 - level
    m = np.linspace(0.0, 1.0, grid + 1)
    log_up = np.zeros_like(m)  # capital of the bet "the mean is above m"
    log_down = np.zeros_like(m)
    kept = np.ones_like(m, dtype=bool)
    total, spread = 0.5, 0.25  # regularised sums, so that the first bet needs no data
    with np.errstate(divide="ignore"):
        cap_up, cap_down = 0.5 / m, 0.5 / (1.0 - m)
        for t, value in enumerate(x, start=1):
            variance = spread / t  # of the t - 1 values seen before this bet
            bet = np.sqrt(2.0 * np.log(2.0 / alpha) / (variance * t * np.log1p(t)))
            log_up += np.log1p(np.minimum(bet, cap_up) * (value - m))
            log_down += np.log1p(-np.minimum(bet, cap_down) * (value - m))
            # max(up / 2, down / 2) < 1 / alpha keeps m
            kept &= np.maximum(log_up, log_down) + np.log(0.5) < np.log(1.0 / alpha)
            total += value
            spread += (value - total / (t + 1)) ** 2
    inside = np.flatnonzero(kept)
    if inside.size == 0:  # only when the values contradict one fixed mean; the honest answer is the last estimate
        mean = float(x.mean())
        return mean, mean
    return max(0.0, float(m[inside[0]]) - 1.0 / grid), min(1.0, float(m[inside[-1]]) + 1.0 / grid)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    prompts: Sequence[Hashable],
    level: float = LEVEL,
    draws: int = 4000,
    seed: int = 0,
) -> Estimate:
    """Mean of a - b over pictures that share prompt and seed, with a bootstrap interval over prompts.

    `a`, `b`: scores (N,) of the two policies for the same (prompt, seed); `prompts` (N,) names each one's prompt.
    """
    if not len(a) == len(b) == len(prompts):
        raise StatisticsError(f"Paired scores need equal lengths, got {len(a)}, {len(b)} and {len(prompts)} prompts.")
    if not len(a):
        raise StatisticsError("There are no paired scores to compare.")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return clustered_mean(difference, prompts, level, draws, seed)


def clustered_mean(
    values: Sequence[float], prompts: Sequence[Hashable], level: float = LEVEL, draws: int = 4000, seed: int = 0
) -> Estimate:
    """Mean of `values` (N,) with a percentile bootstrap interval over prompts; no imaginary prompts, any unit."""
    data = np.asarray(values, dtype=float)
    if not np.all(np.isfinite(data)):
        raise StatisticsError("Scores must be finite numbers, but some are not.")
    names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
    index = np.array([names[p] for p in prompts])
    sums = np.bincount(index, weights=data, minlength=len(names))
    sizes = np.bincount(index, minlength=len(names)).astype(float)
    low, high = _ratio_bootstrap(sums, sizes, level, draws, seed)
    return Estimate(float(data.mean()), low, high, len(data), len(names))


def in_words(result: WinRate, a: str = "A", b: str = "B") -> str:
    """Say in plain words whether `result` is evidence, and for which of the two policies named `a` and `b`."""
    if result.votes == 0:
        return "No votes yet, so nothing can be said."
    better, worse, rate, low, high = a, b, result.rate, result.low, result.high
    if rate < 0.5:
        better, worse, rate, low, high = b, a, 1 - rate, 1 - high, 1 - low
    span = f"95 % interval {percent(low)} to {percent(high)}"
    if result.counted < FEW_PROMPTS:
        number = f"{result.counted} prompt{'s' if result.counted != 1 else ''}"
        return (
            f"Too few to tell: the votes cover only {number}. "
            f"{_share(better, rate)} ({span}); vote on {FEW_PROMPTS} prompts or more."
        )
    if low > 0.5:
        strength = "Strong evidence" if low > 0.6 else "Evidence"
        return f"{strength} that {better} is preferred to {worse}: {_share(better, rate)} ({span}, all above 50 %)."
    if low > 0.5 - PRACTICALLY_EQUAL and high < 0.5 + PRACTICALLY_EQUAL:
        return f"Practically equal: {_share(better, rate)} ({span})."
    needed = votes_needed(rate, result.votes / max(result.counted, 1))
    return (
        f"No evidence either way: {_share(better, rate)}, but the {span} contains 50 %, so chance explains this. "
        + (f"If the true share is {percent(rate)}, about {needed} votes would show it." if needed else "")
    ).strip()


def votes_needed(rate: float, votes_per_prompt: float = 1.0) -> int | None:
    """Votes for an 80 % chance that the interval leaves out one half if the true share is `rate`; None near 0.5.

    The usual normal approximation ((z_0.975 * 0.5 + z_0.8 * sqrt(p (1 - p))) / (p - 0.5))^2, in prompts, times the
    votes per prompt (as if votes on one prompt added nothing: cautious).
    """
    gap = abs(rate - 0.5)
    if gap < 0.02:
        return None
    prompts = ((1.96 * 0.5 + 0.84 * float(np.sqrt(rate * (1 - rate)))) / gap) ** 2
    return int(np.ceil(prompts * votes_per_prompt))


def percent(share: float) -> str:
    """A share in [0, 1] as words for a page: 0.634 -> '63 %'."""
    return f"{100 * share:.0f} %"


def _share(name: str, rate: float) -> str:
    return f"{name} takes {percent(rate)} of the votes, ties counted half"


def _counts(votes: Sequence[tuple[Hashable, str]]) -> dict[str, int]:
    outcomes = [outcome for _, outcome in votes]
    unknown = sorted(set(outcomes) - set(OUTCOMES))
    if unknown:
        raise StatisticsError(f"Unknown outcome {unknown[0]!r}; allowed are {', '.join(OUTCOMES)}.")
    return {
        "wins": outcomes.count("a"),
        "ties": outcomes.count("tie"),
        "losses": outcomes.count("b"),
        "both_bad": outcomes.count("both_bad"),
        "skipped": outcomes.count("skip"),
    }


def _by_prompt(votes: Sequence[tuple[Hashable, str]]) -> tuple[list[Hashable], dict[Hashable, list[float]]]:
    """Prompts in order of their first counted vote, and each one's outcome values in [0, 1]; skips left out."""
    values: dict[Hashable, list[float]] = {}
    for prompt, outcome in votes:
        if outcome in OUTCOME_VALUES:
            values.setdefault(prompt, []).append(OUTCOME_VALUES[outcome])
    return list(values), values


def _ratio_bootstrap(sums: np.ndarray, sizes: np.ndarray, level: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(sizes) when the clusters (C,) are drawn with replacement."""
    clusters = len(sums)
    weights = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1.0 / clusters), size=draws)
    means = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
