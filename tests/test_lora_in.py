"""Adapters that other tools wrote: kohya's layout and diffusers', against weights that were merged by hand."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from interchange_lab import BASE, GOLDEN, kohya_of, merge_by_hand
from safetensors.torch import load_file, save_file
from torch import nn

from lpo.backbones import load_policy
from lpo.config import Adapter, ConfigError, Policy
from lpo.rng import normal

LORA = GOLDEN / "lora_m1" / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def policy():
    return load_policy(Policy(BASE), "cpu")


@torch.no_grad()
def prediction(backbone, prompt: str = "the cat"):
    x = normal((1, 4, 16, 16), "lora in")
    return backbone.predict(x, 501, backbone.encode_prompts([prompt]), 3.0)


def test_kohya_with_uneven_ranks_and_alphas_is_what_merging_gives(policy, tmp_path):
    """Linear layers, 1x1 and 3x3 convolutions, the time embedding and the text encoder; alpha is not the rank."""
    weights = {}
    for prefix, net in (("lora_unet_", policy.unet), ("lora_te_text_model_", policy.text_encoder)):
        for path, layer in net.named_modules():
            chosen = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj", "out_proj", "fc1")
            if path.endswith(chosen) and isinstance(layer, nn.Linear | nn.Conv2d):
                weights |= kohya_of(prefix, path, layer)
    assert any("conv1" in key for key in weights) and any("mlp_fc1" in key for key in weights)
    save_file(weights, tmp_path / "wild.safetensors")
    by_hand = load_policy(Policy(BASE), "cpu")
    merge_by_hand(by_hand.unet, "lora_unet_", weights, 0.7)
    merge_by_hand(by_hand.text_encoder, "lora_te_text_model_", weights, 0.7)
    policy.set_adapters([Adapter(str(tmp_path / "wild.safetensors"), 0.7)])
    with_adapter = prediction(policy)
    torch.testing.assert_close(with_adapter, prediction(by_hand), atol=2e-5, rtol=1e-4)
    policy.set_adapters([])
    plain = prediction(policy)
    assert float((plain - with_adapter).abs().max()) > 1e-2  # the text encoder is itself again, too
    torch.testing.assert_close(plain, prediction(load_policy(Policy(BASE), "cpu")), atol=0, rtol=0)


def test_alpha_in_diffusers_header_counts(policy, tmp_path):
    weights = load_file(LORA)
    peft = {k.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): v for k, v in weights.items()}
    rank = len(next(v for k, v in peft.items() if ".lora_A." in k))
    told = {"unet.r": rank, "unet.lora_alpha": 2 * rank, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    save_file(peft, tmp_path / "double.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    save_file(peft, tmp_path / "plain.safetensors")
    policy.set_adapters([Adapter(str(tmp_path / "double.safetensors"))])
    double = prediction(policy)
    policy.set_adapters([Adapter(str(tmp_path / "plain.safetensors"), 2.0)])
    torch.testing.assert_close(double, prediction(policy), atol=1e-6, rtol=0)
    policy.set_adapters([Adapter(str(LORA))])
    assert float((double - prediction(policy)).abs().max()) > 1e-6


def wild(changes: dict, drop: tuple = ()) -> dict:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    good = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    good[f"{layer}.alpha"] = torch.tensor(2.0)
    full = {**good, **{f"{layer}.{key}" if key.startswith(("lora_down", "lora_up", "alpha", "dora")) else key: value
                       for key, value in changes.items()}}  # fmt: skip
    return {key: value for key, value in full.items() if not key.endswith(drop or ("\0",))}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (wild({}, drop=("lora_up.weight",)), "kohya's layout"),
        (wild({"alpha": torch.ones(3)}), "kohya's layout"),
        (wild({"alpha": torch.tensor(float("nan"))}), "not finite"),
        (wild({"lora_up.weight": torch.full((8, 2), float("inf"))}), "not finite"),
        (wild({"lora_up.weight": torch.ones(16, 2)}), "another architecture"),
        (wild({"dora_scale": torch.ones(8)}), "DoRA"),
        (wild({"unet.conv_in.weight": torch.ones(2)}), "not a LoRA"),
        (wild({"lora_te3_encoder.lora_down.weight": torch.ones(2, 2)}), "architecture that is not read"),
        ({"lora_unet_input_blocks_44_9_to_q.lora_down.weight": torch.ones(2, 8)}, "kohya's layout"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 8)}, "no LoRA for a unet"),
        ({"text_encoder_2.x.lora_A.weight": torch.ones(2, 8)}, "changes the text_encoder_2"),
        ({"unet.nowhere.lora_A.weight": torch.ones(2, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 2)},
         "another architecture"),
        ({}, "not a LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(policy, tmp_path, weights, words):
    policy.set_adapters([])
    before = prediction(policy)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=words) as caught:
        policy.set_adapters([Adapter(str(tmp_path / "x.safetensors"))])
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(prediction(policy), before, atol=0, rtol=0)


def test_pickles_and_rubbish_are_not_read(policy, tmp_path):
    torch.save(load_file(LORA), tmp_path / "old.pt")
    (tmp_path / "rubbish.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "header.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    for name in ("old.pt", "rubbish.safetensors", "header.safetensors"):
        with pytest.raises(ConfigError, match="not a readable"):
            policy.set_adapters([Adapter(str(tmp_path / name))])


def test_a_lora_of_a_larger_model_is_not_half_loaded(policy, tmp_path):
    """Some layers exist here too, others do not: nothing of it may stay."""
    config = {**UNet2DConditionModel.load_config(f"{BASE}/unet"), "layers_per_block": 3}
    larger = UNet2DConditionModel.from_config(config)
    weights = {}
    for path, layer in larger.named_modules():
        if path.endswith("to_q"):
            weights |= kohya_of("lora_unet_", path, layer)
    save_file(weights, tmp_path / "larger.safetensors")
    policy.set_adapters([])
    before = copy.deepcopy(prediction(policy))
    with pytest.raises(ConfigError, match="another architecture"):
        policy.set_adapters([Adapter(str(tmp_path / "larger.safetensors"))])
    torch.testing.assert_close(prediction(policy), before, atol=0, rtol=0)
