"""What the settings that change the maths cost: network rows and seconds of one LPO iteration, alternating in one run.

    python -m benchmarks.variants --size scenes

Every pair is trained on. Rows are exact; seconds are the processor's on a CPU, wall-clock on a GPU. The gap is the mean
of p_winner - p_loser among the siblings of the untrained policy: how clear the choices are that training sees.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import lpo_iteration, measure
from benchmarks.lpo_patterns import Ours, config_of, reset, write_prompts
from benchmarks.measure import Meter

VARIANTS = {
    "official": [],
    "t >= 701, `t_min=701`": ["t_min=701"],
    "two antithetic siblings, `siblings=2 antithetic=true`": ["siblings=2", "antithetic=true"],
    "both": ["t_min=701", "siblings=2", "antithetic=true"],
    "four antithetic siblings, `antithetic=true`": ["antithetic=true"],
    "siblings at their own timestep, `score_timestep=own`": ['score_timestep="own"'],
    "equal weight of steps, `timestep_weighting=equal`": ['timestep_weighting="equal"'],
    "beta per nat, `beta_unit=nat beta=0.0305`": ['beta_unit="nat"', "beta=0.0305"],
}


def run(argv: list[str], folder: Path) -> dict:
    """All numbers of the benchmark; `argv` are flags of benchmarks.lpo_iteration."""
    patterns, meters, all_pairs = {}, {}, 10**6
    for i, (name, changes) in enumerate(VARIANTS.items()):
        arguments = lpo_iteration.parse([*argv, "--set", *changes], __doc__)
        place = folder / str(i)
        place.mkdir()
        config = config_of(arguments, write_prompts(place, arguments.prompts))
        meters[name] = Meter(arguments.device)
        patterns[name] = Ours(config, place, meters[name])

    def once(name: str) -> dict[str, float]:
        reset(patterns[name])
        meters[name].reset()
        patterns[name].iterate(all_pairs)
        return meters[name].steady()

    gaps = {}
    for name, pattern in patterns.items():
        pattern.iterate(all_pairs)  # the adapter is still fresh: the policy is the base
        gaps[name] = pattern.trainer.sums["gap"]
    rows = {name: dict(meter.rows) for name, meter in meters.items()}
    runs = measure.alternate({name: lambda name=name: once(name) for name in patterns}, arguments.repeats)
    totals = {name: [sum(run.values()) for run in several] for name, several in runs.items()}
    return {
        "setting": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "machine": measure.machine(arguments.device),
        "rows": rows,
        "gap": gaps,
        "seconds": {name: measure.spread(total) for name, total in totals.items()},
        "ratio": {name: measure.ratios(total, totals["official"]) for name, total in totals.items()},
    }


def report(result: dict) -> str:
    """The table, in Markdown."""
    lines = [f"## Different maths, {result['setting']['size']}", "", measure.name_of(result["machine"]), ""]
    kinds = ("policy", "policy with gradients", "LRM")
    rows = []
    for name, counted in result["rows"].items():
        ratio = result["ratio"][name]
        cells = [str(counted[kind]) for kind in kinds] + [f"{result['seconds'][name]['median']:.1f}"]
        cells.append(f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})")
        rows.append([name, *cells, f"{result['gap'][name]:.3f}"])
    titles = ["", *(f"rows, {kind}" for kind in kinds), "seconds", "of official", "gap"]
    return "\n".join([*lines, measure.table(titles, rows), ""])


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as name:
        result = run(argv, Path(name))
    print(report(result))
    measure.write(result, lpo_iteration.parse(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
