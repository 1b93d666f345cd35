"""How a scene is drawn: a background, the objects on it, and the style that no caption names."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from lpo.scenes.world.scene import COLOURS, SHAPES, Scene, Thing

SUPERSAMPLING = 3


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; the same scene gives the same picture, always."""
    side = size * SUPERSAMPLING
    picture = BACKDROPS[scene.background](side, np.random.default_rng(scene.seed))
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


def _night(side: int, rng: np.random.Generator) -> Image.Image:
    """Stars over a dark hill."""
    picture = _gradient(side, [(0, (10, 12, 46)), (0.7, (30, 34, 92)), (1, (52, 48, 110))])
    draw = ImageDraw.Draw(picture)
    _dots(draw, side, rng, 16, (0, 0.85), (0.006, 0.012), [(255, 255, 255), (200, 206, 240)])
    _hills(draw, side, rng, 0.92, 0.02, (14, 18, 38))
    return picture


def _sunset(side: int, rng: np.random.Generator) -> Image.Image:
    """A low sun over two ranges."""
    picture = _gradient(side, [(0, (84, 52, 128)), (0.4, (226, 98, 98)), (0.78, (254, 188, 104)), (1, (250, 170, 96))])
    draw = ImageDraw.Draw(picture)
    x, y, r = rng.uniform(0.2, 0.8) * side, side * 0.82, side * 0.1
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 232, 168))
    _hills(draw, side, rng, 0.86, 0.02, (104, 56, 92))
    _hills(draw, side, rng, 0.93, 0.015, (66, 36, 74))
    return picture


def _meadow(side: int, rng: np.random.Generator) -> Image.Image:
    """A cloud, two hills, flowers."""
    picture = _gradient(side, [(0, (116, 186, 240)), (0.6, (206, 234, 250)), (1, (206, 234, 250))])
    draw = ImageDraw.Draw(picture)
    x, y = rng.random() * side, rng.uniform(0.07, 0.14) * side
    for k in range(4):
        r, cx = side * 0.045, x + (k - 1.5) * side * 0.05
        draw.ellipse((cx - r, y - r * 0.8, cx + r, y + r * 0.8), fill=(250, 252, 255))
    _hills(draw, side, rng, 0.6, 0.03, (158, 214, 118))
    _hills(draw, side, rng, 0.74, 0.03, (124, 192, 88))
    _dots(draw, side, rng, 10, (0.8, 1), (0.008, 0.01), [(255, 244, 150), (255, 255, 255)])
    return picture


def _sea(side: int, rng: np.random.Generator) -> Image.Image:
    """Waves before a beach."""
    water = [(0.505, (28, 120, 168)), (1, (18, 78, 136))]
    picture = _gradient(side, [(0, (150, 214, 244)), (0.5, (222, 242, 248)), *water])
    draw = ImageDraw.Draw(picture)
    for _ in range(10):
        x, y, w = rng.random() * side, rng.uniform(0.55, 0.84) * side, side * rng.uniform(0.06, 0.12)
        draw.line((x, y, x + w, y), fill=(120, 190, 214), width=max(1, side // 96))
    _hills(draw, side, rng, 0.91, 0.012, (238, 216, 164))
    return picture


def _snow(side: int, rng: np.random.Generator) -> Image.Image:
    """Two firs on white hills, snowflakes."""
    picture = _gradient(side, [(0, (150, 172, 204)), (0.6, (206, 218, 234)), (1, (206, 218, 234))])
    draw = ImageDraw.Draw(picture)
    for x in (rng.uniform(0.03, 0.2) * side, rng.uniform(0.8, 0.97) * side):
        y, w, h = side * 0.68, side * 0.06, side * rng.uniform(0.14, 0.2)
        draw.polygon([(x - w, y), (x, y - h), (x + w, y)], fill=(74, 112, 112))
    _hills(draw, side, rng, 0.66, 0.025, (222, 231, 243))
    _hills(draw, side, rng, 0.8, 0.025, (240, 245, 252))
    _dots(draw, side, rng, 16, (0, 1), (0.008, 0.012), [(255, 255, 255)])
    return picture


def _plain(side: int, rng: np.random.Generator) -> Image.Image:
    """A grey wall and its floor."""
    g = int(rng.integers(150, 184))
    wall, floor = [(0, (g + 30,) * 3), (0.7, (g + 42,) * 3)], [(0.715, (g - 8,) * 3), (1, (g + 8,) * 3)]
    picture = _gradient(side, wall + floor)
    return picture


BACKDROPS = {
    "night": _night,
    "sunset": _sunset,
    "meadow": _meadow,
    "sea": _sea,
    "snow": _snow,
    "plain": _plain,
}


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
