"""Two ranks on a CPU follow one process loss for loss, stop together, resume with another number, and fail together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lpo.config import ConfigError, LPOConfig, LRMConfig, Policy, to_dict
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_trainer import LRMTrainer
from lpo.ranks import ALONE, Together, join
from lpo.run_dir import STOPPED, Run
from lpo.training import run_training
from tests.conftest import ROOT, free_port, wait_for

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
LOOSE = ("drift", "drift_by_t", "margin")  # Adam's first step is lr times the sign of each gradient, however tiny


def lpo_settings(folder: Path, **changes) -> LPOConfig:
    """Nothing divides by two: 3 prompts a round, minibatches of 5, 3 held-out pictures. About half the pairs stay."""
    texts = {"prompts": ["the cat", "and then", "on the hill", "one two", "the end"], "eval_prompts": ["a", "b", "c"]}
    for name, prompts in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(prompts))
    files = {name: str(folder / f"{name}.json") for name in texts}
    settings = {
        "policy": Policy(BASE), "lrm": str(GOLDEN / "lrm_sd15"), **files,
        "iterations": 5, "prompts_per_iteration": 3, "train_batch_size": 5, "steps": 5, "siblings": 3, "beta": 31.0,
        "threshold": "none", "threshold_min": 0.02, "threshold_max": 0.02, "lr": 1e-3, "lora_rank": 2, "eval_every": 2,
        "eval_seeds": 1, "sample_count": 1, "save_every": 2, "device": "cpu",
    }  # fmt: skip
    return LPOConfig(**(settings | changes))


def few_prompts(folder: Path) -> LPOConfig:
    """One prompt a round for two ranks: the second samples nothing of its own."""
    return lpo_settings(folder, prompts_per_iteration=1, iterations=2, eval_prompts="")


def lrm_settings(folder: Path) -> LRMConfig:
    """Batches of 5 pairs with different weights, a tie among them."""
    if not (folder / "pairs.jsonl").exists():
        noise, rows = np.random.default_rng(0), []
        for k in range(12):
            for side in "ab":
                pixels = noise.integers(0, 256, (128, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}{side}.png")
            rows.append({"id": str(k), "prompt": f"prompt {k % 6}", "first": f"{k}a.png", "second": f"{k}b.png",
                         "target": (0.0, 1.0, 0.5)[k % 3], "weight": 1.0 + k % 2,
                         "split": "heldout" if k % 6 == 5 else "train"})  # fmt: skip
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return LRMConfig(
        base=BASE, init="base", pairs=str(folder / "pairs.jsonl"), lr=2e-4, steps=6, batch_size=5, warmup_steps=1,
        text_projection="identity", timesteps=5, eval_every=3, save_every=3, calibration=0.3, device="cpu",
    )  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "left_s")} for row in rows]


def follows(folder: Path, expected: list[dict]) -> bool:
    """Whether a run's metrics are those expected, up to rounding: every number, and each number per timestep."""
    rows = rows_of(folder)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            rounding = {"rel": 1e-3 if name in LOOSE else 1e-4, "abs": 1e-6}
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, **rounding)), name
    return True


def launch(*arguments: str, log: Path) -> subprocess.Popen:
    with open(log, "wb") as output:
        return subprocess.Popen([*LAUNCH, "--main_process_port", str(free_port()), *arguments], cwd=ROOT,
                                stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def alone(trainer_class, config, path: Path, stop_after: int = 0) -> list[dict]:
    """The metrics of one process's run in `path`, stopped after so many yields if that is given."""
    run = Run.create(path, {**to_dict(config), "command": "train-lpo"})
    trainer = trainer_class(config, run)
    if stop_after:
        steps = trainer.train()
        trainer.train = lambda: (run.request_stop() if i == stop_after else m for i, m in enumerate(steps, 1))
    assert run_training(trainer, run, resume=False) == (STOPPED if stop_after else 0)
    return [] if stop_after else rows_of(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process that all others must follow: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", alone(LPOTrainer, lpo_settings(folder), folder / "run")


def test_two_ranks_stop_together_and_one_process_goes_on(tmp_path, whole):
    _, expected = whole
    (tmp_path / "config.json").write_text(json.dumps(to_dict(lpo_settings(tmp_path))))
    cut, log = tmp_path / "run", tmp_path / "launch.log"
    command = ["-m", "lpo", "train-lpo", "--config", str(tmp_path / "config.json"), "--run-dir", str(cut)]
    process = launch(*command, log=log)
    try:
        wait_for(lambda: (cut / "metrics.jsonl").exists() or process.poll() is not None, what="the first iteration")
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2, log.read_text()
        ranks[1].send_signal(signal.SIGTERM)  # one is told, both stop
        process.wait(300)
    finally:
        process.kill()
    said = (cut / "log.txt").read_text()
    assert said.count("stopped after step") == 1 and "error" not in said
    assert "exitcode  : 3" in log.read_text()
    assert 1 <= len(rows_of(cut)) < 5
    run, _ = Run.resume(cut)
    trainer = LPOTrainer(lpo_settings(tmp_path), run)
    assert run_training(trainer, run, resume=True) == 0
    assert follows(cut, expected)
    kept = [row["kept_fraction"] for row in expected]
    assert min(kept) > 0.1 and max(kept) < 1.0, "the thresholds of this test should make kept pairs uneven"


def test_one_process_stops_and_two_ranks_go_on(tmp_path, whole):
    path, expected = whole
    cut, log = tmp_path / "run", tmp_path / "launch.log"
    alone(LPOTrainer, lpo_settings(tmp_path), cut, stop_after=11)  # between two minibatches: 5 + 5 steps come before
    state = torch.load(cut / "state" / "state.pt", weights_only=True)
    assert 0 < state["trained"] < len(state["pending"])
    process = launch("-m", "lpo", "train-lpo", "--run-dir", str(cut), "--resume", log=log)
    try:
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
    assert follows(cut, expected)
    said = (cut / "log.txt").read_text()
    assert said.count("finished") == 1 and said.count("step 5/5") == 1
    ours, theirs = (load_file(p / "checkpoints/final/pytorch_lora_weights.safetensors") for p in (path, cut))
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-3, atol=1e-5) for k in ours)
    for part in ("samples", "checkpoints"):
        files = [sorted(str(f.relative_to(p)) for f in (p / part).rglob("*.*")) for p in (path, cut)]
        assert files[0] == files[1]


def test_an_lrm_fewer_prompts_than_ranks_and_a_rank_that_fails(tmp_path):
    log = tmp_path / "worker.log"
    process = launch("-m", "tests.ranks_worker", str(tmp_path), log=log)
    try:
        expected = alone(LRMTrainer, lrm_settings(tmp_path), tmp_path / "lrm-one")
        few = alone(LPOTrainer, few_prompts(tmp_path), tmp_path / "few-one")
        assert process.wait(300) == 1, "the launcher's own code for a failed rank"
    finally:
        process.kill()
    assert (tmp_path / "broken").exists(), log.read_text()
    assert follows(tmp_path / "lrm-two", expected) and follows(tmp_path / "few-two", few)
    one, two = (json.loads((tmp_path / f"lrm-{n}" / "result.json").read_text()) for n in ("one", "two"))
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-3)
    assert two["heldout"]["log_loss"]["value"] == pytest.approx(one["heldout"]["log_loss"]["value"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / f"lrm-{n}/checkpoints/final/model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-3, atol=1e-4) for k in ours)
    # One sentence, that of the rank which failed; the other one ends by itself and adds nothing.
    said = (tmp_path / "broken" / "log.txt").read_text()
    assert said.count("error: ") == 1 and said.endswith("error: The second GPU fell off the bus.\n")
    assert "rank 0 ends with 2" in log.read_text()


def test_alone_exchanges_nothing_and_initialises_nothing():
    rows = torch.arange(6.0).view(3, 2)
    share = ALONE.share(3)
    assert share.rows == [0, 1, 2] and share.first == 0 and share.weights == [1, 1, 1]
    assert ALONE.gather(rows, 3) is rows and ALONE.gather_uneven(rows) is rows and ALONE.any(True)
    assert join("auto") is ALONE and not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_shares_cover_every_row_once_with_equal_work(n, count):
    shares = []
    for rank in range(count):
        ranks = Together.__new__(Together)  # no process group is needed to share
        ranks.rank, ranks.count = rank, count
        shares.append(ranks.share(n))
    assert len({len(share.rows) for share in shares}) == 1 and len(shares[0].rows) == -(-n // count)
    counted = [row for share in shares for row, weight in zip(share.rows, share.weights, strict=True) if weight]
    assert counted == list(range(n))
    assert all(0 <= row < n for share in shares for row in share.rows)


def test_devices_that_do_not_go_with_several_processes_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"cuda:1.*use auto"):
        join("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="1 GPUs"):
        join("auto")
