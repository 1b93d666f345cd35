"""The study at its smallest: simulated annotators, an LRM, an adapter, verdicts, tables and a figure."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study_ceiling import ceiling
from benchmarks.study_dpo import dpo_loss
from benchmarks.study_report import gain_table

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--plan", "quick", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_quick_study_prints_its_tables_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "study"
    report = run("study", out, "--threads", "1")
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
    run("study", out, "--threads", "1")
    assert (out / "verdict" / "style-0.json").exists()
    assert {file: file.stat().st_mtime_ns for file in (out / "accuracy").iterdir()} == before

    few = ("--beta", "500", "--lr", "1e-3", "1e-4", "--steps", "2", "--batch", "4", "--prompts", "4", "--seeds", "1")
    table = run("study_dpo", out, *few)
    assert table.count("| Diffusion-DPO, beta 500, lr 0.001, 2 steps |") + table.count("lr 0.0001, 2 steps |") == 3
    assert table.count("| LRM + LPO |") == 1


def test_the_loss_of_diffusion_dpo_is_the_published_one():
    errors = torch.tensor([[0.3, 0.5], [0.4, 0.2], [0.35, 0.5], [0.35, 0.2]], requires_grad=True)
    loss = dpo_loss(*errors, beta=200.0)
    inside = 200.0 * 0.5 * ((0.3 - 0.35) - (0.4 - 0.35))  # the policy predicts the winner better, and the loser worse
    assert loss.tolist() == pytest.approx([np.log1p(np.exp(inside)), np.log(2)], rel=1e-4)
    loss.sum().backward()
    assert (errors.grad[0] > 0).all() and (errors.grad[1] < 0).all()


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
