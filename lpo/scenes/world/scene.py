"""What can be drawn: scenes of one or two objects, chosen by lot, and their nearest mistakes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("ball", "square", "triangle", "star", "heart")
COLOURS = {
    "red": (224, 36, 40),
    "yellow": (252, 216, 36),
    "green": (28, 142, 62),
    "blue": (32, 88, 226),
    "purple": (150, 48, 190),
    "white": (248, 248, 250),
}
SIZES = ("small", "large")
RADII = {"small": (0.112, 0.122), "large": (0.182, 0.194)}  # as fractions of the picture's width: a gap of 1.5
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("night", "sunset", "meadow", "sea", "snow", "plain")
HELD_OUT_PAIRS = (("heart", "green"), ("star", "blue"), ("triangle", "red"), ("square", "purple"))


@dataclass(frozen=True)
class Thing:
    """One object; x, y (centre) and radius are fractions of the picture's width, angle in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn. `relation` reads objects[0] relation objects[1]; None for one object.

    `style` in [0, 1] is never captioned; `seed` fixes the background's details.
    """

    background: str
    objects: tuple[Thing, ...]
    relation: str | None
    style: float
    seed: int


def sample_scene(
    rng: np.random.Generator, objects: int | None = None, style: float | None = None, held_out_pairs: bool = False
) -> Scene:
    """A random scene: 55 % single objects, style uniform in [0, 1].

    `objects` fixes their number (1 or 2). Colour-shape pairs of HELD_OUT_PAIRS appear only if `held_out_pairs`, and
    then the first object is one of them.
    """
    count = objects or (1 if rng.random() < 0.55 else 2)
    looks: list[tuple[str, str]] = []
    if held_out_pairs:
        looks.append(HELD_OUT_PAIRS[rng.integers(len(HELD_OUT_PAIRS))])
    while len(looks) < count:
        look = (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))
        if look not in HELD_OUT_PAIRS and look not in looks:
            looks.append(look)
    relation = None if count == 1 else str(rng.choice(RELATIONS))
    sizes = [str(rng.choice(SIZES)) for _ in looks]
    places = _places(rng, relation)
    things = tuple(
        Thing(shape, colour, size, x, y, float(rng.uniform(*RADII[size])), float(rng.uniform(-0.15, 0.15)))
        for (shape, colour), size, (x, y) in zip(looks, sizes, places, strict=True)
    )
    style = float(rng.random()) if style is None else float(style)
    return Scene(str(rng.choice(BACKGROUNDS)), things, relation, style, int(rng.integers(1 << 30)))


def _places(rng: np.random.Generator, relation: str | None) -> list[tuple[float, float]]:
    """Centres of one object, or of two that stand in `relation`; jittered by a few per cent."""
    if relation is None:
        return [(0.5 + rng.uniform(-0.07, 0.07), 0.5 + rng.uniform(-0.07, 0.07))]
    near, far = 0.26 + rng.uniform(-0.015, 0.015), 0.74 + rng.uniform(-0.015, 0.015)
    across = [0.5 + rng.uniform(-0.035, 0.035) for _ in range(2)]
    along = (near, far) if relation in ("left of", "above") else (far, near)
    if relation in ("left of", "right of"):
        return [(float(a), float(c)) for a, c in zip(along, across, strict=True)]
    return [(float(c), float(a)) for a, c in zip(along, across, strict=True)]


def hard_negative(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same background, layout, style and details with other objects, as close to `scene` as a mistake would be.

    Two objects: their colours, shapes, sizes or places swapped (60 %), else one attribute of one object changed. One
    object: shape, colour or size changed. At least one attribute that captions can name differs. Never a held-out
    colour-shape pair, unless `scene` has one itself.
    """
    allowed = {(o.shape, o.colour) for o in scene.objects}
    while True:
        things = list(scene.objects)
        if len(things) == 2 and rng.random() < 0.6:
            a, b = things
            what = ("colour", "colour", "shape", "size", "all")[rng.integers(5)]
            if what == "all":
                things = [_put(b, a), _put(a, b)]
            elif what == "size":
                things = [replace(a, size=b.size, radius=b.radius), replace(b, size=a.size, radius=a.radius)]
            else:
                things = [replace(a, **{what: getattr(b, what)}), replace(b, **{what: getattr(a, what)})]
        else:
            i = int(rng.integers(len(things)))
            things[i] = _alter(things[i], rng)
        looks = [(o.shape, o.colour) for o in things]
        distinct = len(set(looks)) == len(looks)
        if distinct and tuple(things) != scene.objects and not (set(looks) - allowed) & set(HELD_OUT_PAIRS):
            names = [(o.shape, o.colour, o.size) for o in things]
            if names != [(o.shape, o.colour, o.size) for o in scene.objects]:
                return replace(scene, objects=tuple(things))


def _put(thing: Thing, place: Thing) -> Thing:
    """`thing` at the centre of `place`."""
    return replace(thing, x=place.x, y=place.y)


def _alter(thing: Thing, rng: np.random.Generator) -> Thing:
    """One attribute of `thing` changed: shape and colour 40 % each, size 20 %."""
    lot = rng.random()
    if lot < 0.4:
        return replace(thing, shape=str(rng.choice([s for s in SHAPES if s != thing.shape])))
    if lot < 0.8:
        return replace(thing, colour=str(rng.choice([c for c in COLOURS if c != thing.colour])))
    size = "large" if thing.size == "small" else "small"
    return replace(thing, size=size, radius=float(rng.uniform(*RADII[size])))
