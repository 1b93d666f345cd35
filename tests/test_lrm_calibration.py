"""The numbers said about an LRM, against oracles written another way: brute force, closed forms, simulation."""

import numpy as np
import pytest

from lpo.calibration import BINS, TEMPERATURE_RANGE, describe, fit_temperature, log_loss


def test_log_loss_is_the_cross_entropy_and_stable() -> None:
    margins, targets = np.array([0.0, 2.0, -1.5, 800.0]), np.array([1.0, 0.3, 0.0, 1.0])
    p = 1 / (1 + np.exp(-margins[:3] / 2))
    wanted = -(targets[:3] * np.log(p) + (1 - targets[:3]) * np.log(1 - p))
    assert log_loss(margins, targets, 2.0)[:3] == pytest.approx(wanted)
    assert log_loss(margins, targets)[0] == pytest.approx(np.log(2)) and log_loss(margins, targets)[3] == 0.0


def test_temperature_recovers_the_scale_that_made_the_labels() -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(size=20_000) * 6
    targets = (rng.random(20_000) < 1 / (1 + np.exp(-margins / 3))).astype(float)
    weights = rng.uniform(0.5, 2, 20_000)
    found = fit_temperature(margins, targets, weights)
    grid = np.linspace(2, 4, 401)
    losses = [(weights * log_loss(margins, targets, t)).sum() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.006)
    assert found == pytest.approx(3, rel=0.05)


def test_temperature_stays_in_its_range() -> None:
    ones = np.ones(3)
    assert fit_temperature(ones, ones, ones) == pytest.approx(TEMPERATURE_RANGE[0], rel=0.2)
    assert fit_temperature(ones, 0 * ones, ones) == pytest.approx(TEMPERATURE_RANGE[1], rel=0.2)
    # a prior keeps three lucky pairs from claiming certainty, and many pairs overrule it
    assert 0.4 < fit_temperature(ones, ones, ones, prior=0.5) < 1
    assert fit_temperature(0 * ones, ones, ones, prior=0.5) == pytest.approx(1.0, abs=1e-6)
    many = np.ones(10_000)
    assert fit_temperature(many, 0.8 * many, many, prior=0.5) == pytest.approx(1 / np.log(4), rel=1e-3)
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature(ones[:0], ones[:0], ones[:0])


def test_describe_against_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    margins, targets = rng.normal(size=60) * 3, rng.choice([0, 0.25, 0.5, 1.0], 60)
    margins[7], targets[7] = 0.0, 1.0
    weights = rng.uniform(0.2, 3, 60)
    found = describe(margins, targets, weights, [f"p{k % 9}" for k in range(60)], temperature=1.7)
    right = seen = loss = 0.0
    bins = [[0.0, 0.0] for _ in range(BINS)]
    for m, y, w in zip(margins, targets, weights, strict=True):
        p = 1 / (1 + np.exp(-m / 1.7))
        loss += -w * (y * np.log(p) + (1 - y) * np.log(1 - p))
        if y != 0.5:
            seen += w
            right += w * (0.5 if m == 0 else float((m > 0) == (y > 0.5)))
        c, f = (p, y) if p >= 0.5 else (1 - p, 1 - y)
        bins[min(int((c - 0.5) * 2 * BINS), BINS - 1)][0] += w * c
        bins[min(int((c - 0.5) * 2 * BINS), BINS - 1)][1] += w * f
    assert found["accuracy"]["value"] == pytest.approx(right / seen)
    assert found["log_loss"]["value"] == pytest.approx(loss / weights.sum())
    assert found["ece"]["value"] == pytest.approx(sum(abs(c - f) for c, f in bins) / weights.sum())
    assert found["prompts"] == 9 and found["pairs"] == 60 and found["decided"] == int((targets != 0.5).sum())
    for name in ("accuracy", "log_loss"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_intervals_widen_with_clusters_and_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    covered, wide, narrow = 0, [], []
    for trial in range(60):
        skill = rng.beta(7, 3, size=40)  # prompts differ, mean 0.7, 6 pairs each
        right = rng.random((40, 6)) < skill[:, None]
        margins, names = np.where(right, 1.0, -1.0).ravel(), [f"p{k // 6}" for k in range(240)]
        ones = np.ones(240)
        by_prompt = describe(margins, ones, ones, names, seed=trial)["accuracy"]
        by_pair = describe(margins, ones, ones, [str(k) for k in range(240)], seed=trial)["accuracy"]
        covered += by_prompt["low"] <= 0.7 <= by_prompt["high"]
        wide.append(by_prompt["high"] - by_prompt["low"])
        narrow.append(by_pair["high"] - by_pair["low"])
    assert covered >= 52 and np.mean(wide) > np.mean(narrow) * 1.03


def test_draws_count_as_parts_of_one_pair() -> None:
    margins, targets, weights, names = np.array([1.0, -2.0, 3.0]), np.array([1, 0.5, 0]), np.ones(3), ["a", "b", "c"]
    once = describe(margins, targets, weights, names)
    thrice = describe(np.repeat(margins[:, None], 3, axis=1), targets, weights, names)
    assert thrice == {**once, **{k: pytest.approx(once[k]) for k in ("accuracy", "log_loss", "ece")}}


def test_nothing_to_measure_and_all_right() -> None:
    empty = describe(np.zeros(0), np.zeros(0), np.zeros(0), [])
    assert empty["accuracy"] == {"value": None, "low": None, "high": None} and empty["pairs"] == 0
    ties = describe(np.ones(2), np.full(2, 0.5), np.ones(2), ["a", "b"])
    assert ties["accuracy"]["value"] is None and ties["log_loss"]["value"] is not None
    perfect = describe(np.ones(20), np.ones(20), np.ones(20), [str(k) for k in range(20)])["accuracy"]
    assert perfect["value"] == 1.0 and 0.8 < perfect["low"] < 0.9 and perfect["high"] == 1.0


def test_one_prompt_alone_is_not_sure_of_itself() -> None:
    """Its pairs resemble each other, and there is no other prompt to draw instead."""
    found = describe(np.array([1.0, -1.0, 1.0]), np.ones(3), np.ones(3), ["a"] * 3)
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["accuracy"]["low"] < 0.15 and found["accuracy"]["high"] > 0.95
    assert found["log_loss"]["low"] is None and found["ece"]["high"] is None


def test_a_handful_of_pairs_may_give_a_value_without_an_interval() -> None:
    """The one resample may hold nothing but the tie; an evaluation while training asks for no resample at all."""
    margins, targets, weights, prompts = [1.0, 2.0, 3.0], [0.5, 0.5, 1.0], [1.0] * 3, ["a", "b", "c"]
    for resamples, seeds in ((1, range(30)), (0, [0])):
        for seed in seeds:
            found = describe(margins, targets, weights, prompts, resamples=resamples, seed=seed)
            assert found["accuracy"]["value"] == 1.0
    assert found["log_loss"] == {"value": found["log_loss"]["value"], "low": None, "high": None}
