"""One LPO iteration: seconds of sampling, scoring and training, network evaluations, TFLOP/s and peak memory, beside
the pattern of the official code (benchmarks/naive.py), measured in the same run, alternating.

    python -m benchmarks.lpo_iteration --size tiny
    python -m benchmarks.lpo_iteration --size sd15 --device cuda --compile --out sd15.json

The maths is that of the `official` preset. Both patterns must choose the same pairs, and agree on every loss and on the
gradients of the first minibatch, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import measure, models
from benchmarks.measure import Meter
from benchmarks.naive import Naive
from lpo import rng
from lpo.config import LPOConfig, from_preset
from lpo.lpo_trainer import LPOTrainer
from lpo.rollout import Pair
from lpo.run_dir import Run

PHASES = ("sampling", "scoring", "training")
TOLERANCE = 5e-3  # of relative gradients and of losses on the same pairs, in float32
SAME = 0.95  # of the chosen pairs, in float32: a random LRM scores some siblings alike to the last digit


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.flags(__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--siblings", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--train-batch-size", type=int, default=10)
    parser.add_argument("--kept", type=int, nargs="+", default=[28, 100], help="pairs trained on (the first so many)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both patterns")
    parser.add_argument("--micro-batch-size", type=int, help="pairs in one forward of ours; less memory, same maths")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=JSON", help="other settings of train-lpo, for ours alone"
    )
    parser.add_argument("--no-naive", action="store_true", help="measure ours alone")
    parser.add_argument("--profile", action="store_true", help="also print where one iteration of ours spends its time")
    arguments = parser.parse_args(argv)
    measure.resolve(arguments)
    if arguments.set:
        arguments.no_naive = True  # it knows the official maths only
    return arguments


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


def run(arguments: argparse.Namespace, folder: Path) -> dict:
    """All numbers of the benchmark."""
    file = write_prompts(folder, arguments.prompts)
    config, prompts = config_of(arguments, file), json.loads(file.read_text())
    meter = Meter(arguments.device)
    if arguments.memory_of:
        name, kept = arguments.memory_of, max(arguments.kept)
        return {
            "peak": measure.peak_of(
                arguments.device, lambda: make([name], config, prompts, folder, meter)[name].iterate(kept)
            )
        }
    patterns = make(["ours"] if arguments.no_naive else ["ours", "naive"], config, prompts, folder, meter)
    if arguments.profile:
        print(profile(patterns["ours"], max(arguments.kept)))
    setting = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
    kept = {str(number): measure_kept(arguments, meter, patterns, number) for number in arguments.kept}
    return {"setting": setting, "machine": measure.machine(arguments.device), "kept": kept}


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


def measure_kept(arguments: argparse.Namespace, meter: Meter, patterns: dict, kept: int) -> dict:
    """Counts in one run of each pattern, whose results must agree, then seconds in the alternating runs.

    Counting and comparing is done before anything is compiled, so that every operation is seen.
    """
    found: dict = {name: {} for name in patterns}
    losses = {}
    for name, pattern in patterns.items():
        reset(pattern)
        meter.reset()
        with meter.counting_flops():
            losses[name] = pattern.iterate(*((kept,) if name == "ours" else (kept, patterns["ours"].pairs)))
        found[name] |= {"rows": dict(meter.rows), "tflop": {k: v / 1e12 for k, v in meter.flops.items()}}
    found["drawn"] = len(patterns["ours"].pairs)
    if "naive" in patterns:
        found["agreement"] = agreement(patterns, losses, arguments.dtype)

    def once(name: str) -> dict[str, float]:
        reset(patterns[name])
        meter.reset()
        patterns[name].iterate(kept)
        return meter.times()

    if arguments.compile:
        patterns["ours"].compile()
        once("ours")
        found["first_compiled_iteration"] = sum(meter.seconds.values())
    runs = measure.alternate({name: lambda name=name: once(name) for name in patterns}, arguments.repeats)
    totals = {name: [sum(run[phase] for phase in PHASES) for run in runs[name]] for name in patterns}
    for name in patterns:
        phases = {phase: measure.spread([run[phase] for run in runs[name]]) for phase in PHASES}
        found[name]["seconds"] = {**phases, "all": measure.spread(totals[name])}
        found[name]["processor_seconds"] = measure.spread([run["processor"] for run in runs[name]])
        found[name]["tflop_per_second"] = sum(found[name]["tflop"].values()) / found[name]["seconds"]["all"]["median"]
    if "naive" in patterns:
        found["ratio"] = {
            **{p: measure.ratios(*([run[p] for run in runs[n]] for n in ("ours", "naive"))) for p in PHASES},
            "all": measure.ratios(totals["ours"], totals["naive"]),
        }
        if not meter.cuda:
            found["ratio"]["processor"] = measure.ratios(
                *([r["processor"] for r in runs[n]] for n in ("ours", "naive"))
            )
    return found


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


def profile(ours: Ours, kept: int) -> str:
    """The operations that one iteration of ours spends its own time in."""
    from torch.profiler import ProfilerActivity

    on_gpu = ours.meter.cuda
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    ours.iterate(kept)
    with torch.profiler.profile(activities=kinds) as found:
        ours.iterate(kept)
    return found.key_averages().table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=25)


def report(result: dict) -> str:
    """The tables, in Markdown."""
    setting = result["setting"]
    title = f"## One LPO iteration, {setting['size']}, {setting['dtype']}{', compiled' * setting['compile']}"
    lines = [", ".join([title, *setting["set"]]), ""]
    lines += [measure.name_of(result["machine"]), ""]
    for kept, found in result["kept"].items():
        trained = min(int(kept), found["drawn"])
        lines += [f"{trained} pairs of {found['drawn']} trained on:", "", _seconds(found), ""]
        lines += [_counts(found), ""]
        if "agreement" in found:
            agreed = found["agreement"]
            words = f"gradients agree to {agreed['gradients']:.0e}, losses to {agreed['losses']:.0e}"
            lines += [f"Both chose {agreed['pairs']:.0%} of the pairs alike; on the same pairs {words}.", ""]
        if "first_compiled_iteration" in found:
            lines += [f"The first compiled iteration took {found['first_compiled_iteration']:.0f} s.", ""]
    if result["memory"]:
        peaks = result["memory"]
        words = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in peaks.items())
        if "naive" in peaks:
            words += f", ratio {peaks['ours'] / peaks['naive']:.2f}"
        lines += [f"Peak memory, each pattern in a process of its own: {words}.", ""]
    return "\n".join(lines)


def _seconds(found: dict) -> str:
    names = [name for name in ("ours", "naive") if name in found]
    rows = []
    for phase in (*PHASES, "all"):
        cells = [f"{found[n]['seconds'][phase]['median']:.3f}" for n in names]
        if "ratio" in found:
            ratio = found["ratio"][phase]
            cells.append(f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})")
        rows.append([phase, *cells])
    if found[names[0]]["processor_seconds"]["most"] > 0:
        cells = [f"{found[n]['processor_seconds']['median']:.3f}" for n in names]
        if "ratio" in found:
            ratio = found["ratio"]["processor"]
            cells.append(f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})")
        rows.append(["all, processor time", *cells])
    titles = [f"{n}, s" for n in names] + (["ours / naive, least to most"] if "ratio" in found else [])
    return measure.table(["", *titles], rows)


def _counts(found: dict) -> str:
    names = [name for name in ("ours", "naive") if name in found]
    kinds = ("policy", "policy with gradients", "reference", "LRM")
    rows = [[f"rows through {kind}", *(str(found[n]["rows"].get(kind, 0)) for n in names)] for kind in kinds]
    rows += [[f"TFLOP of {phase}", *(f"{found[n]['tflop'][phase]:.3f}" for n in names)] for phase in PHASES]
    rows.append(["achieved TFLOP/s", *(f"{found[n]['tflop_per_second']:.3f}" for n in names)])
    return measure.table(["", *names], rows)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        result = run(arguments, Path(name))
    if arguments.memory_of:
        print(result["peak"])
        return 0
    result["memory"] = {}
    if not arguments.no_memory:
        result["memory"] = {
            name: measure.in_child("benchmarks.lpo_iteration", arguments, "--memory-of", name)
            for name in (("ours",) if arguments.no_naive else ("ours", "naive"))
        }
    print(report(result))
    measure.write(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
