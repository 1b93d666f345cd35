"""The commands as a person runs them: scoring, sampling, tracing, stopping and resuming, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lpo.__main__ import main
from lpo.lrm_files import export_official
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.trace import load_trace, score_trace

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE, LRM = str(GOLDEN / "tiny_sd15"), str(GOLDEN / "lrm_sd15")


@pytest.fixture
def inputs(tmp_path):
    """Four latents with timesteps and prompts, one of them empty, and where scores go."""
    tensors = {"latents": normal((4, 4, 16, 16), "cli"), "timesteps": torch.tensor([1, 251, 501, 951])}
    save_file(tensors, tmp_path / "latents.safetensors")
    prompts = ["the cat", "", "on the hill", "the cat"]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return tmp_path, tensors, prompts


def score(folder, lrm, *extra) -> int:
    return main(["score", "--lrm", str(lrm), "--latents", str(folder / "latents.safetensors"), "--prompts",
                 str(folder / "prompts.json"), "--out", str(folder / "out.json"), *extra])  # fmt: skip


def test_score_takes_official_and_own_folders_and_export_reads_back(inputs):
    folder, tensors, prompts = inputs
    assert score(folder, LRM, "--base", BASE) == 0
    scores = json.loads((folder / "out.json").read_text())["scores"]
    lrm = LatentRewardModel.from_pretrained(LRM, base=BASE, device="cpu")
    with torch.no_grad():
        alone = [
            lrm.score(tensors["latents"][i : i + 1], tensors["timesteps"][i : i + 1], [prompts[i]]).item()
            for i in range(4)
        ]
    assert scores == pytest.approx(alone, abs=1e-4)
    lrm.save(folder / "own")
    assert "_name_or_path" not in (folder / "own" / "lrm.json").read_text()
    assert score(folder, folder / "own") == 0
    assert json.loads((folder / "out.json").read_text())["scores"] == scores
    lrm.temperature = 2.0
    lrm.save(folder / "own")
    assert score(folder, folder / "own") == 0
    halved = json.loads((folder / "out.json").read_text())["scores"]
    assert halved == pytest.approx([s / 2 for s in scores], rel=1e-5)
    export_official(lrm, folder / "official", BASE)
    assert score(folder, folder / "official", "--base", BASE) == 0
    assert json.loads((folder / "out.json").read_text())["scores"] == pytest.approx(halved, rel=1e-5)
    stock = load_file(folder / "official" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(key.startswith("up_blocks.3.") for key in stock)  # so that the official code can load it


def test_sample_gives_a_seed_the_same_picture_whatever_the_batch(tmp_path):
    common = ["sample", "--base", BASE, "--steps", "3", "--eta", "1", "--device", "cpu"]
    assert main([*common, "--prompts", "the cat", "and", "--seeds", "3", "4", "--run-dir", str(tmp_path / "a")]) == 0
    assert (
        main([*common, "--prompts", "and", "--seeds", "4", "--batch_size", "1", "--run-dir", str(tmp_path / "b")]) == 0
    )
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert [(p["prompt"], p["seed"]) for p in result["pictures"]] == [
        ("the cat", 3), ("the cat", 4), ("and", 3), ("and", 4)]  # fmt: skip
    one, other = (Image.open(tmp_path / p / "samples" / f) for p, f in
                  [("a", "prompt1_seed4.png"), ("b", "prompt0_seed4.png")])  # fmt: skip
    assert max(abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_trace_ends_in_the_sampled_picture_and_is_scored(tmp_path):
    args = ["--base", BASE, "--steps", "3", "--eta", "1", "--seeds", "3", "--device", "cpu"]
    assert (
        main(["trace", *args, "--prompt", "and", "--lrm", LRM, "--siblings", "3", "--run-dir", str(tmp_path / "t")])
        == 0
    )
    assert main(["sample", *args, "--prompts", "and", "--run-dir", str(tmp_path / "s")]) == 0
    traced, sampled = tmp_path / "t" / "samples" / "seed3.png", tmp_path / "s" / "samples" / "prompt0_seed3.png"
    assert Image.open(traced).tobytes() == Image.open(sampled).tobytes()
    scores = json.loads((tmp_path / "t" / "scores.json").read_text())
    assert scores["timesteps"] == [667, 334, 1, 0]
    stored = load_trace(tmp_path / "t" / "traces" / "seed3.safetensors")
    lrm = LatentRewardModel.from_pretrained(LRM, base=BASE, device="cpu")
    assert scores["scores"][LRM][0] == pytest.approx(score_trace(lrm, stored), abs=1e-4)
    first = scores["siblings"][LRM][0]
    assert len(first["scores"]) == 3 and first["t"] == 334
    column = [row[0] for row in first["scores"]]
    assert column[first["winner"][0]] == max(column) and column[first["loser"][0]] == min(column)
    assert column[0] == pytest.approx(scores["scores"][LRM][0][1], abs=1e-4)  # sibling 0 is the one taken


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], None),
        (["paint"], "invalid choice"),
        (["train-lpo", "--run-dir", "{tmp}/r", "--steps", "0"], "steps is 0"),
        (["train-lpo", "--run-dir", "{tmp}/r", "--preset", "best"], "no preset 'best'"),
        (["train-lpo", "--prompts", "x.json"], "--run-dir"),
        (["train-lpo", "--run-dir", "{tmp}/r", "--config", "{tmp}/none.json"], "cannot be read"),
        (["train-lpo", "--run-dir", "{tmp}/r", "--prompts", "{tmp}/none.json"], "no prompt file"),
        (["train-lpo", "--run-dir", "{tmp}/nowhere", "--resume"], "no run to resume"),
        (["sample", "--run-dir", "{tmp}/r", "--base", "{tmp}", "--prompts", "x"], "model_index.json"),
        (["sample", "--run-dir", "{tmp}/r", "--base", "{tmp}/gone", "--prompts", "x"], "no model at"),
        (["sample", "--run-dir", "{tmp}/r", "--base", BASE, "--prompts", "x", "--device", "cuda:9"], "cuda:9"),
        (["sample", "--run-dir", "{tmp}/r", "--base", BASE, "--prompts", "x", "--height", "72"], "128 x 72 pixels"),
        (["sample", "--run-dir", "{tmp}/r", "--base", BASE], "at least one prompt"),
        (["score", "--lrm", LRM, "--latents", "{tmp}/l", "--prompts", "{tmp}/p", "--out", "{tmp}/o"], "not a readable"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, argv, words):
    code = main([a.replace("{tmp}", str(tmp_path)) for a in argv])
    err = capsys.readouterr().err
    if words is None:
        assert code == 0
        return
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1
    log = tmp_path / "r" / "log.txt"
    assert not log.exists() or log.read_text().splitlines()[-1].startswith("error: ")


def test_score_refuses_what_does_not_match(inputs, capsys):
    folder, tensors, _ = inputs
    assert score(folder, LRM) == 2
    assert "--base" in capsys.readouterr().err
    (folder / "prompts.json").write_text(json.dumps(["one"]))
    assert score(folder, LRM, "--base", BASE) == 2
    assert "4" in capsys.readouterr().err
    save_file({"latents": tensors["latents"]}, folder / "latents.safetensors")
    assert score(folder, LRM, "--base", BASE) == 2
    assert "timesteps" in capsys.readouterr().err


def cpu_seconds(pid: int) -> float:
    """Processor time a running process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_sigterm_saves_and_resume_gives_the_same_adapter(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(["the cat", "and then", "on the hill"]))
    command = [sys.executable, "-m", "lpo", "train-lpo"]
    settings = ["--base", BASE, "--lrm", LRM, "--prompts", str(tmp_path / "p.json"), "--device", "cpu",
                "--iterations", "4", "--steps", "5", "--prompts_per_iteration", "2", "--train_batch_size", "4",
                "--threshold_min", "0", "--threshold_max", "0", "--save_every", "100"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train-lpo", *settings, "--run-dir", str(whole)]) == 0
    # Bit for bit holds at one thread count, and other tests of this process may have changed it.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*command, *settings, "--run-dir", str(cut)], stdout=subprocess.DEVNULL, env=threads)
    try:
        metrics = cut / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not metrics.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        before = cpu_seconds(process.pid)
        process.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        process.kill()
    assert os.waitstatus_to_exitcode(status) == 3
    # Seconds of work, not of waiting for a busy machine's attention.
    assert usage.ru_utime + usage.ru_stime - before < 10
    assert not (cut / "result.json").exists()
    assert main(["train-lpo", *settings, "--run-dir", str(cut), "--resume"]) == 0  # the same command again, and further
    ours, theirs = (load_file(d / "checkpoints/final/pytorch_lora_weights.safetensors") for d in (whole, cut))
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)

    def rows(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "left_s")} for line in lines]

    assert rows(whole) == rows(cut)
    assert main(["train-lpo", "--run-dir", str(cut), "--resume"]) == 2  # finished


def test_a_full_disk_ends_a_training_with_a_sentence_and_it_resumes(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.json").write_text(json.dumps(["the cat", "and then"]))
    run, saves, real = tmp_path / "run", [], torch.save

    def full(state, path):
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    settings = ["--base", BASE, "--lrm", LRM, "--prompts", str(tmp_path / "p.json"), "--device", "cpu", "--iterations",
                "2", "--steps", "3", "--prompts_per_iteration", "1", "--threshold_min", "0", "--threshold_max", "0",
                "--save_every", "1", "--eval_every", "100", "--eval_count", "1"]  # fmt: skip
    assert main(["train-lpo", *settings, "--run-dir", str(run)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: The disk with {run} is full: make room on it and resume; what was saved before is whole.\n"
    assert (run / "log.txt").read_text().endswith(said)
    assert load_file(run / "checkpoints/step-000001/pytorch_lora_weights.safetensors")
    assert main(["train-lpo", "--run-dir", str(run), "--resume"]) == 0
    assert "resumed after step 1" in (run / "log.txt").read_text() and (run / "result.json").exists()
