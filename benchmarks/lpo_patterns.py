"""The two patterns that benchmarks/lpo_iteration.py compares, each driven phase by phase: ours is the project's own
trainer, theirs the naive loop (benchmarks/naive.py). They must agree, or their times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.measure import Meter
from benchmarks.naive import Naive
from lpo import rng
from lpo.config import LPOConfig, from_preset
from lpo.lpo_trainer import LPOTrainer
from lpo.rollout import Pair
from lpo.run_dir import Run

TOLERANCE = 5e-3  # of relative gradients and of losses on the same pairs, in float32
SAME = 0.95  # of the chosen pairs, in float32: a random LRM scores some siblings alike to the last digit


def config_of(arguments: argparse.Namespace, prompts: Path) -> LPOConfig:
    """The `official` preset on the benchmark's model, every pair kept."""
    base = models.base_of(arguments.size, arguments.models, arguments.dtype, arguments.device)
    changes = {name: json.loads(value) for name, value in (word.split("=", 1) for word in arguments.set)}
    settings = {
        "policy": {"base": base},
        "lrm": models.lrm_of(arguments.size, base, arguments.models, arguments.dtype, arguments.device),
        "prompts": str(prompts),
        "prompts_per_iteration": arguments.prompts,
        "siblings": arguments.siblings,
        "steps": arguments.steps,
        "train_batch_size": arguments.train_batch_size,
        "threshold_min": 0.0,
        "threshold_max": 0.0,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "micro_batch_size": arguments.micro_batch_size,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    return from_preset(LPOConfig, "official", **(settings | changes))


def write_prompts(folder: Path, count: int) -> Path:
    """A prompt file of `count` prompts in `folder`."""
    file = folder / "prompts.json"
    file.write_text(json.dumps([f"a red circle above a small blue star, number {i}" for i in range(count)]))
    return file


class Ours:
    """The project's own trainer, driven phase by phase."""

    def __init__(self, config: LPOConfig, folder: Path, meter: Meter):
        self.trainer = LPOTrainer(config, Run.create(folder / "run", {}))
        self.weights, self.optimizer, self.meter = self.trainer.weights, self.trainer.optimizer, meter
        meter.watch(self.trainer.policy.unet, "policy")
        meter.watch(self.trainer.lrm.trunk.parts["unet"], "LRM")
        self.trainer.lrm.score = meter.timed("scoring", self.trainer.lrm.score)

    def compile(self) -> None:
        trainer = self.trainer
        trainer.config = dataclasses.replace(trainer.config, compile=True)
        for model in (trainer.policy, trainer.lrm):
            model.tune(trainer.config)

    def iterate(self, kept: int) -> list[float]:
        """Sample, then train on the first `kept` pairs; the losses of the minibatches."""
        trainer = self.trainer
        with self.meter("sampling"):
            prompts, conditioning = trainer._iteration_prompts()
            for _ in trainer._sample(prompts, conditioning):
                pass
        self.pairs = trainer.pending
        kept = min(kept, len(self.pairs))
        with self.meter("training"):
            size = trainer.config.train_batch_size
            for start in range(0, kept, size):
                trainer._update(self.pairs[start : min(start + size, kept)], conditioning)
                if start == 0:
                    self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
        return [update["loss"] for update in trainer.sums["updates"]]


class Theirs:
    """The naive pattern with the same prompts."""

    def __init__(self, config: LPOConfig, prompts: list[str], meter: Meter):
        order = rng.permutation(len(prompts), config.seed, "prompts", 0)  # of the trainer's first epoch
        self.naive = Naive(config, [prompts[i] for i in order], meter)
        self.weights, self.optimizer, self.meter = self.naive.weights, self.naive.optimizer, meter
        if config.gradient_checkpointing:
            self.naive.policy.enable_gradient_checkpointing()

    def iterate(self, kept: int, given: list[Pair] | None = None) -> list[float]:
        """As ours; trains on `given` pairs in place of its own, so that losses can be compared."""
        with self.meter("sampling"):
            self.pairs, conditioning = self.naive.sample(0)
        pairs = given or self.pairs
        losses, size = [], self.naive.config.train_batch_size
        with self.meter("training"):
            for start in range(0, kept, size):
                losses.append(self.naive.update(pairs[start : min(start + size, kept)], conditioning))
                if start == 0:
                    self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items()}
        return losses


def make(names: list[str], config: LPOConfig, prompts: list[str], folder: Path, meter: Meter) -> dict:
    """The patterns, ready to run."""
    makers = {"ours": lambda: Ours(config, folder, meter), "naive": lambda: Theirs(config, prompts, meter)}
    patterns = {name: makers[name]() for name in names}
    for pattern in patterns.values():
        reset(pattern)
    return patterns


def reset(pattern: Ours | Theirs) -> None:
    """The adapter that every run starts from, alike in both patterns: a fresh one has loss ln 2 whatever the data."""
    with torch.no_grad():
        for name, weight in pattern.weights.items():
            shape = tuple(weight.shape)
            weight.copy_(rng.normal(shape, "benchmark", name) * (0.02 if ".lora_B." in name else 1 / min(shape)))
    pattern.optimizer.state.clear()


def agreement(patterns: dict, losses: dict, dtype: str) -> dict[str, float]:
    """How well the two patterns agree: the share of pairs that both chose, and, on the same pairs, the largest
    differences of the gradients (relative, first minibatch) and of the losses.

    In float32 they must be the same maths: SystemExit if not. In half precision the same is only reported, for there
    the order of additions alone moves the last digits of a score.
    """
    ours, theirs = patterns["ours"], patterns["naive"]
    same = [alike(a, b) for a, b in zip(ours.pairs, theirs.pairs, strict=False)]
    gradients = [
        float((ours.gradients[name] - gradient).norm() / gradient.norm()) for name, gradient in theirs.gradients.items()
    ]
    apart = [abs(a - b) for a, b in zip(losses["ours"], losses["naive"], strict=True)]
    found = {"pairs": sum(same) / len(ours.pairs), "gradients": max(gradients), "losses": max(apart)}
    right = found["pairs"] >= SAME and max(found["gradients"], found["losses"]) < TOLERANCE
    if dtype == "float32" and not right:
        raise SystemExit(f"The two patterns differ, so their times mean nothing: {found}.")
    return found


def alike(a: Pair, b: Pair) -> bool:
    latents = all(torch.allclose(x.cpu(), y.cpu(), atol=1e-2) for x, y in ((a.winner, b.winner), (a.loser, b.loser)))
    return (a.t, a.row) == (b.t, b.row) and latents
