"""Reads a picture and says which of a prompt's claims are there: the simulated annotator's eyes.

Two small convolutional networks (weights in `weights/judge.npz`, trained by `python -m lpo.scenes.judge_train` on
blurred, noised, bent and spoilt renderings) name layout and background, and in a crop around each place where an
object stands its shape, colour and size. What they are not sure of is *unreadable* and counts as wrong. They run in
numpy, so any process may ask. The judge is never a reward: only tests and studies use it, as a simulated annotator
whose labels are marked as such.
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
SCENE_HEADS = {"layout": LAYOUTS, "background": (*BACKGROUNDS, "unreadable")}
OBJECT_HEADS = {"shape": (*SHAPES, "unreadable"), "colour": (*COLOURS, "unreadable"), "size": SIZES}
CONFIDENCE = {"layout": 0.5, "background": 0.5, "shape": 0.6, "colour": 0.5, "size": 0.5}
CROP = 36  # pixels around the place where an object of that layout stands
CENTRES = {"none": (), "single": ((32, 32),), "row": ((17, 32), (47, 32)), "column": ((32, 17), (32, 47))}  # x, y
STRIDES = {"scene": (2, 2, 2, 2), "object": (2, 1, 2, 2)}
RELATION_OF = {
    ("row", True): "left of",
    ("row", False): "right of",
    ("column", True): "above",
    ("column", False): "below",
}


@dataclass(frozen=True)
class Seen:
    """What a picture shows; objects are (shape, colour, size), left to right or top to bottom.

    Each entry may be 'unreadable'; layout: none, single, row, column or unreadable.
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

    for number, (claim, index) in enumerate(zip(claims.objects, match, strict=True), 1):
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
        raise ValueError(f"The judge's weights are missing ({WEIGHTS}): run python -m lpo.scenes.judge_train.")
    with np.load(WEIGHTS) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def _convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """x (C, H, W), weight (O, C, k, k), zero padding k // 2; then ReLU."""
    pad = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-2:], (1, 2))[:, ::stride, ::stride]
    return np.maximum(np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None], 0)


def _features(x: np.ndarray, name: str) -> np.ndarray:
    """Hidden units (128,) of the network `name` for x (3, H, W) in [-1, 1]."""
    net = _network()
    for layer, stride in enumerate(STRIDES[name]):
        x = _convolve(x, net[f"{name}.convs.{layer}.weight"], net[f"{name}.convs.{layer}.bias"], stride)
    return np.maximum(net[f"{name}.hidden.weight"] @ x.ravel() + net[f"{name}.hidden.bias"], 0)


def _answers(hidden: np.ndarray, name: str, heads: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The likeliest class of every head, or 'unreadable' below its confidence."""
    logits = _network()[f"{name}.out.weight"] @ hidden + _network()[f"{name}.out.bias"]
    given, start = {}, 0
    for head, classes in heads.items():
        part = np.exp(logits[start : start + len(classes)] - logits[start : start + len(classes)].max())
        start += len(classes)
        best = int(part.argmax())
        given[head] = classes[best] if part[best] / part.sum() >= CONFIDENCE[head] else "unreadable"
    return given


def _pixels(picture: Image.Image) -> np.ndarray:
    """(3, 64, 64) in [-1, 1]; any picture is brought to 64 x 64 RGB first."""
    picture = picture.convert("RGB")
    if picture.size != (64, 64):
        picture = picture.resize((64, 64), Image.LANCZOS)
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1


def read(picture: Image.Image) -> Seen:
    """What the judge sees in a picture: layout and background first, then each object in a crop around its place."""
    x = _pixels(picture)
    scene = _answers(_features(x, "scene"), "scene", SCENE_HEADS)
    wide = np.pad(x, ((0, 0), (CROP // 2,) * 2, (CROP // 2,) * 2), mode="edge")
    things = []
    for cx, cy in CENTRES.get(scene["layout"], ()):
        thing = _answers(_features(wide[:, cy : cy + CROP, cx : cx + CROP], "object"), "object", OBJECT_HEADS)
        things.append((thing["shape"], thing["colour"], thing["size"]))
    return Seen(scene["layout"], tuple(things), scene["background"])


def judge(picture: Image.Image, prompt: str) -> Verdict:
    """Which of the prompt's claims the picture fulfils; raises ValueError for a prompt outside this world."""
    return compare(parse_caption(prompt), read(picture))


def style_score(picture: Image.Image) -> float:
    """The uncaptioned axis as read from a picture: 0 washed-out and flat, 1 vivid, glossy and glowing."""
    net = _network()
    hidden = _features(_pixels(picture), "scene")
    return float((net["style.weight"] @ hidden + net["style.bias"])[0])


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
