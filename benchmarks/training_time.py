"""Processor seconds of the parts of a training on Scenes, one thread: where the time estimates of the Train tab come
from (app/training.py: FIRST_GUESS).

    OMP_NUM_THREADS=1 python -m benchmarks.training_time

Processor time, not wall time, so that other programs on the machine do not matter much. The pictures are drawn by the
renderer and the answers are arbitrary: neither changes how long a step takes.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lpo.config import LPOConfig, LRMConfig, from_preset
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_trainer import LRMTrainer
from lpo.run_dir import Run
from lpo.scenes.world import caption, render, sample_scene, split_of


def write_pairs(folder: Path, count: int) -> Path:
    """pairs.jsonl with `count` pairs of drawn scenes, split as the study splits them."""
    draw, lines = np.random.default_rng(0), []
    for i in range(count):
        scenes = [sample_scene(draw) for _ in range(2)]
        for side, scene in zip(("first", "second"), scenes, strict=True):
            render(scene).save(folder / f"{i}-{side}.png")
        prompt = caption(scenes[0], draw)
        pair = {"first": f"{i}-first.png", "second": f"{i}-second.png", "target": float(i % 2)}
        lines.append(json.dumps({"id": i, "prompt": prompt, "split": split_of(prompt), **pair}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(what: str, work):
    """Runs `work()`, prints the processor seconds it took, returns (result, seconds)."""
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    print(f"{what:<44} {seconds:7.2f} s", flush=True)
    return result, seconds


def lrm(folder: Path, pairs: int, steps: int) -> None:
    config = from_preset(LRMConfig, "scenes", pairs=str(write_pairs(folder, pairs)), eval_every=10**6)
    trainer, _ = timed(
        f"LRM: load, encode and fit {pairs} pairs", lambda: LRMTrainer(config, Run.create(folder / "lrm", {}))
    )
    rows = trainer.train()
    next(rows)
    _, seconds = timed(f"LRM: {steps} steps of {config.batch_size}", lambda: list(itertools.islice(rows, steps)))
    print(f"  a pair of a step: {seconds / steps / config.batch_size:.4f} s")
    timed(f"LRM: temperature and held-out report ({len(trainer.heldout)} pairs)", trainer.result)


def lpo(folder: Path, iterations: int) -> None:
    texts = {split: folder / f"{split}.json" for split in ("train", "heldout")}
    draw = np.random.default_rng(1)
    prompts = [caption(sample_scene(draw), draw) for _ in range(200)]
    for split, path in texts.items():
        path.write_text(json.dumps([text for text in prompts if split_of(text) == split]))
    config = from_preset(
        LPOConfig, "scenes", prompts=str(texts["train"]), eval_prompts=str(texts["heldout"]), eval_every=10**6
    )
    trainer, _ = timed("LPO: load", lambda: LPOTrainer(config, Run.create(folder / "lpo", {})))
    count = config.eval_count * config.eval_seeds
    _, seconds = timed(f"LPO: an evaluation, {count} pictures", lambda: list(trainer.heldout.measure_reference()))
    print(f"  a picture of an evaluation: {seconds / count:.3f} s")
    rows = (row for row in trainer.train() if row is not None)
    found, seconds = timed(f"LPO: {iterations} iterations", lambda: list(itertools.islice(rows, iterations)))
    kept = [round(row["kept_fraction"], 2) for row in found]
    print(f"  an iteration: {seconds / iterations:.2f} s (kept {kept})")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_time", description=__doc__.split(":")[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        lrm(Path(folder), arguments.pairs, arguments.steps)
        lpo(Path(folder), arguments.iterations)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
