"""Merged UNets, as official LPO policies come: loaded in place of the base's own, and what is refused."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from interchange_lab import BASE, GOLDEN
from safetensors.torch import load_file

from lpo.backbones import load_policy
from lpo.config import Adapter, ConfigError, Policy
from lpo.rng import normal


@pytest.fixture
def merged(tmp_path):
    """The tiny base's UNet, every weight moved a little, under `official/unet` as the official code leaves it."""
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            weight += 0.02 * normal(tuple(weight.shape), "merged", name)
    unet.save_pretrained(tmp_path / "official" / "unet")
    return tmp_path / "official", unet


@torch.no_grad()
def test_a_merged_unet_takes_the_place_of_the_bases(merged):
    folder, unet = merged
    x = normal((2, 4, 16, 16), "merged unet")
    base = load_policy(Policy(BASE), "cpu")
    text = base.encode_prompts(["the cat", "and"])
    expected = unet(x, 501, text.text).sample
    for named in (folder, folder / "unet"):
        policy = load_policy(Policy(BASE, unet=str(named)), "cpu")
        torch.testing.assert_close(policy.predict(x, 501, text, 1.0), expected, atol=1e-5, rtol=0)
    assert policy.policy == Policy(BASE, unet=str(folder / "unet"))
    assert policy.fingerprint() == base.fingerprint()  # the latent space is the base's
    lora = Adapter(str(GOLDEN / "lora_m1"), 3.0)
    policy.set_adapters([lora])
    assert policy.policy == Policy(BASE, (lora,), unet=str(folder / "unet"))
    assert float((policy.predict(x, 501, text, 1.0) - expected).abs().max()) > 1e-4
    policy.set_adapters([])
    torch.testing.assert_close(policy.predict(x, 501, text, 1.0), expected, atol=1e-5, rtol=0)


def test_what_is_no_such_unet_gets_one_sentence(merged, tmp_path):
    folder, unet = merged
    other = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": 1})
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "unet", pickled)
    weights = pickled / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), pickled / "diffusion_pytorch_model.bin")
    weights.unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "unet", damaged)
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    for path, words in (("other", "another architecture"), ("empty", "no config.json"), ("gone", "no UNet at"),
                        ("pickled", "from safetensors"), ("damaged", "from safetensors")):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as caught:
            load_policy(Policy(BASE, unet=str(tmp_path / path)), "cpu")
        assert "\n" not in str(caught.value)
