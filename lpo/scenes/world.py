"""The embedded world: what can be drawn, how it is drawn and what is said about it.

A scene is one or two flat objects (5 shapes, 6 colours, 2 sizes) on one of 6 backgrounds. Captions name shapes and
colours always, sizes, relation and background mostly; nothing names the style, a number from washed-out (0) to vivid,
glossy and glowing (1). A few colour-shape pairs (`HELD_OUT_PAIRS`) are never drawn for training, and captions that are
held out by the split rule never train anything. The world is this small so that a 5 M parameter UNet can learn to
draw it on two CPU cores. Needs numpy and pillow only: the web process may import it.

    python -m lpo.scenes.world sheet.png     # a contact sheet of scenes with their captions on stdout
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

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
SALT = "scenes"  # of the split: storage.split_of(text, "scenes") gives the same answer

PHRASES = {
    "night": ("at night", "under a starry sky"),
    "sunset": ("at sunset", "in front of a sunset"),
    "meadow": ("in a meadow", "in a green meadow"),
    "sea": ("by the sea", "over the sea"),
    "snow": ("in the snow", "in a snowy landscape"),
    "plain": ("on a plain background", "on a grey background"),
}
RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
OPENINGS = ("a picture of ", "a drawing of ")
SUPERSAMPLING = 3
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


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


@dataclass(frozen=True)
class Claim:
    """What a caption says about one object; None where it is silent."""

    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Attributes:
    """What a caption claims. `relation` reads objects[0] relation objects[1]."""

    objects: tuple[Claim, ...]
    relation: str | None = None
    background: str | None = None


# --- drawing scenes by lot ---------------------------------------------------------------------------------------


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


# --- rendering ---------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; the same scene gives the same picture, always."""
    side = size * SUPERSAMPLING
    picture = _background(scene.background, side, np.random.default_rng(scene.seed))
    for thing in scene.objects:
        _draw(picture, thing, scene.style)
    picture = picture.resize((size, size), Image.BOX)
    # The uncaptioned axis, together with gloss and glow in _draw: washed-out and flat at 0, vivid at 1.
    picture = ImageEnhance.Color(picture).enhance(0.58 + 0.57 * scene.style)
    return Image.blend(Image.new("RGB", picture.size, (150, 148, 146)), picture, 0.76 + 0.24 * scene.style)


def _mix(a: tuple[int, ...], b: tuple[int, ...], k: float) -> tuple[int, ...]:
    return tuple(int(x + (y - x) * k) for x, y in zip(a, b, strict=True))


def _gradient(side: int, stops: list[tuple[float, tuple[int, ...]]]) -> Image.Image:
    """A vertical gradient through (position in [0, 1], colour) stops."""
    y = np.linspace(0, 1, side)
    rows = np.stack([np.interp(y, [p for p, _ in stops], [c[i] for _, c in stops]) for i in range(3)], -1)
    return Image.fromarray(np.repeat(rows[:, None].astype(np.uint8), side, 1))


def _hills(draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, base: float, height: float, colour) -> None:
    phase, waves = rng.random() * 6.28, rng.uniform(0.7, 1.3)
    top = [(x * side / 24, side * (base + height * math.sin(phase + waves * x / 24 * 6.28))) for x in range(25)]
    draw.polygon([*top, (side, side), (0, side)], fill=colour)


def _dots(draw, side: int, rng: np.random.Generator, count: int, rows: tuple[float, float], radius, colours) -> None:
    for _ in range(count):
        x, y, r = rng.random() * side, rng.uniform(*rows) * side, rng.uniform(*radius) * side
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colours[rng.integers(len(colours))])


def _background(name: str, side: int, rng: np.random.Generator) -> Image.Image:
    if name == "night":
        picture = _gradient(side, [(0, (10, 12, 46)), (0.7, (30, 34, 92)), (1, (52, 48, 110))])
        draw = ImageDraw.Draw(picture)
        _dots(draw, side, rng, 16, (0, 0.85), (0.006, 0.012), [(255, 255, 255), (200, 206, 240)])
        _hills(draw, side, rng, 0.92, 0.02, (14, 18, 38))
    elif name == "sunset":
        picture = _gradient(
            side, [(0, (84, 52, 128)), (0.4, (226, 98, 98)), (0.78, (254, 188, 104)), (1, (250, 170, 96))]
        )
        draw = ImageDraw.Draw(picture)
        x, y, r = rng.uniform(0.2, 0.8) * side, side * 0.82, side * 0.1
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 232, 168))
        _hills(draw, side, rng, 0.86, 0.02, (104, 56, 92))
        _hills(draw, side, rng, 0.93, 0.015, (66, 36, 74))
    elif name == "meadow":
        picture = _gradient(side, [(0, (116, 186, 240)), (0.6, (206, 234, 250)), (1, (206, 234, 250))])
        draw = ImageDraw.Draw(picture)
        x, y = rng.random() * side, rng.uniform(0.07, 0.14) * side
        for k in range(4):
            r, cx = side * 0.045, x + (k - 1.5) * side * 0.05
            draw.ellipse((cx - r, y - r * 0.8, cx + r, y + r * 0.8), fill=(250, 252, 255))
        _hills(draw, side, rng, 0.6, 0.03, (158, 214, 118))
        _hills(draw, side, rng, 0.74, 0.03, (124, 192, 88))
        _dots(draw, side, rng, 10, (0.8, 1), (0.008, 0.01), [(255, 244, 150), (255, 255, 255)])
    elif name == "sea":
        water = [(0.505, (28, 120, 168)), (1, (18, 78, 136))]
        picture = _gradient(side, [(0, (150, 214, 244)), (0.5, (222, 242, 248)), *water])
        draw = ImageDraw.Draw(picture)
        for _ in range(10):
            x, y, w = rng.random() * side, rng.uniform(0.55, 0.84) * side, side * rng.uniform(0.06, 0.12)
            draw.line((x, y, x + w, y), fill=(120, 190, 214), width=max(1, side // 96))
        _hills(draw, side, rng, 0.91, 0.012, (238, 216, 164))
    elif name == "snow":
        picture = _gradient(side, [(0, (150, 172, 204)), (0.6, (206, 218, 234)), (1, (206, 218, 234))])
        draw = ImageDraw.Draw(picture)
        for x in (rng.uniform(0.03, 0.2) * side, rng.uniform(0.8, 0.97) * side):
            y, w, h = side * 0.68, side * 0.06, side * rng.uniform(0.14, 0.2)
            draw.polygon([(x - w, y), (x, y - h), (x + w, y)], fill=(74, 112, 112))
        _hills(draw, side, rng, 0.66, 0.025, (222, 231, 243))
        _hills(draw, side, rng, 0.8, 0.025, (240, 245, 252))
        _dots(draw, side, rng, 16, (0, 1), (0.008, 0.012), [(255, 255, 255)])
    else:
        g = int(rng.integers(150, 184))
        wall, floor = [(0, (g + 30,) * 3), (0.7, (g + 42,) * 3)], [(0.715, (g - 8,) * 3), (1, (g + 8,) * 3)]
        picture = _gradient(side, wall + floor)
    return picture


def outline(shape: str, x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    """Corner points of a shape of radius `r` around (x, y), turned by `angle` radians."""
    if shape == "square":
        points = [(-0.84 * r, -0.84 * r), (0.84 * r, -0.84 * r), (0.84 * r, 0.84 * r), (-0.84 * r, 0.84 * r)]
    elif shape == "triangle":
        points = [(0, -1.1 * r), (1.08 * r, 0.8 * r), (-1.08 * r, 0.8 * r)]
    elif shape == "star":
        radii = [1.2 * r if k % 2 == 0 else 0.5 * r for k in range(10)]
        points = [(q * math.sin(k * math.pi / 5), -q * math.cos(k * math.pi / 5)) for k, q in enumerate(radii)]
    elif shape == "heart":
        turns = [k / 40 * 2 * math.pi for k in range(40)]
        points = [
            (
                1.08 * r * math.sin(t) ** 3,
                -r / 15 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in turns
        ]
    elif shape == "ball":
        turns = [k / 48 * 2 * math.pi for k in range(48)]
        points = [(r * math.cos(t), r * math.sin(t)) for t in turns]
    else:
        raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
    c, s = math.cos(angle), math.sin(angle)
    return [(x + px * c - py * s, y + px * s + py * c) for px, py in points]


def _draw(picture: Image.Image, thing: Thing, style: float) -> None:
    """Glow, dark outline, shaded fill and a highlight; gloss and glow grow with style."""
    side = picture.width
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    colour = COLOURS[thing.colour]
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).polygon(outline(thing.shape, x, y, r, thing.angle), fill=255)
    glow = max(0.0, style - 0.5) / 0.5
    if glow > 0.05:
        small = mask.resize((side // 6, side // 6)).filter(ImageFilter.GaussianBlur(side / 6 * 0.045))
        halo = small.resize(picture.size, Image.BILINEAR).point(lambda v: int(v * 0.7 * glow))
        picture.paste(_mix(colour, (255, 255, 255), 0.5), (0, 0), halo)
    edge = mask.filter(ImageFilter.MaxFilter(5))  # 2 of 3 x 64 pixels: about 0.7 px at 64
    picture.paste(_mix(colour, (16, 12, 26), 0.68), (0, 0), edge)
    light, shade = _mix(colour, (255, 255, 255), 0.34 * style), _mix(colour, (16, 12, 40), 0.3 * style)
    top, bottom = max(0.001, (y - r) / side), min(0.999, (y + r) / side)
    picture.paste(_gradient(side, [(0, light), (top, light), (bottom, shade), (1, shade)]), (0, 0), mask)
    if style > 0.4:
        q = r * 0.18
        spot = (x - r * 0.3 - q, y - r * 0.25 - q, x - r * 0.3 + q, y - r * 0.25 + q)
        ImageDraw.Draw(picture).ellipse(spot, fill=_mix(colour, (255, 255, 255), 0.7 * style))


# --- captions ----------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many phrasings of what is drawn; sizes in 80 %, relation in 93 %, background in 93 % of captions."""

    def noun(thing: Thing) -> str:
        words = [thing.colour, thing.shape]
        if rng.random() < 0.8:
            words.insert(0, SIZE_WORDS[thing.size][int(rng.random() < 0.2)])
        return "a " + " ".join(words)

    text = noun(scene.objects[0])
    if len(scene.objects) == 2:
        link = "and" if rng.random() < 0.07 else RELATION_PHRASES[scene.relation][int(rng.random() < 0.4)]
        text = f"{text} {link} {noun(scene.objects[1])}"
    lot, place = rng.random(), PHRASES[scene.background][int(rng.random() < 0.35)]
    if lot < 0.8:
        text = f"{text} {place}"
    elif lot < 0.93:
        text = f"{place}, {text}"
    if lot < 0.8 and rng.random() < 0.1:
        text = OPENINGS[int(rng.integers(len(OPENINGS)))] + text
    return text


_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_NOUN = re.compile(rf"(?:\b({'|'.join(_SIZE_OF)})\s+)?(?:\b({'|'.join(COLOURS)})\s+)?\b({'|'.join(SHAPES)})\b")
_RELATION_OF = [
    ("left of", "left of"),
    ("right of", "right of"),
    ("above", "above"),
    ("over", "above"),
    ("below", "below"),
    ("under", "below"),
]
_BACKGROUND_WORDS = {
    "night": ("night", "starry"),
    "sunset": ("sunset",),
    "meadow": ("meadow",),
    "sea": ("sea",),
    "snow": ("snow", "snowy"),
    "plain": ("plain", "grey"),
}


def parse_caption(text: str) -> Attributes:
    """What a caption claims; raises ValueError when it names no object of this world or more than two."""
    text = normalise(text)
    nouns = list(_NOUN.finditer(text))
    if not 1 <= len(nouns) <= 2:
        raise ValueError(
            f"the prompt {text!r} names {len(nouns)} objects; "
            f"a Scenes prompt names one or two of: {', '.join(SHAPES)} (for example 'a small red ball by the sea')"
        )
    claims = tuple(Claim(m[3], m[2], _SIZE_OF.get(m[1])) for m in nouns)
    relation = None
    if len(nouns) == 2:
        between = text[nouns[0].end() : nouns[1].start()]
        relation = next((name for words, name in _RELATION_OF if words in between), None)
    words = set(re.findall(r"[a-z]+", text))
    background = next((b for b, keys in _BACKGROUND_WORDS.items() if words & set(keys)), None)
    return Attributes(claims, relation, background)


def normalise(text: str) -> str:
    """NFKC, casefolded, single spaces, no full stop at the end: the text that the split hashes."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").strip()


def split_of(text: str, salt: str = SALT) -> str:
    """'heldout' for a fifth of all texts, by hash, else 'train'; storage has the same rule."""
    digest = blake2b(f"{salt}\n{normalise(text)}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") / 2**64 < 0.2 else "train"


def train_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the train split; nothing in this project is trained on another."""
    while True:
        text = caption(scene, rng)
        if split_of(text) == "train":
            return text


def prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` distinct captions of a split: 'train', 'heldout', or 'composition' (held out, with a held-out pair)."""
    if split not in ("train", "heldout", "composition"):
        raise ValueError(f"unknown split {split!r}: use 'train', 'heldout' or 'composition'")
    rng = np.random.default_rng(["train", "heldout", "composition"].index(split) + 10 * seed)
    found: dict[str, str] = {}
    while len(found) < count:
        text = caption(sample_scene(rng, held_out_pairs=split == "composition"), rng)
        if split_of(text) == ("train" if split == "train" else "heldout"):
            found.setdefault(normalise(text), text)
    return list(found.values())


def main() -> None:
    rng = np.random.default_rng(1)
    sheet = Image.new("RGB", (8 * 130, 6 * 130), "white")
    for i in range(48):
        scene = sample_scene(rng)
        print(i, caption(scene, rng))
        sheet.paste(render(scene).resize((128, 128), Image.LANCZOS), (i % 8 * 130, i // 8 * 130))
    sheet.save(sys.argv[1])


if __name__ == "__main__":
    main()
