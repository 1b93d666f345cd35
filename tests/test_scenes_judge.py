"""The judge: right on fresh renderings, honest about what cannot be read, fair in matching claims with objects."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpo.scenes.evaluate import interval, spoilt
from lpo.scenes.judge import Seen, compare, judge, read, simulated_vote, style_score, truth
from lpo.scenes.world import parse_caption, render, sample_scene

DATA = Path(__file__).parent / "data"


def claims_of(text: str, layout: str, *things: tuple[str, str, str], background: str = "night"):
    return compare(parse_caption(text), Seen(layout, things, background))


def test_claims_are_matched_with_objects() -> None:
    red, blue = ("ball", "red", "small"), ("star", "blue", "large")
    text = "a small red ball to the left of a large blue star at night"
    assert claims_of(text, "row", red, blue).score == 1
    turned = claims_of(text, "row", blue, red)
    assert [k for k, v in turned.found.items() if not v] == ["relation"]
    swapped = claims_of(text, "row", ("ball", "blue", "small"), ("star", "red", "large"))
    assert [k for k, v in swapped.found.items() if not v] == ["colour1", "colour2"]
    assert claims_of(text, "column", red, blue).found["relation"] is False
    alone = claims_of(text, "single", blue, background="sea")
    assert sum(alone.found.values()) == 3 and not alone.found["relation"] and not alone.found["background"]
    assert claims_of(text, "none").score == pytest.approx(1 / 8)
    above = "a red ball above a blue star"
    assert claims_of(above, "column", red, blue).score == 1 and claims_of(above, "column", blue, red).score == 4 / 5
    assert claims_of("a blue star under a red ball", "column", red, blue).score == 1
    unsure = claims_of("a red ball", "single", ("unreadable", "red", "small"))
    assert unsure.unreadable == ("shape1",) and unsure.score == 0.5


@pytest.mark.parametrize(("sigma", "noise"), [(0, 0), (0.7, 0), (0, 4), (0.7, 4)])
def test_reads_fresh_renderings(sigma: float, noise: float) -> None:
    rng = np.random.default_rng(123)
    right: dict[str, list[bool]] = {k: [] for k in ("layout", "background", "shape", "colour", "size")}
    styles = []
    for _ in range(200):
        scene = sample_scene(rng)
        picture = spoilt(render(scene), sigma, noise, rng)
        seen, real = read(picture), truth(scene)
        right["layout"].append(seen.layout == real.layout)
        right["background"].append(seen.background == real.background)
        for got, want in zip(seen.objects, real.objects, strict=False):
            for kind, a, b in zip(("shape", "colour", "size"), got, want, strict=True):
                right[kind].append(a == b)
        styles.append((scene.style, style_score(picture)))
    assert {k: np.mean(v) for k, v in right.items() if np.mean(v) < 0.97} == {}
    assert np.corrcoef(np.array(styles).T)[0, 1] > 0.95


def test_says_unreadable_of_ruins() -> None:
    rng = np.random.default_rng(9)
    unread = 0
    for _ in range(60):
        a, b = sample_scene(rng, objects=1), sample_scene(rng, objects=1)
        ghost = Image.blend(render(a), render(b), 0.5)
        unread += a.objects[0].shape == b.objects[0].shape or any(t[0] == "unreadable" for t in read(ghost).objects)
    assert unread >= 42


def test_simulated_votes_follow_the_taste() -> None:
    rng = np.random.default_rng(4)
    scene = sample_scene(rng, objects=1)
    other = sample_scene(rng, objects=1)
    text = f"a {scene.objects[0].colour} {scene.objects[0].shape}"
    while (other.objects[0].colour, other.objects[0].shape) == (scene.objects[0].colour, scene.objects[0].shape):
        other = sample_scene(rng, objects=1)
    good, bad = render(scene), render(other)
    assert judge(good, text).score > judge(bad, text).score
    votes = Counter(simulated_vote("alignment", good, bad, text, rng, noise=0) for _ in range(20))
    assert votes == {"first": 20}
    assert simulated_vote("alignment", bad, good, text, rng, noise=0) == "second"
    assert simulated_vote("alignment", good, good, text, rng, noise=0) == "tie"
    noisy = Counter(simulated_vote("alignment", good, bad, text, rng, noise=0.5) for _ in range(200))
    assert 25 < noisy["second"] < 80 and not noisy["tie"]
    dull, vivid = (render(type(scene)(scene.background, scene.objects, None, s, 1)) for s in (0.1, 0.9))
    assert simulated_vote("style", dull, vivid, text, rng, noise=0) == "second"
    with pytest.raises(ValueError, match="use 'alignment' or 'style'"):
        simulated_vote("beauty", good, bad, text, rng)


def test_agrees_with_the_eye_on_generated_pictures() -> None:
    labels = json.loads((DATA / "scenes_by_eye.json").read_text())
    sheet, agree = Image.open(DATA / "scenes_by_eye.png").convert("RGB"), {}
    for i, entry in enumerate(labels["pictures"]):
        box = (i % 10 * 64, i // 10 * 64, i % 10 * 64 + 64, i // 10 * 64 + 64)
        seen = Seen(entry["layout"], tuple(map(tuple, entry["objects"])), entry["background"])
        found = judge(sheet.crop(box), entry["prompt"]).found
        for name, here in compare(parse_caption(entry["prompt"]), seen).found.items():
            agree.setdefault(name.rstrip("12"), []).append(found[name] == here)
    assert len(labels["pictures"]) == 100
    rates = {k: float(np.mean(v)) for k, v in agree.items()}
    assert rates == pytest.approx(labels["agreement"], abs=0.011), rates
    assert np.mean([x for v in agree.values() for x in v]) >= 0.9


def test_intervals_contain_the_mean() -> None:
    groups = [[1.0, 0.0], [1.0], [0.0, 0.0, 1.0], [1.0, 1.0]]
    mean, low, high = interval(groups)
    assert mean == pytest.approx(5 / 8) and low <= mean <= high


def test_world_and_judge_import_no_torch() -> None:
    code = "import sys, lpo.scenes.world, lpo.scenes.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
