"""The loop around every trainer: print, write metrics.jsonl, keep checkpoints, stop when asked, resume bit for bit.

Trainers are generators and know none of this. `train()` yields a dict of metrics after each step that counts, and None
wherever the run may be stopped in between; `state()` then says exactly where it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from lpo.run_dir import STOPPED, Run


class Trainer(Protocol):
    """What the loop needs. `step` counts finished steps; metrics hold at least "step" and "total"."""

    step: int
    save_every: int

    def train(self) -> Iterator[dict | None]: ...
    def save(self, path: Path) -> None: ...  # a checkpoint that other programs can use
    def state(self) -> dict: ...  # tensors and plain values, enough to go on bit for bit
    def load_state(self, state: dict) -> None: ...
    def result(self) -> dict: ...  # goes into result.json


def run_training(trainer: Trainer, run: Run, resume: bool) -> int:
    """Train to the end (returns 0) or until a stop is asked for (returns STOPPED, the state saved)."""
    if resume and run.state_file.exists():
        trainer.load_state(torch.load(run.state_file, map_location="cpu", weights_only=True))
        run.log(f"resumed after step {trainer.step}")
    run.rewind(trainer.step)
    if run.stop_requested:
        return STOPPED
    for metrics in trainer.train():
        if metrics is not None:
            row = run.record(metrics)
            run.log(summary(row))
            if trainer.step % trainer.save_every == 0 and trainer.step < metrics["total"]:
                trainer.save(run.checkpoint(trainer.step))
                save_state(trainer, run)
        if run.stop_requested:
            save_state(trainer, run)
            run.log(f"stopped after step {trainer.step}; continue with --resume")
            return STOPPED
    trainer.save(run.checkpoint("final"))
    run.finish(trainer.result())
    run.log("finished")
    return 0


def save_state(trainer: Trainer, run: Run) -> None:
    """Whole or not at all, so that a kill while saving leaves the state before."""
    partial = run.state_file.with_suffix(".partial")
    torch.save(trainer.state(), partial)
    os.replace(partial, run.state_file)


def summary(row: dict) -> str:
    """One line for the log: the plain numbers of a metrics row."""
    hidden = ("step", "total", "seconds", "left_s")
    numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)) and k not in hidden]
    return f"step {row['step']}/{row['total']}  " + "  ".join(numbers) + f"  {row['left_s']:.0f} s left"
