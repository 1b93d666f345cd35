"""The embedded world: what can be drawn (scene.py), how (drawing.py), and what is said about it (captions.py).

A scene is one or two flat objects (5 shapes, 6 colours, 2 sizes) on one of 6 backgrounds. Captions name shapes and
colours always, sizes, relation and background mostly; nothing names the style, a number from washed-out (0) to vivid,
glossy and glowing (1). A few colour-shape pairs (`HELD_OUT_PAIRS`) are never drawn for training, and captions that are
held out by the split rule never train anything. The world is this small so that a 5 M parameter UNet can learn to
draw it on two CPU cores. Needs numpy and pillow only: the web process may import it.

    python -m lpo.scenes.world sheet.png     # a contact sheet of scenes with their captions on stdout

The shipped models, their prompts and every result depend on what is drawn and said here bit for bit.
"""

from lpo.scenes.world.captions import (
    Attributes,
    Claim,
    caption,
    normalise,
    parse_caption,
    prompts,
    split_of,
    train_caption,
)
from lpo.scenes.world.drawing import outline, render
from lpo.scenes.world.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    hard_negative,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT_PAIRS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Attributes",
    "Claim",
    "Scene",
    "Thing",
    "caption",
    "hard_negative",
    "normalise",
    "outline",
    "parse_caption",
    "prompts",
    "render",
    "sample_scene",
    "split_of",
    "train_caption",
]
