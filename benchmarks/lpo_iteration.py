"""One LPO iteration: seconds of sampling, scoring and training, network evaluations, TFLOP/s and peak memory, beside
the pattern of the official code (benchmarks/naive.py), measured in the same run, alternating.

    python -m benchmarks.lpo_iteration --size tiny
    python -m benchmarks.lpo_iteration --size sd15 --device cuda --compile --out sd15.json

The maths is that of the `official` preset. Both patterns must choose the same pairs, and agree on every loss and on the
gradients of the first minibatch, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.lpo_patterns import Ours, agreement, config_of, make, reset, write_prompts
from benchmarks.measure import Meter

PHASES = ("sampling", "scoring", "training")


def parse(argv: list[str] | None, about: str = __doc__) -> argparse.Namespace:
    parser = measure.flags(about.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--siblings", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--train-batch-size", type=int, default=10)
    parser.add_argument("--kept", type=int, nargs="+", default=[28, 100], help="pairs trained on (the first so many)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both patterns")
    parser.add_argument("--micro-batch-size", type=int, help="pairs in one forward of ours; less memory, same maths")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of train-lpo, for ours alone"
    )
    parser.add_argument("--no-naive", action="store_true", help="measure ours alone")
    parser.add_argument("--profile", action="store_true", help="also print where one iteration of ours spends its time")
    arguments = parser.parse_args(argv)
    measure.resolve(arguments)
    if arguments.set:
        arguments.no_naive = True  # it knows the official maths only
    return arguments


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
        words = ", ".join(f"{name} {measure.gib(size)}" for name, size in peaks.items())
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
    patterns = ["ours"] if arguments.no_naive else ["ours", "naive"]
    return measure.carry_out("benchmarks.lpo_iteration", arguments, run, report, patterns)


if __name__ == "__main__":
    sys.exit(main())
