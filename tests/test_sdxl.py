"""Stable Diffusion XL, and SD2.1 with v-prediction, as policies: the stock pipelines' own pictures and sizes."""

import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from lpo.backbones import load_policy
from lpo.config import ConfigError, Policy
from lpo.rng import normal
from lpo.sampling import trajectory

PROMPTS = ["the cat on the hill", "one two"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_models.write_sd21(folder / "sd21")
    tiny_models.write_sd21(folder / "epsilon", "epsilon")
    tiny_models.write_sdxl(folder / "sdxl")
    tiny_models.write_sdxl(folder / "encoded", force_zeros=False)
    return folder


@pytest.mark.parametrize(
    ("name", "size", "negative"),
    [
        ("epsilon", None, ""),
        ("sd21", None, ""),
        ("sd21", (64, 128), "and then"),
        ("sdxl", None, ""),
        ("sdxl", (64, 96), ""),
        ("sdxl", None, "and then"),
        ("encoded", None, ""),
    ],
)
def test_pictures_are_the_stock_pipelines(bases, name, size, negative):
    height, width = size or (128, 128)
    backbone = load_policy(Policy(str(bases / name)), "cpu")
    shape = backbone.latent_shape(*(size or (None, None)))
    assert shape == (4, height // 8, width // 8)
    x_t = normal((2, *shape), "stock", name)
    conditioning = backbone.encode_prompts(PROMPTS, negative)
    *_, last = trajectory(backbone, conditioning, x_t, 4, 5.0, 0.0, lambda step: None)
    ours = backbone.decode(last.next)

    pipe = DiffusionPipeline.from_pretrained(bases / name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS, negative_prompt=[negative] * 2 if negative else None, latents=x_t, num_inference_steps=4,
        guidance_scale=5.0, eta=0.0, height=height, width=width, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert float(theirs.std()) > 0.01 and not torch.allclose(theirs[0], theirs[1], atol=1e-2)


def test_predictions_and_adapters_follow_the_stock_network(bases, tmp_path):
    """A LoRA that was saved here does in the stock SDXL pipeline what it does here."""
    backbone = load_policy(Policy(str(bases / "sdxl")), "cpu")
    conditioning, x = backbone.encode_prompts(["the cat"]), normal((1, 4, 16, 16), "x")
    assert conditioning.text.shape[-1] == 16 + 24 and conditioning.pooled.shape == (1, 24)
    assert not conditioning.unconditional.any() and not conditioning.pooled_unconditional.any()
    backbone.add_trainable_adapter(2, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    with torch.no_grad():
        plain = backbone.predict(x, 501, conditioning, 5.0)
        for weight in backbone.trainable_parameters().values():
            weight += 0.2 * normal(tuple(weight.shape), "moved")
        moved = backbone.predict(x, 501, conditioning, 5.0)
        with backbone.reference():
            assert torch.equal(backbone.predict(x, 501, conditioning, 5.0), plain)
    assert not torch.allclose(moved, plain, atol=1e-3)
    backbone.save_adapter(tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(bases / "sdxl")
    pipe.load_lora_weights(tmp_path / "lora")
    ids = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]).repeat(2, 1)
    pooled = torch.cat([conditioning.pooled_unconditional, conditioning.pooled])
    with torch.no_grad():
        states = torch.cat([conditioning.unconditional, conditioning.text])
        both = pipe.unet(
            torch.cat([x, x]), 501, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    unconditional, text = both.chunk(2)
    torch.testing.assert_close(moved, unconditional + 5.0 * (text - unconditional), atol=1e-4, rtol=1e-4)


def test_features_are_the_full_forwards_own(bases):
    """Early exit with SDXL's conditions: hooks on the stock forward see the same features."""
    backbone = load_policy(Policy(str(bases / "sdxl")), "cpu")
    conditioning, x = backbone.encode_prompts(["the cat", "on"]), normal((2, 4, 16, 16), "x")
    seen = {}
    for i, block in enumerate(backbone.unet.down_blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out[1]}))
    ids = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]).repeat(2, 1)
    with torch.no_grad():
        added = {"text_embeds": conditioning.pooled, "time_ids": ids}
        backbone.unet(x, 501, conditioning.text, added_cond_kwargs=added)
        full = dict(seen)
        features = backbone.features(x, 501, conditioning)
    for i, level in enumerate(features.down):
        torch.testing.assert_close(level, full[i][1 if i == 2 else -2].mean(dim=(2, 3)), atol=1e-6, rtol=1e-5)


def test_the_vae_is_fp32_only_where_it_asks_for_it(bases, tmp_path):
    half = load_policy(Policy(str(bases / "sdxl")), "cpu", "float16")
    assert half.unet.dtype == torch.float16 and half.vae.dtype == torch.float32
    fixed = tiny_models.with_vae(
        str(bases / "sdxl"), tmp_path / "fixed", tiny_models.vae(4, scaling_factor=0.13025, force_upcast=False)
    )
    assert load_policy(Policy(fixed), "cpu", "float16").vae.dtype == torch.float16


def test_unsuitable_models_are_refused_in_one_sentence(bases, tmp_path):
    tiny_models.shutil.copytree(bases / "sdxl", tmp_path / "other")
    tiny_models.edit_json(tmp_path / "other" / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ConfigError, match="is a FluxPipeline; supported are"):
        load_policy(Policy(str(tmp_path / "other")), "cpu")
    tiny_models.edit_json(tmp_path / "other" / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ConfigError, match="SDXL"):
        load_policy(Policy(str(tmp_path / "other")), "cpu")
    tiny_models.edit_json(tmp_path / "other" / "model_index.json", _class_name="StableDiffusionXLPipeline")
    (tmp_path / "other" / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="could not be loaded as StableDiffusionXLPipeline"):
        load_policy(Policy(str(tmp_path / "other")), "cpu")
    backbone = load_policy(Policy(str(bases / "sdxl")), "cpu")
    with pytest.raises(ConfigError, match="multiples of 32"):
        backbone.latent_shape(72, 128)
