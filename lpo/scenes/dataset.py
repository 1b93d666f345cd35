"""Rendered scenes on disk: drawn once by all cores, read by every training stage.

Each scene has its own seed, so any number of processes draws the same set. Captions are not stored: training draws a
fresh phrasing of the train split each time a picture is used.
"""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import numpy as np

from lpo.scenes.world import Scene, render, sample_scene

CHUNK = 500


def scene_of(seed: int, index: int, held_out_pairs: bool = False) -> Scene:
    """The `index`-th scene of the set drawn with `seed`; held-out colour-shape pairs are in another set."""
    return sample_scene(np.random.default_rng((seed, index)), held_out_pairs=held_out_pairs)


def _chunk(job: tuple[int, int, int, bool]) -> np.ndarray:
    seed, start, stop, held_out_pairs = job
    return np.stack([np.asarray(render(scene_of(seed, i, held_out_pairs))) for i in range(start, stop)])


def rendered(folder: Path, count: int, seed: int, processes: int = 2, held_out_pairs: bool = False) -> np.ndarray:
    """Pictures of the first `count` scenes, uint8 (count, 64, 64, 3), memory-mapped from `folder`.

    Drawn on the first call (3 ms a picture and core); the file appears only when it is complete.
    """
    path = folder / f"scenes-seed{seed}-{count}{'-pairs' if held_out_pairs else ''}.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (count, 64, 64, 3))
        jobs = [(seed, i, min(i + CHUNK, count), held_out_pairs) for i in range(0, count, CHUNK)]
        with get_context("spawn").Pool(processes) as pool:
            for (_, start, stop, _), pictures in zip(jobs, pool.imap(_chunk, jobs), strict=True):
                out[start:stop] = pictures
        out.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


def object_weights(scene: Scene, side: int, extra: float) -> np.ndarray:
    """Loss weights (side, side): 1, and 1 + extra around objects, scaled to mean 1."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    weights = np.ones((side, side), np.float32)
    for thing in scene.objects:
        reach = 1.3 * thing.radius + 0.03
        weights[(x - thing.x) ** 2 + (y - thing.y) ** 2 < reach**2] = 1 + extra
    return weights / weights.mean()
