"""LPO training on a tiny model: what moves, what must not, and that a stopped run goes on bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch

from lpo.backbones import load_policy
from lpo.config import Adapter, ConfigError, LPOConfig, Policy
from lpo.export_plan import adapter_info
from lpo.lpo_trainer import LPOTrainer
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.run_dir import Run
from lpo.training import run_training

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")


def make(tmp_path, **changes) -> LPOTrainer:
    prompts, heldout = tmp_path / "prompts.json", tmp_path / "heldout.json"
    prompts.write_text(json.dumps(["the cat", "and then", "on the hill", "one two"]))
    heldout.write_text(json.dumps(["the dog"]))
    settings = {
        "policy": Policy(BASE), "lrm": str(GOLDEN / "lrm_sd15"), "prompts": str(prompts), "eval_prompts": str(heldout),
        "iterations": 2, "prompts_per_iteration": 2, "train_batch_size": 3, "steps": 4, "siblings": 2, "beta": 31.0,
        "threshold_min": 0.0, "threshold_max": 0.0, "lr": 1e-2, "lora_rank": 2, "eval_every": 1, "device": "cpu",
    }  # fmt: skip
    config = LPOConfig(**(settings | changes))
    return LPOTrainer(config, Run.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", {}))


def finish(trainer) -> list[dict]:
    return [metrics for metrics in trainer.train() if metrics is not None]


def test_only_the_adapter_moves_and_all_of_it(tmp_path):
    trainer = make(tmp_path, lr=1e-3)
    frozen = {n: p.clone() for n, p in trainer.policy.unet.named_parameters() if n not in trainer.weights}
    lrm = {n: p.clone() for n, p in trainer.lrm.named_parameters()}
    before = {n: p.detach().clone() for n, p in trainer.weights.items()}
    rows = finish(trainer)
    assert all(not torch.equal(before[n], p) for n, p in trainer.weights.items())
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.policy.unet.named_parameters() if n in frozen)
    assert all(torch.equal(p, lrm[n]) for n, p in trainer.lrm.named_parameters())
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["pairs"] == 8 and row["kept_fraction"] == 1.0 and "warning" in row
        assert set(row["kept_by_t"]) == set(row["drift_by_t"]) == {"751", "501", "251", "1"}
        assert {"heldout_reward", "heldout_reward_reference", "diversity", "grad_norm", "clamp_fraction"} <= set(row)
    assert rows[1]["drift"] > rows[0]["drift"] > 0
    assert (trainer.run.samples / "step_000001" / "prompt0_seed1.png").exists()
    json.dumps(rows, allow_nan=False)


def test_first_loss_is_ln_2_exactly(tmp_path):
    trainer = make(tmp_path, iterations=1, train_batch_size=1000, beta=500.0)
    (row,) = finish(trainer)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert row["margin"] == 0.0 and row["drift"] == 0.0 and row["implicit_accuracy"] == 0.5


@pytest.mark.parametrize("bound", [1e-3, 0.0])
def test_clipping_is_real_and_can_be_switched_off(tmp_path, bound):
    trainer = make(tmp_path, max_grad_norm=bound, iterations=1)
    (row,) = finish(trainer)
    applied = torch.stack([w.grad.norm() for w in trainer.weights.values()]).norm().item()
    assert row["grad_norm"] > 1e-3
    assert applied == pytest.approx(1e-3, rel=1e-3) if bound else applied > 1e-3


def test_training_raises_the_margin_on_its_own_pairs(tmp_path):
    trainer = make(tmp_path, iterations=1, prompts_per_iteration=4, lr=3e-3)
    prompts, conditioning = trainer._iteration_prompts()
    for _ in trainer._sample(prompts, conditioning):
        pass
    for _ in range(12):
        trainer._update(trainer.pending, conditioning)
    updates = trainer.sums["updates"]
    assert updates[-1]["loss"] < updates[0]["loss"] and updates[-1]["margin"] > 0
    assert updates[-1]["implicit_accuracy"] > 0.6


def stop_after(trainer, yields: int) -> list[dict]:
    """Run until that many yields, then save the state as a stopped run does."""
    rows = []
    for count, metrics in enumerate(trainer.train(), 1):
        if metrics is not None:
            rows.append(metrics)
        if count == yields:
            break
    trainer.save_state(trainer.run.state_file)
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its trainer and its metrics."""
    trainer = make(tmp_path_factory.mktemp("whole"))
    return trainer, finish(trainer)


# Yields of one iteration here: 4 steps of reference evaluation (once), 4 of sampling, 2 between 3 minibatches, 4 of
# evaluation, the metrics. So: in the reference, in sampling, between minibatches, in evaluation, between iterations.
@pytest.mark.parametrize("yields", [2, 6, 9, 12, 15, 18])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, yields):
    whole, expected = whole
    first = make(tmp_path)
    rows = stop_after(first, yields)
    second = make(tmp_path)
    second.load_state(first.run.state_file)
    rows += finish(second)
    assert rows == expected
    for name, weight in whole.weights.items():
        assert torch.equal(weight, second.weights[name]), name
    moments = whole.optimizer.state_dict()["state"].values()
    for ours, theirs in zip(moments, second.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_loop_stops_saves_and_finishes(tmp_path):
    trainer = make(tmp_path, save_every=1)
    trainer.run.request_stop()
    assert run_training(trainer, trainer.run, resume=False) == 3
    run, _ = Run.resume(trainer.run.path)
    again = make(tmp_path, save_every=1)
    again.run = run
    assert run_training(again, run, resume=True) == 0
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all({"seconds", "left_s", "total"} <= set(line) for line in lines)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["final", "step-000001", "step-000002"]
    assert json.loads((run.path / "result.json").read_text())["step"] == 2
    assert adapter_info(str(run.path / "checkpoints" / "final"))["step"] == 2


def test_saved_adapter_is_the_policy_and_stock_diffusers_reads_it(tmp_path):
    from diffusers import StableDiffusionPipeline

    trainer = make(tmp_path, iterations=1)
    finish(trainer)
    trainer.save(tmp_path / "adapter")
    conditioning, x = trainer.policy.encode_prompts(["the cat"]), normal((1, 4, 16, 16), "x")
    with torch.no_grad():
        expected = trainer.policy.predict(x, 501, conditioning, 1.0)
        loaded = load_policy(Policy(BASE, (Adapter(str(tmp_path / "adapter")),)), "cpu")
        torch.testing.assert_close(loaded.predict(x, 501, conditioning, 1.0), expected, atol=1e-5, rtol=1e-5)
        loaded.set_adapters([Adapter(str(tmp_path / "adapter"), 0.5)])
        half = loaded.predict(x, 501, conditioning, 1.0)
        loaded.set_adapters([])
        base = loaded.predict(x, 501, conditioning, 1.0)
        pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
        pipe.load_lora_weights(str(tmp_path / "adapter"))
        stock = pipe.unet(x, 501, conditioning.text).sample
    torch.testing.assert_close(stock, expected, atol=1e-5, rtol=1e-5)
    assert (half - base).norm() > 0 and not torch.allclose(half, expected)


def test_round_two_starts_from_round_one(tmp_path):
    first = make(tmp_path, iterations=1)
    finish(first)
    first.save(tmp_path / "one")
    second = make(tmp_path, policy=Policy(BASE, (Adapter(str(tmp_path / "one")),)))
    conditioning, x = first.policy.encode_prompts(["the cat"]), normal((1, 4, 16, 16), "x")
    with torch.no_grad():
        one = first.policy.predict(x, 501, conditioning, 1.0)
        with second.policy.reference():
            reference = second.policy.predict(x, 501, conditioning, 1.0)
        start = second.policy.predict(x, 501, conditioning, 1.0)
    torch.testing.assert_close(reference, one, atol=1e-5, rtol=1e-5)
    assert torch.equal(start, reference)
    frozen = [p for n, p in second.policy.unet.named_parameters() if ".frozen0." in n]
    before = [p.clone() for p in frozen]
    finish(second)
    assert frozen and all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    second.save(tmp_path / "two")
    assert adapter_info(str(tmp_path / "two"))["adapters"] == [{"path": str(tmp_path / "one"), "strength": 1.0}]


def test_bad_input_gets_one_sentence(tmp_path):
    other = LatentRewardModel.from_pretrained(GOLDEN / "lrm_sd15", base=BASE, device="cpu")
    fingerprint = load_policy(Policy(BASE), "cpu").fingerprint()
    other.fingerprint = {**fingerprint, "encoder_means": [v + 1 for v in fingerprint["encoder_means"]]}
    other.save(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="latent space"):
        make(tmp_path, lrm=str(tmp_path / "foreign"))
    make(tmp_path, lrm=str(tmp_path / "foreign"), allow_latent_mismatch=True)
    with pytest.raises(ConfigError, match="not an LRM folder"):
        make(tmp_path, lrm=str(tmp_path))
    with pytest.raises(ConfigError, match="held out"):
        make(tmp_path, eval_prompts=str(tmp_path / "prompts.json"))
    with pytest.raises(ConfigError, match="no adapter"):
        make(tmp_path, policy=Policy(BASE, (Adapter(str(tmp_path / "nowhere")),)))
    with pytest.raises(ConfigError, match="has noise"):
        make(tmp_path, t_min=2, t_max=100)
    with pytest.raises(ConfigError, match="prompt file"):
        make(tmp_path, prompts=str(tmp_path / "nowhere.json"))
