"""The whole method on SDXL through the commands, and in half precision: nothing above a backbone knows which it is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_latent_space import write_pairs

from lpo.__main__ import main
from lpo.backbones import load_policy
from lpo.config import LPOConfig, Policy
from lpo.lpo_trainer import LPOTrainer
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.run_dir import Run
from lpo.sampling import sample


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_models.write_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny_sdxl")


LPO = ["--iterations", "3", "--steps", "4", "--prompts_per_iteration", "2", "--train_batch_size", "3",
       "--siblings", "2", "--threshold_min", "0", "--threshold_max", "0", "--save_every", "100", "--eval_every", "1",
       "--eval_seeds", "1", "--lr", "1e-3", "--gradient_checkpointing", "true", "--device", "cpu"]  # fmt: skip


def test_train_trace_and_score(base, tmp_path):
    """train-lrm, train-lpo with a stop in between, trace and score on one tiny SDXL."""
    (tmp_path / "pairs.jsonl").write_text(write_pairs(tmp_path))
    (tmp_path / "p.json").write_text(json.dumps(["the cat", "and then", "on the hill"]))
    (tmp_path / "e.json").write_text(json.dumps(["one two"]))
    lrm_run = tmp_path / "lrm"
    assert main(["train-lrm", "--base", base, "--init", "base", "--pairs", str(tmp_path / "pairs.jsonl"),
                 "--steps", "3", "--batch_size", "2", "--timesteps", "5", "--lr", "1e-3", "--fit_start", "true",
                 "--gradient_checkpointing", "true", "--device", "cpu", "--run-dir", str(lrm_run)]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (lrm_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    lrm = str(lrm_run / "checkpoints" / "final")

    files = ["--base", base, "--lrm", lrm, "--prompts", str(tmp_path / "p.json"), "--eval_prompts",
             str(tmp_path / "e.json")]  # fmt: skip
    assert main(["train-lpo", *files, *LPO, "--run-dir", str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number rounds otherwise
    process = subprocess.Popen([sys.executable, "-m", "lpo", "train-lpo", *files, *LPO, "--run-dir", str(cut)],
                               stdout=subprocess.DEVNULL, env=threads)  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (cut / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 3
    finally:
        process.kill()
    assert main(["train-lpo", "--run-dir", str(cut), "--resume"]) == 0
    ours, theirs = (load_file(tmp_path / d / "checkpoints/final/pytorch_lora_weights.safetensors")
                    for d in ("whole", "cut"))  # fmt: skip
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in ours)
    assert (cut / "samples" / "step_000002" / "prompt0_seed0.png").exists()

    adapter = str(cut / "checkpoints" / "final")
    trace = tmp_path / "trace"
    assert main(["trace", "--base", base, "--adapters", adapter, "--lrm", lrm, "--prompt", "the cat", "--steps", "3",
                 "--siblings", "2", "--device", "cpu", "--run-dir", str(trace)]) == 0  # fmt: skip
    scored = json.loads((trace / "scores.json").read_text())["scores"][lrm][0]
    x_t = load_file(trace / "traces" / "seed0.safetensors")["x_t"]
    times = json.loads((trace / "scores.json").read_text())["timesteps"]
    save_file({"latents": x_t, "timesteps": torch.tensor(times)}, tmp_path / "x.safetensors")
    (tmp_path / "four.json").write_text(json.dumps(["the cat"] * len(times)))
    assert main(["score", "--lrm", lrm, "--base", base, "--latents", str(tmp_path / "x.safetensors"), "--prompts",
                 str(tmp_path / "four.json"), "--out", str(tmp_path / "out.json"), "--device", "cpu"]) == 0  # fmt: skip
    assert json.loads((tmp_path / "out.json").read_text())["scores"] == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_half_precision_stays_near_full(kind, base, tmp_path):
    """bfloat16 resident weights, fp32 adapters: sampling, scoring and one LPO iteration."""
    golden = tiny_models.GOLDEN
    base, lrm_path = (str(golden / "tiny_sd15"), str(golden / "lrm_sd15")) if kind == "sd" else (base, None)
    if lrm_path is None:
        lrm_path = tiny_models.write_official_sdxl_lrm(tmp_path / "lrm", base)
    found = {}
    (tmp_path / "p.json").write_text(json.dumps(["the cat", "on the hill"]))
    for dtype in ("float32", "bfloat16"):
        policy = load_policy(Policy(base), "cpu", dtype)
        assert str(policy.unet.dtype) == f"torch.{dtype}"
        pictures = [picture for _, _, picture in sample(policy, ["the cat"], (0, 1), steps=3)]
        pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]).float()
        lrm = LatentRewardModel.from_pretrained(lrm_path, base=base, device="cpu", dtype=dtype)
        assert lrm.visual_projection.weight.dtype == torch.float32
        with torch.no_grad():
            scores = lrm.score(normal((8, 4, 16, 16), "half"), torch.arange(1, 999, 125), ["the cat", "on"] * 4)
        config = LPOConfig(
            policy=Policy(base), lrm=lrm_path, prompts=str(tmp_path / "p.json"), iterations=1, steps=3, siblings=2,
            prompts_per_iteration=2, train_batch_size=4, threshold_min=0.0, threshold_max=0.0, lr=1e-3, lora_rank=2,
            device="cpu", dtype=dtype,
        )  # fmt: skip
        trainer = LPOTrainer(config, Run.create(tmp_path / dtype, {}))
        assert all(weight.dtype == torch.float32 for weight in trainer.weights.values())
        (row,) = [metrics for metrics in trainer.train() if metrics is not None]
        assert all(torch.isfinite(weight).all() for weight in trainer.weights.values())
        found[dtype] = pixels, scores, row
    full, half = found["float32"], found["bfloat16"]
    # Of 255; guidance 5 multiplies what rounding leaves, most in golden's untrained model (3.5; SDXL stays below 3).
    assert float((full[0] - half[0]).abs().mean()) < 6
    assert torch.isfinite(half[1]).all() and float((full[1] - half[1]).abs().max()) < 0.1 * float(full[1].abs().max())
    assert half[2]["pairs"] == full[2]["pairs"] and half[2]["loss"] == pytest.approx(full[2]["loss"], rel=0.05)
