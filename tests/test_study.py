"""The study at its smallest: simulated annotators, an LRM, an adapter, verdicts, tables and a figure."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.study_ceiling import ceiling
from benchmarks.study_report import gain_table

ROOT = Path(__file__).resolve().parent.parent


def study(out: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.study", "--plan", "quick", "--out", str(out), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_quick_study_prints_its_tables_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "study"
    report = study(out)
    assert "| alignment | 0 | 1 |" in report
    assert "| style | 16 | 2 |" in report
    assert report.count("→") >= 4
    assert (out / "curves.svg").read_text().startswith("<?xml")
    for taste in ("alignment", "style"):
        verdict = json.loads((out / "verdict" / f"{taste}-0.json").read_text())
        assert len(verdict["votes"]) == len(verdict["base"]["judge"]) == len(verdict["lpo"]["style"]) == 4
        assert set(verdict["votes"]) <= {"first", "second", "tie"}

    before = {file: file.stat().st_mtime_ns for file in (out / "accuracy").iterdir()}
    (out / "verdict" / "style-0.json").unlink()
    study(out)
    assert (out / "verdict" / "style-0.json").exists()
    assert {file: file.stat().st_mtime_ns for file in (out / "accuracy").iterdir()} == before


def test_the_gain_over_the_warm_start_is_paired_by_noisy_pair(tmp_path):
    (tmp_path / "accuracy").mkdir()
    prompts, timesteps = [f"prompt {i}" for i in range(40)], [1, 601, 901]
    without = [[float(i % 2) for i in range(40)]] * 3
    better = [[1.0] * 40, [float(i % 2) for i in range(40)], [0.0] * 40]  # +0.5 at t = 1, 0 at 601, -0.5 at 901
    for name, correct in (("style-0-0", without), ("style-50-0", better), ("style-50-1", better)):
        found = {"timesteps": timesteps, "prompts": prompts, "correct": correct}
        (tmp_path / "accuracy" / f"{name}.json").write_text(json.dumps(found))
    row = gain_table(tmp_path).splitlines()[-1]
    assert row.startswith("| style | 50 | +0.250 (+0.") and "| +0.000 (" in row


def test_the_ceiling_is_what_noise_leaves_readable():
    rng = np.random.default_rng(0)
    values, group = rng.normal(size=400), np.repeat(np.arange(200) % 5, 2)
    carrier = rng.normal(size=6)

    def readable(noise: float) -> tuple[float, float]:
        return ceiling(values[:, None] * carrier + noise * rng.normal(size=(3, 400, 6)), values, group, 1.0)

    assert readable(0.0) == (1.0, 1.0)
    assert 0.85 < readable(1.0)[0] < readable(1.0)[1]
    assert 0.4 < readable(100.0)[0] < 0.6
