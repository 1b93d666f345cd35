"""Reads a picture and says which of a prompt's claims are there: the simulated annotator's eyes.

A small convolutional network (weights in `weights/judge.npz`, trained by `python -m lpo.scenes.judge_train` on blurred,
noised, bent and spoilt renderings) names layout, background and, for one or two objects, shape, colour and size. What
it is not sure of is *unreadable* and counts as wrong. It runs in numpy, so any process may ask it. It is never a
reward: only tests and studies use it, as a simulated annotator whose labels are marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lpo.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Attributes, Scene, parse_caption

WEIGHTS = Path(__file__).parent / "weights" / "judge.npz"
LAYOUTS = ("none", "single", "row", "column")
HEADS = {
    "layout": LAYOUTS,
    "background": (*BACKGROUNDS, "unreadable"),
    **{f"shape{i}": (*SHAPES, "unreadable") for i in (1, 2)},
    **{f"colour{i}": (*COLOURS, "unreadable") for i in (1, 2)},
    **{f"size{i}": SIZES for i in (1, 2)},
}
CONFIDENCE = {"layout": 0.5, "background": 0.5, "shape": 0.6, "colour": 0.5, "size": 0.5}
SLOTS = {"none": 0, "single": 1, "row": 2, "column": 2}
RELATION_OF = {("row", True): "left of", ("row", False): "right of", ("column", True): "above", ("column", False): "below"}


@dataclass(frozen=True)
class Seen:
    """What a picture shows; objects are (shape, colour, size), left to right or top to bottom.

    Each entry may be 'unreadable'. layout: none, single, row or column.
    """

    layout: str
    objects: tuple[tuple[str, str, str], ...]
    background: str


@dataclass(frozen=True)
class Verdict:
    """The judge's answer for one picture and prompt.

    `found` maps each claimed attribute (shape1, colour1, size1, shape2, ..., relation, background) to whether it is
    there; `unreadable` lists the claims it could not read, which count as wrong.
    """

    found: dict[str, bool]
    unreadable: tuple[str, ...]
    seen: Seen

    @property
    def score(self) -> float:
        """Fraction of the claimed attributes that are there, in [0, 1]."""
        return sum(self.found.values()) / len(self.found)


def truth(scene: Scene) -> Seen:
    """What a perfect judge sees in a rendering of `scene`."""
    layout = {None: "single", "left of": "row", "right of": "row", "above": "column", "below": "column"}[scene.relation]
    things = sorted(scene.objects, key=lambda o: o.x if layout == "row" else o.y)
    return Seen(layout, tuple((o.shape, o.colour, o.size) for o in things), scene.background)


def compare(claims: Attributes, seen: Seen) -> Verdict:
    """Checks every claim against what is seen.

    Claimed objects are matched with seen ones so that most attributes agree (the claimed order first among equals), so
    'red ball left of blue star' drawn the wrong way round has both objects and a wrong relation.
    """
    order = range(len(seen.objects))
    if len(claims.objects) == 1:
        matches = [(i,) for i in order] or [(None,)]
    else:
        pairs = [(i, j) for i in order for j in order if i != j]
        matches = pairs or [(i, None) for i in order] + [(None, i) for i in order] or [(None, None)]
    if claims.relation in ("right of", "below"):
        matches = matches[::-1]
    best = max((_check(claims, seen, match) for match in matches), key=lambda verdict: sum(verdict.found.values()))
    return best


def _check(claims: Attributes, seen: Seen, match: tuple[int | None, ...]) -> Verdict:
    found: dict[str, bool] = {}
    unreadable: list[str] = []

    def answer(name: str, wanted: str | None, got: str) -> None:
        if wanted is not None:
            found[name] = wanted == got
            if got == "unreadable":
                unreadable.append(name)

    for number, (claim, index) in enumerate(zip(claims.objects, match), 1):
        shape, colour, size = ("missing",) * 3 if index is None else seen.objects[index]
        answer(f"shape{number}", claim.shape, shape)
        answer(f"colour{number}", claim.colour, colour)
        answer(f"size{number}", claim.size, size)
    if claims.relation is not None:
        both = None not in match and seen.layout in ("row", "column")
        answer("relation", claims.relation, RELATION_OF[seen.layout, match[0] < match[1]] if both else "missing")
    answer("background", claims.background, seen.background)
    return Verdict(found, tuple(unreadable), seen)


@lru_cache(maxsize=1)
def _network() -> dict[str, np.ndarray]:
    if not WEIGHTS.exists():
        raise ValueError(f"the judge's weights are missing ({WEIGHTS}): run python -m lpo.scenes.judge_train")
    with np.load(WEIGHTS) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """x (C, H, W), weight (O, C, k, k), zero padding k // 2; then ReLU."""
    pad = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-2:], (1, 2))[:, ::stride, ::stride]
    return np.maximum(np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None], 0)


def probabilities(picture: Image.Image) -> dict[str, np.ndarray]:
    """The network's probabilities for every head of HEADS; any picture is brought to 64 x 64 RGB first."""
    net = _network()
    picture = picture.convert("RGB")
    if picture.size != (64, 64):
        picture = picture.resize((64, 64), Image.LANCZOS)
    x = np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1
    for layer, stride in enumerate((2, 2, 1, 2)):
        x = _convolve(x, net[f"conv{layer}.weight"], net[f"conv{layer}.bias"], stride)
    hidden = np.maximum(net["hidden.weight"] @ x.ravel() + net["hidden.bias"], 0)
    logits = net["out.weight"] @ hidden + net["out.bias"]
    edges = np.cumsum([len(classes) for classes in HEADS.values()])[:-1]
    answers = {}
    for name, part in zip(HEADS, np.split(logits, edges)):
        weights = np.exp(part - part.max())
        answers[name] = weights / weights.sum()
    answers["style"] = np.clip(net["style.weight"] @ hidden + net["style.bias"], -0.25, 1.25)
    return answers


def read(picture: Image.Image) -> Seen:
    """What the judge sees in a picture."""
    given = probabilities(picture)

    def name(head: str) -> str:
        best = int(given[head].argmax())
        sure = given[head][best] >= CONFIDENCE[head.rstrip("12")]
        return HEADS[head][best] if sure else "unreadable"

    layout = LAYOUTS[int(given["layout"].argmax())]
    things = tuple((name(f"shape{i}"), name(f"colour{i}"), name(f"size{i}")) for i in range(1, SLOTS[layout] + 1))
    return Seen(layout, things, name("background"))


def judge(picture: Image.Image, prompt: str) -> Verdict:
    """Which of the prompt's claims the picture fulfils; raises ValueError for a prompt outside this world."""
    return compare(parse_caption(prompt), read(picture))


def style_score(picture: Image.Image) -> float:
    """The uncaptioned axis as read from a picture: 0 washed-out and flat, 1 vivid, glossy and glowing."""
    return float(probabilities(picture)["style"][0])


def simulated_vote(
    taste: str, first: Image.Image, second: Image.Image, prompt: str, rng: np.random.Generator, noise: float = 0.1
) -> str:
    """'first', 'second' or 'tie', as an annotator of that taste would answer.

    'alignment' prefers the higher judge score (equal scores tie), 'style' the higher style score (closer than 0.02
    ties). With probability `noise` the answer is first or second by lot.
    """
    if taste not in ("alignment", "style"):
        raise ValueError(f"unknown taste {taste!r}: use 'alignment' or 'style'")
    if rng.random() < noise:
        return "first" if rng.random() < 0.5 else "second"
    if taste == "alignment":
        gap, tie = judge(first, prompt).score - judge(second, prompt).score, 1e-9
    else:
        gap, tie = style_score(first) - style_score(second), 0.02
    return "tie" if abs(gap) <= tie else "first" if gap > 0 else "second"
