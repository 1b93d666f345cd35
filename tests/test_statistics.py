"""Intervals are judged by what they promise: coverage, under peeking too, and by hand-computed small cases."""

import math
from itertools import pairwise, product

import numpy as np
import pytest

from app import statistics as st


def votes_of(string: str, per_prompt: int = 1) -> list[tuple[int, str]]:
    """'aabt' -> votes on prompts 0, 1, 2, ...; t tie, x both bad, s skip."""
    names = {"a": "a", "b": "b", "t": "tie", "x": "both_bad", "s": "skip"}
    return [(i // per_prompt, names[c]) for i, c in enumerate(string)]


def test_counts_and_rate_by_hand():
    result = st.win_rate(votes_of("aaabtxs"))
    assert (result.wins, result.losses, result.ties, result.both_bad, result.skipped) == (3, 1, 1, 1, 1)
    assert result.votes == 6 and result.prompts == 6
    assert result.rate == pytest.approx((3 + 0.5 + 0.5) / 6)
    assert result.low < result.rate < result.high


def test_swapping_sides_mirrors_the_interval():
    swap = str.maketrans("ab", "ba")
    string = "aaabtaabxaabbaatab"
    one, two = st.win_rate(votes_of(string), draws=40000), st.win_rate(votes_of(string.translate(swap)), draws=40000)
    assert one.rate == pytest.approx(1 - two.rate)
    assert one.low == pytest.approx(1 - two.high, abs=0.03)
    low, high = st.betting_interval([1, 1, 0, 1, 0.5, 1])
    mirrored = st.betting_interval([0, 0, 1, 0, 0.5, 0])
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)


def test_bootstrap_agrees_with_full_enumeration():
    """Three clusters: all 27 equally likely resamples can be listed."""
    values, prompts = [1.0, 0.0, 0.0, 2.0, 4.0, 3.0], [0, 0, 0, 1, 1, 2]
    sums, sizes = np.array([1.0, 6.0, 3.0]), np.array([3.0, 2.0, 1.0])
    exact = np.array([sums[list(i)].sum() / sizes[list(i)].sum() for i in product(range(3), repeat=3)])
    got = st.clustered_mean(values, prompts, draws=200_000)
    assert got.value == pytest.approx(np.mean(values))
    assert got.low == pytest.approx(np.quantile(exact, 0.025, method="inverted_cdf"), abs=1e-9)
    assert got.high == pytest.approx(np.quantile(exact, 0.975, method="inverted_cdf"), abs=1e-9)
    assert (got.count, got.prompts) == (6, 3)


@pytest.mark.parametrize(("p", "prompts", "per_prompt"), [(0.5, 12, 1), (0.8, 12, 3), (0.95, 20, 2), (0.6, 60, 2)])
def test_fixed_interval_covers_when_votes_of_a_prompt_are_the_same_opinion(p, prompts, per_prompt):
    """The hardest clustering: every vote on a prompt repeats the first. Unclustered intervals fail here."""
    rng, hits, repeats = np.random.default_rng(5), 0, 400
    for _ in range(repeats):
        string = "".join(("a" if rng.random() < p else "b") * per_prompt for _ in range(prompts))
        result = st.win_rate(votes_of(string, per_prompt), draws=500)
        hits += result.low <= p <= result.high
    assert hits / repeats >= 0.93


def test_all_wins_do_not_give_certainty():
    result = st.win_rate(votes_of("a" * 12))
    assert result.rate == 1.0 and result.high == 1.0
    assert 0.5 < result.low < 0.9


@pytest.mark.parametrize("p", [0.5, 0.7, 0.95])
def test_peeking_interval_is_never_wrong_more_often_than_promised(p):
    """Looks after each of 150 values; the true mean may be left out at *any* look in at most 5 % of the runs.

    The fixed interval, looked at in the same way, fails this by far: that is why there are two.
    """
    rng, repeats, looks = np.random.default_rng(11), 250, range(1, 151)
    wrong = naive = 0
    for _ in range(repeats):
        x = (rng.random(150) < p).astype(float)
        low, high = st.betting_interval(x)  # intersected over time: a miss at any look stays a miss
        wrong += not low <= p <= high
        mean = np.cumsum(x) / np.array(looks)
        half = 1.96 * np.sqrt(np.maximum(mean * (1 - mean), 1e-12) / np.array(looks))
        naive += bool(np.any(np.abs(mean - p)[9:] > half[9:]))
    assert wrong / repeats <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / repeats)
    assert naive / repeats > 0.15


def test_betting_interval_shrinks_only_and_finds_the_mean():
    x = (np.random.default_rng(0).random(400) < 0.7).astype(float)
    spans = [st.betting_interval(x[:n]) for n in (0, 5, 50, 400)]
    assert spans[0] == (0.0, 1.0)
    for (low, high), (next_low, next_high) in pairwise(spans):
        assert next_low >= low and next_high <= high
    assert spans[-1][0] < x.mean() < spans[-1][1] and spans[-1][1] - spans[-1][0] < 0.25


def test_betting_interval_first_bet_by_hand():
    """One win: m survives iff (1 + bet (1 - m)) / 2 < 20; the bet is capped at 1 / (2 m), so all m near 0 and ..."""
    low, high = st.betting_interval([1.0], grid=10_000)
    bet = math.sqrt(2 * math.log(40) / (0.25 * 1 * math.log(2)))
    survives = [m for m in np.linspace(0, 1, 10_001) if (1 + min(bet, 0.5 / m if m else math.inf) * (1 - m)) / 2 < 20]
    assert low == pytest.approx(max(0.0, min(survives) - 1e-4), abs=1e-9)
    assert high == 1.0


def test_peeking_counts_complete_prompts_only():
    votes = votes_of("aabbaa", per_prompt=2)
    result = st.win_rate_peeking(votes, complete=[0, 1])
    assert (result.prompts, result.counted, result.method) == (3, 2, "peeking")
    assert (result.low, result.high) == st.betting_interval([1.0, 0.0])
    assert result.rate == pytest.approx(4 / 6)


def test_paired_difference_clusters():
    rng = np.random.default_rng(3)
    effect = np.repeat(rng.normal(0.5, 1.0, 40), 4)  # one effect per prompt, four seeds
    noise = rng.normal(0, 5, 160)
    got = st.paired_difference(noise + effect, noise, np.repeat(np.arange(40), 4))
    assert got.value == pytest.approx(effect.mean())
    # the standard error of 40 effects, not of 160
    expected = 1.96 * effect[::4].std(ddof=1) / math.sqrt(40)
    assert (got.high - got.low) / 2 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("string", "words"),
    [
        ("", "No votes yet"),
        ("aaaa", "Too few to tell"),
        ("a" * 40 + "b" * 4, "Strong evidence that new is preferred to old"),
        ("b" * 40 + "a" * 4, "Strong evidence that old is preferred to new"),
        ("a" * 30 + "b" * 14, "Evidence that new is preferred to old"),
        ("ab" * 20 + "aa", "No evidence either way"),
        ("t" * 400, "Practically equal"),
    ],
)
def test_plain_words(string, words):
    assert st.in_words(st.win_rate(votes_of(string)), "new", "old").startswith(words)


def test_bad_input_is_one_sentence():
    with pytest.raises(st.StatisticsError, match="Unknown outcome 'left'; allowed are"):
        st.win_rate([(0, "left")])
    with pytest.raises(st.StatisticsError, match="between 0 and 1"):
        st.betting_interval([2.0])
    with pytest.raises(st.StatisticsError, match="equal lengths"):
        st.paired_difference([1.0], [1.0, 2.0], [0])
    with pytest.raises(st.StatisticsError, match="no paired scores"):
        st.paired_difference([], [], [])
    with pytest.raises(st.StatisticsError, match="finite"):
        st.clustered_mean([math.nan], [0])
