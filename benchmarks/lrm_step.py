"""One training step of a latent reward model: seconds, rows, TFLOP/s and peak memory, with latents from the cache (as
the project trains) and, beside it, with both pictures of every pair encoded anew at every step (as the official code).

    python -m benchmarks.lrm_step --size tiny
    python -m benchmarks.lrm_step --size sd15 --device cuda --batch-size 16 --gradient-checkpointing

Seconds are the processor's on a CPU, wall-clock on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import measure, models
from benchmarks.measure import Meter
from lpo.backbones import Backbone, load_policy
from lpo.config import LRMConfig, Policy
from lpo.data import load_picture
from lpo.lrm_trainer import LRMTrainer
from lpo.run_dir import Run

PAIRS = 8  # distinct pairs; a batch draws them again and again


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.flags(__doc__.split(":")[0] + ".")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--micro-batch-size", type=int, help="pairs in one forward; less memory, same maths")
    arguments = parser.parse_args(argv)
    measure.resolve(arguments)
    return arguments


def write_pairs(folder: Path, size: tuple[int, int]) -> Path:
    """pairs.jsonl with PAIRS pairs of noise pictures, `size` = (height, width) in pixels."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(PAIRS):
        for side in ("first", "second"):
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}-{side}.png")
        pair = {"first": f"{i}-first.png", "second": f"{i}-second.png", "target": float(i % 2)}
        lines.append(json.dumps({"id": i, "prompt": f"a red circle above a small blue star, number {i}", **pair}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def picture_size(backbone: Backbone) -> tuple[int, int]:
    """(height, width) in pixels of the model's own pictures."""
    factor = 64 // backbone.encode(torch.zeros(1, 3, 64, 64))[0].shape[-1]
    _, rows, columns = backbone.latent_shape()
    return rows * factor, columns * factor


def make(arguments: argparse.Namespace, folder: Path, meter: Meter) -> tuple[Callable[[], None], LRMTrainer]:
    """One training step of the project's own trainer, and the trainer."""
    base = models.base_of(arguments.size, arguments.models, arguments.dtype, arguments.device)
    size = picture_size(load_policy(Policy(base), arguments.device, arguments.dtype))
    config = LRMConfig(
        base=base,
        init=models.lrm_of(arguments.size, base, arguments.models, arguments.dtype, arguments.device),
        pairs=str(write_pairs(folder, size)),
        batch_size=arguments.batch_size,
        steps=10**6,
        eval_every=10**6,
        calibration=0.0,
        gradient_checkpointing=arguments.gradient_checkpointing,
        micro_batch_size=arguments.micro_batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    trainer = LRMTrainer(config, Run.create(folder / "run", {}))
    meter.watch(trainer.lrm.trunk.parts["unet"], "LRM")
    steps = trainer.train()

    def step() -> None:
        with meter("step"):
            next(steps)

    return step, trainer


def encoding(arguments: argparse.Namespace, folder: Path, meter: Meter) -> Callable[[], None]:
    """What the official code adds to a step: both pictures of every pair of the batch through the VAE."""
    base = models.base_of(arguments.size, arguments.models, arguments.dtype, arguments.device)
    backbone = load_policy(Policy(base), arguments.device, arguments.dtype)
    size = picture_size(backbone)
    names = [f"{i % PAIRS}-{side}.png" for side in ("first", "second") for i in range(arguments.batch_size)]
    pictures = torch.stack([load_picture(folder / name, size) for name in names])  # decoded beforehand, so not timed
    pictures = pictures.to(arguments.device)

    def encode() -> None:
        with meter("encoding"):
            for part in pictures.split(16):
                backbone.encode(part)

    return encode


def run(arguments: argparse.Namespace, folder: Path) -> dict:
    """All numbers of the benchmark."""
    meter = Meter(arguments.device)
    if arguments.memory_of:
        return {"peak": measure.peak_of(arguments.device, lambda: make(arguments, folder, meter)[0]())}
    step, trainer = make(arguments, folder, meter)
    encode = encoding(arguments, folder, meter)
    meter.reset()
    with meter.counting_flops():
        step()
        encode()
    rows, tflop = dict(meter.rows), {k: v / 1e12 for k, v in meter.flops.items()}

    def once() -> dict[str, float]:
        meter.reset()
        step()
        encode()
        return meter.steady()

    if arguments.compile:
        trainer.lrm.tune(dataclasses.replace(trainer.config, compile=True))
    once()
    runs = [once() for _ in range(arguments.repeats)]
    seconds = {phase: measure.spread([run[phase] for run in runs]) for phase in ("step", "encoding")}
    ratio = measure.ratios([run["step"] for run in runs], [run["step"] + run["encoding"] for run in runs])
    return {
        "setting": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "machine": measure.machine(arguments.device),
        "rows": rows,
        "tflop": tflop,
        "seconds": seconds,
        "tflop_per_second": tflop["step"] / seconds["step"]["median"],
        "ratio": ratio,
    }


def report(result: dict) -> str:
    """The table, in Markdown."""
    setting, seconds, ratio = result["setting"], result["seconds"], result["ratio"]
    rows = [
        ["one step, latents cached", f"{seconds['step']['median']:.3f} s"],
        ["encoding the pictures at every step adds", f"{seconds['encoding']['median']:.3f} s"],
        ["ours / with encoding", f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})"],
        ["rows through the LRM", str(sum(result["rows"].values()))],
        ["TFLOP of a step", f"{result['tflop']['step']:.3f}"],
        ["achieved TFLOP/s", f"{result['tflop_per_second']:.3f}"],
    ]
    rows += [["peak memory", measure.gib(peak)] for peak in result["memory"].values()]
    title = f"## One LRM training step, {setting['size']}, {setting['dtype']}, {setting['batch_size']} pairs"
    title += ", gradient checkpointing" * setting["gradient_checkpointing"] + ", compiled" * setting["compile"]
    return "\n".join([title, "", measure.name_of(result["machine"]), "", measure.table(["", ""], rows), ""])


def main(argv: list[str] | None = None) -> int:
    return measure.carry_out("benchmarks.lrm_step", parse(argv), run, report)


if __name__ == "__main__":
    sys.exit(main())
