"""The tables and the figure of a study, from the files that study.py left behind.

python -m benchmarks.study_report study        # prints the tables again; writes report.md and curves.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.statistics import clustered_mean, paired_difference, win_rate

if TYPE_CHECKING:
    from benchmarks.study import Plan

OUTCOMES = {"first": "a", "second": "b", "tie": "tie"}  # the LPO picture is shown first to the simulated annotator


def write_report(out: Path, plan: Plan) -> str:
    """Markdown of every table; also written to `out`/report.md, with the figure beside it as curves.svg."""
    parts = {
        "Labels and the LRM": [accuracy_table(out), gain_table(out)],
        "LPO": [verdict_table(out)],
        "Minutes": [minutes_table(out)],
    }
    text = "\n\n".join(part for title, tables in parts.items() for part in (f"## {title}", *tables))
    (out / "report.md").write_text(text + "\n")
    draw(out, plan)
    return text


def accuracies(out: Path) -> dict[tuple[str, int], list[dict]]:
    """The accuracy files of the study by (taste, number of labels), one entry per seed."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for file in sorted((out / "accuracy").glob("*.json")):
        taste, count, _ = file.stem.split("-")
        groups.setdefault((taste, int(count)), []).append(json.loads(file.read_text()))
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])))


def at_timestep(runs: list[dict], row: int) -> tuple[float, float, float]:
    """Mean accuracy over seeds at one timestep with its 95 % interval clustered by prompt."""
    correct = [value for run in runs for value in run["correct"][row]]
    prompts = [prompt for run in runs for prompt in run["prompts"]]
    estimate = clustered_mean(correct, prompts)
    return estimate.value, estimate.low, estimate.high


def accuracy_table(out: Path) -> str:
    groups = accuracies(out)
    timesteps = next(iter(groups.values()))[0]["timesteps"]
    lines = [
        "| taste | labels | seeds | " + " | ".join(f"t = {t}" for t in timesteps) + " |",
        "|---" * (3 + len(timesteps)) + "|",
    ]
    for (taste, count), runs in groups.items():
        cells = ["{:.2f} ({:.2f}–{:.2f})".format(*at_timestep(runs, row)) for row in range(len(timesteps))]
        lines.append(f"| {taste} | {count} | {len(runs)} | " + " | ".join(cells) + " |")
    pairs = {taste: len(runs[0]["prompts"]) for (taste, _), runs in groups.items()}
    return (
        "\n".join(lines) + "\n\nHeld-out pairs without ties: " + ", ".join(f"{t} {n}" for t, n in pairs.items()) + "."
    )


def gain_table(out: Path) -> str:
    """What labels add to the warm start: accuracy with labels minus accuracy with none, on the same noisy pairs."""
    groups = accuracies(out)
    lines = ["| taste | labels | gain over the warm start, t <= 601 | over all t |", "|---" * 4 + "|"]
    for (taste, count), runs in groups.items():
        start = groups.get((taste, 0))
        if not count or not start:
            continue
        early = [row for row, t in enumerate(start[0]["timesteps"]) if t <= 601]
        cells = []
        for rows in (early, range(len(start[0]["timesteps"]))):
            with_labels = [np.mean([run["correct"][row] for row in rows], axis=0) for run in runs]
            without = np.mean([start[0]["correct"][row] for row in rows], axis=0)
            cells.append(
                paired_difference(np.concatenate(with_labels), np.tile(without, len(runs)),
                                  [prompt for run in runs for prompt in run["prompts"]])
            )
        lines.append(f"| {taste} | {count} | " + " | ".join(map(signed, cells)) + " |")
    return "\n".join(lines)


def verdict_table(out: Path) -> str:
    """One row per LPO run, and one per taste over all of its seeds."""
    lines = [
        "| taste | seed | judge, base → LPO | difference | style, base → LPO | difference in sd "
        "| LRM (in-sample) | other LRM | win rate |",
        "|---" * 9 + "|",
    ]
    verdicts: dict[str, list[tuple[str, dict]]] = {}
    for file in sorted((out / "verdict").glob("*.json")):
        taste, seed = file.stem.split("-")
        verdicts.setdefault(taste, []).append((seed, json.loads(file.read_text())))
    rows = [(taste, seed, data) for taste, runs in verdicts.items() for seed, data in runs]
    rows += [(taste, "all", _together([data for _, data in runs])) for taste, runs in verdicts.items() if len(runs) > 1]
    for taste, seed, data in sorted(rows, key=lambda row: row[0]):
        base, lpo, prompts = data["base"], data["lpo"], data["prompts"]
        spread = float(np.std(base["style"]))
        judged = paired_difference(lpo["judge"], base["judge"], prompts)
        style = paired_difference(np.divide(lpo["style"], spread), np.divide(base["style"], spread), prompts)
        rewards = [paired_difference(lpo[key], base[key], prompts) for key in ("lrm", "lrm_other")]
        won = win_rate([(prompt, OUTCOMES[vote]) for prompt, vote in zip(prompts, data["votes"], strict=True)])
        cells = [
            taste,
            seed,
            f"{np.mean(base['judge']):.3f} → {np.mean(lpo['judge']):.3f}",
            signed(judged),
            f"{np.mean(base['style']):.3f} → {np.mean(lpo['style']):.3f}",
            signed(style),
            *map(signed, rewards),
            f"{won.rate:.2f} ({won.low:.2f}–{won.high:.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _together(runs: list[dict]) -> dict:
    """The verdicts of several seeds as one: their pictures side by side, of one prompt in one cluster."""
    whole = {key: [value for run in runs for value in run[key]] for key in ("prompts", "votes")}
    for who in ("base", "lpo"):
        whole[who] = {key: [value for run in runs for value in run[who][key]] for key in runs[0][who]}
    return whole


def minutes_table(out: Path) -> str:
    """Wall-clock minutes of each cached part, as it ran on the machine of the study."""
    lines = ["| part | minutes |", "|---|---|"]
    for file in sorted((out / "pictures").glob("*/done.json")):
        done = json.loads(file.read_text())
        lines.append(f"| {done['count']} pictures, {file.parent.name} | {done['seconds'] / 60:.1f} |")
    for file in sorted(out.glob("l*/*/metrics.jsonl")):
        last = json.loads(file.read_text().splitlines()[-1])
        lines.append(f"| {file.parent.parent.name.upper()} {file.parent.name} | {last['seconds'] / 60:.1f} |")
    return "\n".join(lines)


def draw(out: Path, plan: Plan) -> None:
    """curves.svg: held-out accuracy against timestep, a line for each number of labels, a panel for each taste."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = accuracies(out)
    tastes = sorted({taste for taste, _ in groups})
    figure, panels = pyplot.subplots(1, len(tastes), figsize=(5.2 * len(tastes), 3.6), sharey=True, squeeze=False)
    shades = pyplot.get_cmap("viridis_r")(np.linspace(0.15, 1, len(plan.sizes)))
    for panel, taste in zip(panels[0], tastes, strict=True):
        for shade, count in zip(shades, plan.sizes, strict=True):
            runs = groups.get((taste, count))
            if not runs:
                continue
            middle, low, high = np.array([at_timestep(runs, row) for row in range(len(runs[0]["timesteps"]))]).T
            panel.plot(runs[0]["timesteps"], middle, color=shade, label=f"{count} labels" if count else "warm start")
            panel.fill_between(runs[0]["timesteps"], low, high, color=shade, alpha=0.15, linewidth=0)
        panel.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(title=taste, xlabel="timestep t (noise → left to right: more)", xlim=(0, 1000))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out accuracy")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "curves.svg")
    pyplot.close(figure)


def signed(estimate) -> str:
    """A difference with its interval, as a cell of a table."""
    value, low, high = (round(one, 3) + 0.0 for one in (estimate.value, estimate.low, estimate.high))  # no -0.000
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    from benchmarks.study import Plan

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what study.py wrote")
    folder = parser.parse_args().folder
    if not (folder / "plan.json").is_file():
        parser.error(f"{folder} holds no study (no plan.json)")
    saved = json.loads((folder / "plan.json").read_text())
    print(write_report(folder, Plan(**saved)))
