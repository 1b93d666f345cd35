"""The loop around every trainer: print, write metrics.jsonl, keep checkpoints, stop when asked, resume bit for bit.

Trainers are generators and know none of this. `train()` yields a dict of metrics after each step that counts, and None
wherever the run may be stopped in between; `state()` then says exactly where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor

from lpo.config import ConfigError, LPOConfig, LRMConfig
from lpo.ranks import Ranks
from lpo.run_dir import STOPPED, Run


class Trainer(Protocol):
    """What the loop needs. `step` counts finished steps; metrics hold at least "step" and "total".

    With several ranks (lpo/ranks.py) each has a trainer, all make the same calls in the same order, yield alike, and
    only the main one's `save` and `save_state` write.
    """

    step: int
    config: LRMConfig | LPOConfig
    ranks: Ranks
    weights: dict[str, Tensor]  # those that train

    def train(self) -> Iterator[dict | None]: ...
    def save(self, path: Path) -> None: ...  # a checkpoint that other programs can use
    def save_state(self, path: Path) -> None: ...  # one file, whole or not at all: enough to go on bit for bit
    def load_state(self, path: Path) -> None: ...
    def result(self) -> dict | None: ...  # goes into result.json; None if a stop was asked for meanwhile


def run_training(trainer: Trainer, run: Run, resume: bool) -> int:
    """Train to the end (returns 0) or until a stop is asked for (returns STOPPED, the state saved)."""
    ranks = trainer.ranks
    if resume and run.state_file.exists():
        _load_state(trainer, run)
        run.log(f"resumed after step {trainer.step}")
    ranks.same(trainer.weights.values())
    run.rewind(trainer.step)
    if ranks.any(run.stop_requested):
        return STOPPED
    for metrics in trainer.train():
        stop = ranks.any(run.stop_requested)
        if metrics is not None:
            row = run.record(metrics)
            run.log(summary(row))
            if trainer.step % trainer.config.save_every == 0 and not stop:
                trainer.save_state(run.state_file)
                trainer.save(run.checkpoint(trainer.step))
        if stop:
            return _stop(trainer, run)
    trainer.save_state(run.state_file)
    result = trainer.result()
    if result is None:
        return _stop(trainer, run)
    trainer.save(run.checkpoint("final"))
    run.finish(result)
    run.log("finished")
    ranks.any(False)
    return 0


def _load_state(trainer: Trainer, run: Run) -> None:
    try:
        trainer.load_state(run.state_file)
    except torch.OutOfMemoryError:
        raise
    except (EOFError, KeyError, TypeError, ValueError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(
            f"{run.state_file} is damaged or of another version of this program, so the run cannot go on: start a new "
            f"one. What it has trained so far is in {run.path / 'checkpoints'}."
        ) from error


def _stop(trainer: Trainer, run: Run) -> int:
    trainer.save_state(run.state_file)
    run.log(f"stopped after step {trainer.step}; continue with --resume")
    trainer.ranks.any(False)  # nobody leaves before all is saved: the launcher ends the others when one has left
    return STOPPED


def summary(row: dict) -> str:
    """One line for the log: the plain numbers of a metrics row."""
    hidden = ("step", "total", "seconds", "left_s")
    numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)) and k not in hidden]
    return f"step {row['step']}/{row['total']}  " + "  ".join(numbers) + f"  {row['left_s']:.0f} s left"
