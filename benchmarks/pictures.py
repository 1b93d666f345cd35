"""Seconds for four pictures: sampling with guidance, then the VAE.

python -m benchmarks.pictures --size scenes
python -m benchmarks.pictures --size sdxl --device cuda --compile
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import measure, models
from benchmarks.measure import Meter
from lpo.backbones import load_policy
from lpo.config import Policy, SampleConfig
from lpo.sampling import sample

PROMPT, PICTURES = "a red circle above a small blue star", 4


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.flags(__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(argv)
    measure.resolve(arguments)
    return arguments


def run(arguments: argparse.Namespace, _folder: Path) -> dict:
    """All numbers of the benchmark."""
    meter = Meter(arguments.device)
    base = models.base_of(arguments.size, arguments.models, arguments.dtype, arguments.device)

    def load():
        policy = load_policy(Policy(base), arguments.device, arguments.dtype)
        meter.watch(policy.unet, "policy")
        policy.decode = meter.timed("decoding", policy.decode)
        return policy

    def draw(policy) -> dict[str, float]:
        meter.reset()
        with meter("sampling"):
            list(sample(policy, [PROMPT], seeds=range(PICTURES), steps=arguments.steps, batch_size=PICTURES))
        return meter.steady()

    if arguments.memory_of:
        return {"peak": measure.peak_of(arguments.device, lambda: draw(load()))}
    policy = load()
    with meter.counting_flops():
        draw(policy)
    rows, tflop = dict(meter.rows), {k: v / 1e12 for k, v in meter.flops.items()}
    if arguments.compile:
        policy.tune(SampleConfig(compile=True))
    draw(policy)
    runs = [draw(policy) for _ in range(arguments.repeats)]
    seconds = {phase: measure.spread([run[phase] for run in runs]) for phase in ("sampling", "decoding")}
    seconds["all"] = measure.spread([sum(run.values()) for run in runs])
    return {
        "setting": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "machine": measure.machine(arguments.device),
        "rows": rows,
        "tflop": tflop,
        "seconds": seconds,
        "tflop_per_second": sum(tflop.values()) / seconds["all"]["median"],
    }


def report(result: dict) -> str:
    """The table, in Markdown."""
    setting, seconds = result["setting"], result["seconds"]
    rows = [
        [phase, f"{took['median']:.3f} s ({took['least']:.3f} to {took['most']:.3f})"]
        for phase, took in seconds.items()
    ]
    rows.append(["rows through the policy", str(result["rows"]["policy"])])
    rows += [[f"TFLOP of {phase}", f"{value:.3f}"] for phase, value in result["tflop"].items()]
    rows.append(["achieved TFLOP/s", f"{result['tflop_per_second']:.3f}"])
    rows += [["peak memory", measure.gib(peak)] for peak in result["memory"].values()]
    title = f"## Four pictures, {setting['size']}, {setting['dtype']}, {setting['steps']} steps"
    title += ", compiled" * setting["compile"]
    return "\n".join([title, "", measure.name_of(result["machine"]), "", measure.table(["", ""], rows), ""])


def main(argv: list[str] | None = None) -> int:
    return measure.carry_out("benchmarks.pictures", parse(argv), run, report)


if __name__ == "__main__":
    sys.exit(main())
