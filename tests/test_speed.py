"""Settings that change speed and memory must change nothing else: layout, compilation, micro-batches, precision."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lpo.backbones import latent_diffusion, load_policy, pick_dtype, speed
from lpo.config import ConfigError, LPOConfig, LRMConfig, Policy, SampleConfig
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_trainer import LRMTrainer
from lpo.ranks import Share, portions
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import Run

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")


def lpo_run(tmp_path, name: str, **changes) -> tuple[list[dict], dict[str, torch.Tensor], LPOTrainer]:
    """Metrics and adapter of two small iterations."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["the cat", "and then", "on the hill", "one two"]))
    settings = {
        "policy": Policy(BASE), "lrm": str(GOLDEN / "lrm_sd15"), "prompts": str(prompts), "iterations": 2,
        "prompts_per_iteration": 2, "train_batch_size": 3, "steps": 4, "siblings": 2, "beta": 31.0,
        "threshold_min": 0.0, "threshold_max": 0.0, "lr": 1e-3, "lora_rank": 2, "device": "cpu",
    }  # fmt: skip
    config = LPOConfig(**settings | changes)
    trainer = LPOTrainer(config, Run.create(tmp_path / name, {}))
    rows = [row for row in trainer.train() if row is not None]
    return rows, {name: weight.detach() for name, weight in trainer.weights.items()}, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return lpo_run(tmp_path_factory.mktemp("plain"), "run")


def same(found, expected, rtol=1e-3):
    for row, wanted in zip(found[0], expected[0], strict=True):
        assert row["pairs"] == wanted["pairs"] == 8
        for name in ("loss", "margin", "reward", "grad_norm", "drift"):
            assert row[name] == pytest.approx(wanted[name], rel=rtol, abs=1e-6), name
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path, plain, size):
    found = lpo_run(tmp_path, "run", micro_batch_size=size)
    same(found, plain)
    trainer, rows = found[2], []
    prompts, conditioning = trainer._iteration_prompts()
    for _ in trainer._sample(prompts, conditioning):
        pass
    trainer.policy.unet.mid_block.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    trainer._update(trainer.pending[:3], conditioning)
    # reference and policy in turn, both guidance branches of each portion
    assert rows == ([2] * 6 if size == 1 else [4, 4, 2, 2])


@pytest.mark.parametrize("layout", ["on", "off"])
def test_memory_layout_changes_nothing_else(tmp_path, plain, layout):
    found = lpo_run(tmp_path, "run", channels_last=layout)
    weight = found[2].policy.unet.down_blocks[1].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (layout == "on")
    same(found, plain)


def test_compiled_training_is_the_same_and_settles_after_one_iteration(tmp_path, plain, monkeypatch):
    """With the backend that runs what was traced: what is recompiled, and when, does not depend on the code that
    another backend makes of it."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **given: compile_module(m, backend="eager", **given))
    monkeypatch.setattr(speed, "require_compiler", lambda device: None)
    torch._dynamo.reset()
    counts, update = [], LPOTrainer._update

    def counting(self, *arguments):
        update(self, *arguments)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    monkeypatch.setattr(LPOTrainer, "_update", counting)
    found = lpo_run(tmp_path, "run", compile=True)
    same(found, plain)
    assert len(counts) == 6 and counts[0] > 0
    assert counts[0] == counts[-1], "the last, smaller minibatch or the second iteration was compiled anew"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_network_can_be_switched_back(monkeypatch):
    monkeypatch.setattr(speed, "require_compiler", lambda device: None)
    policy = load_policy(Policy(BASE), "cpu")
    blocks = [m for m in policy.unet.modules() if type(m).__name__ in speed.REPEATED]
    assert {type(m).__name__ for m in blocks} == {"ResnetBlock2D", "BasicTransformerBlock"}
    policy.tune(SampleConfig(compile=True))
    compiled = [m._compiled_call_impl for m in blocks]
    assert all(compiled)
    policy.tune(SampleConfig(compile=True))
    assert [m._compiled_call_impl for m in blocks] == compiled, "asked again, nothing is thrown away"
    policy.tune(SampleConfig())
    assert not any(m._compiled_call_impl for m in blocks)


def test_without_a_compiler_there_is_one_sentence(monkeypatch):
    def broken(*_arguments, **_settings):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"compile is on, but .* switch compile off"):
        speed.require_compiler(torch.device("cpu"))


def test_compiled_scores_fill_the_last_batch_up():
    lrm = LatentRewardModel.from_pretrained(GOLDEN / "lrm_sd15", base=BASE, device="cpu")
    latents, prompts = torch.randn(7, 4, 16, 16, generator=torch.Generator().manual_seed(0)), [*"abcdefg"]
    t = torch.tensor([1, 101, 201, 301, 401, 501, 601])
    rows = []
    lrm.trunk.parts["unet"].mid_block.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        expected = lrm.score(latents, t, prompts)
        ragged = lrm.score(latents, t, prompts, batch_size=3)
        lrm.same_shapes = True
        filled = lrm.score(latents, t, prompts, batch_size=3)
        lrm.score(latents, t, prompts, batch_size=100)
    assert rows == [14, 6, 6, 2, 6, 6, 6, 14]
    torch.testing.assert_close(ragged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(filled, expected, rtol=1e-4, atol=1e-4)


def test_portions_take_every_row_once():
    share = Share([4, 5, 6, 7, 7], 4, [1.0, 1.0, 1.0, 1.0, 0.0])
    assert [p.rows for p in portions(share, 2, same_shape=False)] == [[4, 5], [6, 7], [7]]
    filled = list(portions(share, 2, same_shape=True))
    assert [p.rows for p in filled] == [[4, 5], [6, 7], [7, 7]] and [p.first for p in filled] == [4, 6, 8]
    assert [w for p in filled for w in p.weights] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def lrm_run(folder: Path, name: str, **changes) -> tuple[list[dict], LRMTrainer]:
    """Three steps of a full LRM training on pictures of noise."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for i in range(5):
        for side in "ab":
            pixels = torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(folder / f"{i}{side}.png")
        pair = {"id": str(i), "prompt": f"the cat {i}", "first": f"{i}a.png", "second": f"{i}b.png"}
        lines.append(json.dumps({**pair, "target": (0.0, 0.5, 1.0)[i % 3], "weight": 1.0 + i}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    config = LRMConfig(
        base=BASE, init=str(GOLDEN / "lrm_sd15"), pairs=str(folder / "pairs.jsonl"), steps=3, batch_size=5,
        warmup_steps=0, calibration=0.0, lr=1e-5, device="cpu", **changes,
    )  # fmt: skip
    trainer = LRMTrainer(config, Run.create(folder / name, {}))
    return [row for row in trainer.train() if row is not None], trainer


def test_lrm_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path):
    whole, one = lrm_run(tmp_path, "whole")
    parts, trainer = lrm_run(tmp_path, "parts", micro_batch_size=2)
    assert (one.scored, trainer.scored) == (64, 4)  # a large batch without gradients would need more than the training
    for row, wanted in zip(parts, whole, strict=True):
        for name in ("loss", "margin", "grad_norm", "accuracy"):
            assert row[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), name


def test_lrm_trains_float32_weights_in_bfloat16(tmp_path):
    whole, _ = lrm_run(tmp_path, "whole")
    mixed, trainer = lrm_run(tmp_path, "mixed", dtype="bfloat16")
    seen = []
    trainer.lrm.trunk.parts["unet"].mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    trainer.steps += 1
    next(trainer.train())
    assert set(seen) == {torch.bfloat16} and all(w.dtype == torch.float32 for w in trainer.weights.values())
    for row, wanted in zip(mixed, whole, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=0.1)


def test_large_pictures_pass_the_vae_one_by_one(monkeypatch):
    backbone, generator = load_policy(Policy(BASE), "cpu"), torch.Generator().manual_seed(0)
    rows, size = [], backbone.latent_shape()
    latents = torch.randn(3, *size, generator=generator)
    backbone.vae.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    backbone.vae.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    together = backbone.decode(latents)
    expected = backbone.encode(2 * together - 1)
    monkeypatch.setattr(latent_diffusion, "VAE_AREA", 2 * size[1] * size[2] - 1)
    torch.testing.assert_close(backbone.decode(latents), together)
    for found, wanted in zip(backbone.encode(2 * together - 1), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert rows == [3, 3, 1, 1, 1, 1, 1, 1]


def test_auto_precision_is_float32_on_a_cpu():
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


def test_attention_is_the_fused_one():
    policy = load_policy(Policy(BASE), "cpu")
    policy.add_trainable_adapter(2, ["to_q"], 0)
    assert {type(p).__name__ for p in policy.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert policy.text_encoder.config._attn_implementation == "sdpa"
