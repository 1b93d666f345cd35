"""A contact sheet of 48 scenes, with their captions on stdout: python -m lpo.scenes.world sheet.png"""

import sys

import numpy as np
from PIL import Image

from lpo.scenes.world import caption, render, sample_scene

if len(sys.argv) != 2:
    raise SystemExit("Name the picture to write: python -m lpo.scenes.world sheet.png")
rng = np.random.default_rng(1)
sheet = Image.new("RGB", (8 * 130, 6 * 130), "white")
for i in range(48):
    scene = sample_scene(rng)
    print(i, caption(scene, rng))
    sheet.paste(render(scene).resize((128, 128), Image.LANCZOS), (i % 8 * 130, i // 8 * 130))
sheet.save(sys.argv[1])
