"""Stable Diffusion 3 on a tiny model of the same classes: the policy against the stock pipeline, the LRM's early exit
against the stock transformer, both trainers, and the whole way through the commands.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sd3 import LAYERS, SIDE, tiny_sd3

from app import training_figures
from lpo.__main__ import main
from lpo.backbones import load_policy
from lpo.config import CONFIGS, SOURCES, Adapter, ConfigError, LPOConfig, LRMConfig, Policy, from_preset, to_dict
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_files import export_official
from lpo.lrm_trainer import LRMTrainer
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.rollout import plan
from lpo.run_dir import Run
from lpo.sampling import trajectory

_SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = ["a red star", "two dots on a hill"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """12 pairs over 6 prompts, one of them held out; random pictures, the first is chosen in two of three."""
    folder, rng, rows = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0), []
    for k in range(12):
        for side in "ab":
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / f"{k}{side}.png")
        rows.append({"id": str(k), "prompt": f"prompt {k % 6}", "first": f"{k}a.png", "second": f"{k}b.png",
                     "target": float(k % 3 > 0), "split": "heldout" if k % 6 == 5 else "train"})  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.json").write_text(json.dumps(["the cat", "and then", "on the hill"]))
    return folder


def latents(count: int = 2, *key) -> torch.Tensor:
    return normal((count, 16, SIDE // 8, SIDE // 8), "sd3", *key)


def sampled(policy, guidance_scale: float = 4.0, negative: str = "", steps: int = 4) -> torch.Tensor:
    conditioning = policy.encode_prompts(PROMPTS, negative)
    *_, last = trajectory(policy, conditioning, latents(), steps, guidance_scale, 0.0, None)
    return last.next


def stock(folder: str, guidance_scale: float = 4.0, negative: str = "", adapter: str = "") -> torch.Tensor:
    there = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if there.get(part, [None])[0] is None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_lora_weights(adapter)
    return pipe(
        PROMPTS, negative_prompt=[negative] * 2, latents=latents(), num_inference_steps=4, output_type="latent",
        guidance_scale=guidance_scale, height=SIDE, width=SIDE,
    ).images  # fmt: skip


# The policy
VARIANTS = {
    "sd3": {},
    "without t5": {"missing": (3,)},
    "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "dynamic": {"scheduler": {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_is_the_stock_pipelines(tmp_path, variant):
    folder = str(tiny_sd3(tmp_path / "model", **VARIANTS[variant]))
    policy = load_policy(Policy(folder), "cpu")
    for guidance, negative in ((4.0, "dull"), (1.0, "")):
        expected = stock(folder, guidance, negative)
        assert (expected - latents()).abs().max() > 0.5  # the model does something
        torch.testing.assert_close(sampled(policy, guidance, negative), expected, atol=2e-4, rtol=1e-3)
    times = policy.timesteps(4)
    assert times == sorted(times, reverse=True) and times[-1] > 0 and times[0] == 1000


def test_pictures_are_the_vaes(base):
    pipe, policy = StableDiffusion3Pipeline.from_pretrained(base), load_policy(Policy(base), "cpu")
    vae, x = pipe.vae, latents()
    with torch.no_grad():
        expected = pipe.image_processor.postprocess(vae.decode(x / 1.5305 + 0.0609).sample, output_type="pt")
    torch.testing.assert_close(policy.decode(x), expected, atol=1e-5, rtol=1e-5)
    pictures = 2 * torch.sigmoid(normal((1, 3, SIDE, SIDE), "pictures")) - 1
    with torch.no_grad():
        mean = (vae.encode(pictures).latent_dist.mean - 0.0609) * 1.5305
    torch.testing.assert_close(policy.encode(pictures)[0], mean, atol=1e-5, rtol=1e-5)
    assert policy.encode(pictures)[1].min() > 0 and policy.latent_shape() == (16, 8, 8)


def test_a_missing_encoder_says_zeros(tmp_path, base):
    whole = load_policy(Policy(base), "cpu").encode_prompts(PROMPTS)
    assert whole.text.shape == (2, 77 + 256, 32) and whole.pooled.shape == (2, 28)
    for i, missing in enumerate([(1,), (2,), (3,), (1, 2)]):
        policy = load_policy(Policy(str(tiny_sd3(tmp_path / str(i), missing))), "cpu")
        told = policy.encode_prompts(PROMPTS)
        expected, pooled = whole.text.clone(), whole.pooled.clone()
        for encoder in missing:
            part = {1: (slice(77), slice(12)), 2: (slice(77), slice(12, 28)), 3: (slice(77, None), slice(None))}
            expected[:, part[encoder][0], part[encoder][1]] = 0
            if encoder < 3:
                pooled[:, part[encoder][1]] = 0
        torch.testing.assert_close(told.text, expected)
        torch.testing.assert_close(told.pooled, pooled)
        assert torch.isfinite(sampled(policy)).all()


def test_sizes(base):
    policy = load_policy(Policy(base), "cpu")
    assert policy.latent_shape(32, 96) == (16, 4, 12)
    for height, width in ((40, 64), (208, 64)):  # half a patch; beyond the position table of 12 x 12 patches
        with pytest.raises(ConfigError, match="multiples of 16 up to 192"):
            policy.latent_shape(height, width)
    with pytest.raises(ConfigError, match="192"):
        policy.latent_shape(width=1024)


def test_an_adapter_works_in_the_stock_pipeline(base, tmp_path):
    policy = load_policy(Policy(base), "cpu")
    plain = sampled(policy)
    policy.add_trainable_adapter(4, ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj"), seed=1)
    torch.testing.assert_close(sampled(policy), plain, atol=0, rtol=0)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, weight in policy.trainable_parameters().items():
            weight.copy_(normal(tuple(weight.shape), name) * 0.2)
    trained = sampled(policy)
    assert not torch.allclose(trained, plain, atol=1e-2)
    with policy.reference():
        torch.testing.assert_close(sampled(policy), plain, atol=0, rtol=0)
    policy.save_adapter(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert len(keys) == 2 * 5 * LAYERS and all(key.startswith("transformer.transformer_blocks.") for key in keys)
    torch.testing.assert_close(stock(base, adapter=str(tmp_path / "adapter")), trained, atol=2e-4, rtol=1e-3)
    again = load_policy(Policy(base, (Adapter(str(tmp_path / "adapter"), 1.0),)), "cpu")
    torch.testing.assert_close(sampled(again), trained, atol=1e-5, rtol=1e-5)


def test_half_precision_keeps_what_must_be_fp32(base):
    policy = load_policy(Policy(base), "cpu", "bfloat16")
    assert policy.transformer.dtype == torch.bfloat16
    x = policy.predict(latents(), 500.0, policy.encode_prompts(PROMPTS), 4.0)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()
    _, mean, std = policy.transition(latents(), x, 500.0, 400.0, 1.0)
    assert mean.dtype == std.dtype == torch.float32 and policy.decode(latents()).dtype == torch.float32


def test_a_damaged_folder_is_one_sentence(base, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ConfigError, match="could not be loaded as Stable Diffusion 3"):
        load_policy(Policy(str(tmp_path)), "cpu")


# The reward model
@pytest.mark.parametrize("layer", [2, LAYERS])
def test_features_are_the_stock_transformers(tmp_path, layer):
    """A hook on the untouched transformer is the oracle: image tokens after block `layer`, for each branch alone."""
    folder = str(tiny_sd3(tmp_path / "model", qk_norm="rms_norm", dual_attention_layers=(0,)))
    network, found = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"), []
    network.transformer_blocks[layer - 1].register_forward_hook(lambda _, __, out: found.append(out[1].mean(dim=1)))
    lrm = LatentRewardModel.from_base(folder, device="cpu", feature_layer=layer, t5=True)
    text, empty = lrm.encode_text(PROMPTS), lrm.encode_text([""])
    with torch.no_grad():
        features = lrm.features(latents(), torch.tensor([982.036, 8.9]), text, empty)
        for encoded in (text, empty):
            states, pooled = encoded.states.expand(2, -1, -1), encoded.pooled.expand(2, -1)
            network(latents(), states, pooled, torch.tensor([982.036, 8.9]))
    assert features.down == [] and features.mid.shape == (2, 24)
    torch.testing.assert_close(features.mid, found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.unconditional_mid, found[1], atol=1e-5, rtol=1e-5)
    guided = found[1] + 7.5 * (found[0] - found[1])
    torch.testing.assert_close(lrm.guided(features), guided, atol=1e-4, rtol=1e-4)


def test_an_lrm_keeps_the_first_layers_only_and_reads_back(base, tmp_path):
    for t5 in (False, True):
        lrm = LatentRewardModel.from_base(base, device="cpu", feature_layer=2, t5=t5)
        lrm.save(tmp_path / "lrm")
        assert "_name_or_path" not in (tmp_path / "lrm" / "lrm.json").read_text()
        names = load_file(tmp_path / "lrm" / "model.safetensors")
        blocks = {name.split(".")[2] for name in names if name.startswith("transformer.transformer_blocks.")}
        assert blocks == {"0", "1"} and not any("vae" in name or "proj_out" in name for name in names)
        assert any(name.startswith("text_encoder_3.") for name in names) == t5
        loaded = LatentRewardModel.from_pretrained(tmp_path / "lrm", device="cpu")
        with torch.no_grad():
            scores = lrm.score(latents(), torch.tensor([501.0, 1.0]), PROMPTS)
            again = loaded.score(latents(), torch.tensor([501.0, 1.0]), PROMPTS)
            torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-5)
        assert loaded.fingerprint == load_policy(Policy(base), "cpu").fingerprint()
        assert loaded.fingerprint["forward_process"] == "flow"
    with pytest.raises(ConfigError, match="no official layout"):
        export_official(lrm, tmp_path / "official", base)


@pytest.mark.parametrize("layer", [0, LAYERS + 1, 18])
def test_a_layer_that_is_not_there_is_refused(base, layer):
    with pytest.raises(ConfigError, match=f"is {layer}, but this transformer has 4 layers: choose 1 to 4"):
        LatentRewardModel.from_base(base, device="cpu", feature_layer=layer)


def test_an_lrm_needs_a_clip(tmp_path):
    with pytest.raises(ConfigError, match="neither CLIP"):
        LatentRewardModel.from_base(str(tiny_sd3(tmp_path / "m", (1, 2))), device="cpu", feature_layer=2)


class Quiet:
    stop_requested = False

    def __init__(self, path: Path):
        self.path = path

    def log(self, text: str) -> None:
        pass


def lrm_trainer(base: str, pairs: Path, tmp_path: Path, **changes) -> LRMTrainer:
    config = LRMConfig(
        **{
            "base": base, "init": "base", "pairs": str(pairs / "pairs.jsonl"), "latent_cache": str(pairs / "cache"),
            "feature_layer": 3, "lr": 2e-3, "steps": 4, "batch_size": 4, "warmup_steps": 1, "timesteps": 5,
            "eval_every": 4, "calibration": 0.2, "weight_decay": 0.0, "device": "cpu", **changes,
        }
    )  # fmt: skip
    return LRMTrainer(config, Quiet(tmp_path))


@pytest.mark.parametrize(
    ("mode", "moving", "checkpointing"),
    [
        ("full", ("transformer.",), False),
        ("full", ("transformer.",), True),
        ("lora", (".lora_A.", ".lora_B."), False),
        ("heads", (), False),
    ],
)
def test_every_trained_weight_of_the_lrm_moves_and_no_other(base, pairs, tmp_path, mode, moving, checkpointing):
    one = lrm_trainer(base, pairs, tmp_path, train=mode, gradient_checkpointing=checkpointing)
    unread = {name for name, p in one.lrm.named_parameters() if any(p is other for other in one.lrm.trunk.unused())}
    assert len(unread) == 8 and all(name.startswith("transformer.transformer_blocks.2.") for name in unread)
    before = {name: p.detach().clone() for name, p in one.lrm.named_parameters()}
    metrics = list(one.train())
    assert [row["step"] for row in metrics] == [1, 2, 3, 4] and all(math.isfinite(row["loss"]) for row in metrics)
    for name, p in one.lrm.named_parameters():
        trained = name not in unread and any(word in name for word in (*moving, "visual_projection", "logit_scale"))
        assert torch.equal(before[name], p) != trained, name
    result = one.result()
    assert result["heldout_pairs"] == 2 and result["heldout_by_timestep"][0]["t"] == 1


# LPO
def lpo_trainer(base: str, lrm: Path, pairs: Path, tmp_path: Path, **changes) -> LPOTrainer:
    config = LPOConfig(
        **{
            "policy": Policy(base), "lrm": str(lrm), "prompts": str(pairs / "prompts.json"), "iterations": 2,
            "prompts_per_iteration": 2, "train_batch_size": 3, "steps": 4, "siblings": 2, "threshold_min": 0.0,
            "threshold_max": 0.0, "lr": 1e-3, "lora_rank": 2, "device": "cpu", **changes,
        }
    )  # fmt: skip
    return LPOTrainer(config, Run.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", {}))


@pytest.fixture(scope="module")
def lrm(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lrm") / "lrm"
    LatentRewardModel.from_base(base, device="cpu", feature_layer=2).save(folder)
    return folder


def test_the_last_step_has_no_noise_and_is_never_branched(base, lrm):
    policy = load_policy(Policy(base), "cpu")
    for eta in (0.2, 1.0):
        config = LPOConfig(policy=Policy(base), steps=20, eta=eta, device="cpu")
        steps = plan(policy, config)
        assert len(steps) == 19 and all(branched for *_, branched, _ in steps)
        assert [t for t, *_ in steps] == policy.timesteps(20)[:-1] and steps[-1][1] == policy.timesteps(20)[-1]
    window = plan(policy, LPOConfig(policy=Policy(base), steps=20, t_min=901, device="cpu"))
    assert all(t >= 901 for t, *_ in window) and window


def test_a_fresh_adapter_has_loss_ln_2_and_only_it_moves(base, lrm, pairs, tmp_path):
    (first,) = (row for row in lpo_trainer(
        base, lrm, pairs, tmp_path, iterations=1, train_batch_size=1000, beta=500.0).train() if row)  # fmt: skip
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    trainer = lpo_trainer(base, lrm, pairs, tmp_path)
    parts = {"policy": trainer.policy.transformer, "lrm": trainer.lrm, "vae": trainer.policy.vae}
    before = {(part, n): p.detach().clone() for part, net in parts.items() for n, p in net.named_parameters()}
    rows = [row for row in trainer.train() if row is not None]
    for part, net in parts.items():
        for n, p in net.named_parameters():
            trained = part == "policy" and n in trainer.weights
            assert torch.equal(before[part, n], p) != trained, (part, n)
    times = [f"{t}" for t in trainer.policy.timesteps(4)[:-1]]
    assert rows[0]["pairs"] == 6 and set(rows[0]["kept_by_t"]) == set(rows[0]["drift_by_t"]) == set(times)
    assert rows[1]["drift"] > rows[0]["drift"] > 0


def test_equal_weighting_and_gradient_checkpointing(base, lrm, pairs, tmp_path):
    trainer = lpo_trainer(base, lrm, pairs, tmp_path, timestep_weighting="equal", iterations=1, eta=0.5)
    assert sum(trainer.step_weights.values()) == pytest.approx(3) and min(trainer.step_weights.values()) > 0
    (row,) = (row for row in trainer.train() if row)
    again = lpo_trainer(base, lrm, pairs, tmp_path, timestep_weighting="equal", iterations=1, eta=0.5,
                        gradient_checkpointing=True)  # fmt: skip
    (same,) = (row for row in again.train() if row)
    assert same["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


def test_an_lrm_of_another_latent_space_is_refused(base, lrm, pairs, tmp_path):
    sd15 = LatentRewardModel.from_pretrained(GOLDEN / "lrm_sd15", base=str(GOLDEN / "tiny_sd15"), device="cpu")
    sd15.fingerprint = load_policy(Policy(str(GOLDEN / "tiny_sd15")), "cpu").fingerprint()
    sd15.save(tmp_path / "sd15")
    with pytest.raises(ConfigError) as refused:
        lpo_trainer(base, tmp_path / "sd15", pairs, tmp_path)
    assert "does not share the latent space" in str(refused.value) and "4 against 16" in str(refused.value)
    with pytest.raises(ConfigError, match="does not share the latent space"):
        lpo_trainer(str(GOLDEN / "tiny_sd15"), lrm, pairs, tmp_path)


# The commands
def test_the_whole_way_through_the_commands(base, pairs, tmp_path):
    lrm, adapter = tmp_path / "lrm", tmp_path / "lpo"
    assert main(["train-lrm", "--run-dir", str(lrm), "--base", base, "--init", "base", "--feature_layer", "3",
                 "--pairs", str(pairs / "pairs.jsonl"), "--steps", "2", "--batch_size", "4", "--timesteps", "5",
                 "--latent_cache", str(pairs / "cache"), "--device", "cpu"]) == 0  # fmt: skip
    judge = str(lrm / "checkpoints" / "final")
    assert main(["train-lpo", "--run-dir", str(adapter), "--base", base, "--lrm", judge, "--iterations", "1",
                 "--prompts", str(pairs / "prompts.json"), "--prompts_per_iteration", "2", "--steps", "4",
                 "--threshold_min", "0", "--threshold_max", "0", "--device", "cpu"]) == 0  # fmt: skip
    final = adapter / "checkpoints" / "final"
    assert json.loads((final / "adapter.json").read_text())["fingerprint"]["forward_process"] == "flow"
    common = ["--base", base, "--adapters", f"{final}@1.0", "--steps", "3", "--eta", "0.7", "--seeds", "3",
              "--device", "cpu"]  # fmt: skip
    trace, sample = tmp_path / "trace", tmp_path / "sample"
    assert main(["trace", *common, "--prompt", "a dot", "--lrm", judge, "--siblings", "3", "--run-dir",
                 str(trace)]) == 0  # fmt: skip
    assert main(["sample", *common, "--prompts", "a dot", "--run-dir", str(sample)]) == 0
    traced, drawn = trace / "samples" / "seed3.png", sample / "samples" / "prompt0_seed3.png"
    assert Image.open(traced).tobytes() == Image.open(drawn).tobytes()
    scores = json.loads((trace / "scores.json").read_text())
    times = scores["timesteps"]
    assert times == [*load_policy(Policy(base), "cpu").timesteps(3), 0] and times[0] == 1000
    assert len(scores["scores"][judge][0]) == 4 and scores["siblings"][judge][2] is None  # the last step has no noise
    save_file({"latents": latents(3), "timesteps": torch.tensor([0.0, 8.929, 1000.0])}, tmp_path / "x.safetensors")
    (tmp_path / "texts.json").write_text(json.dumps(["a", "", "b c"]))
    score = ["score", "--lrm", judge, "--latents", str(tmp_path / "x.safetensors"), "--prompts",
             str(tmp_path / "texts.json"), "--out", str(tmp_path / "out.json")]  # fmt: skip
    assert main(score) == 0
    assert all(math.isfinite(s) for s in json.loads((tmp_path / "out.json").read_text())["scores"])


@pytest.mark.parametrize("command", CONFIGS)
def test_the_presets_say_what_is_not_measured(command):
    config = from_preset(CONFIGS[command], "sd3")
    assert _SD3 in json.dumps(to_dict(config))
    told = [source for source in SOURCES[command]["sd3"].values() if "unmeasured" in source]
    assert told or command == "sample"


def test_figures_and_metrics_take_fractions_of_t():
    rows = [{"step": 1, "kept_by_t": {"1000.0": 0.5, "982.036": 0.25}}, {"step": 2, "kept_by_t": {"982.036": 0.75}}]
    (panel,) = (part for part in training_figures.lpo(rows)["figure"]["data"] if list(part["x"]) == [1000.0, 982.036])
    assert list(panel["y"]) == [0.5, 0.5]
