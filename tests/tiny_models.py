"""Small models of the very classes and folder layouts of the real ones, with fixed seeds, written into a folder."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GOLDEN = Path(__file__).parent / "data" / "golden"
TOKENIZER = GOLDEN / "tiny_sd15" / "tokenizer"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def randomise(model: torch.nn.Module, seed: int, gain: float = 1.0) -> torch.nn.Module:
    """Weights that let every input through: matrices with std gain / sqrt(fan in), small biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)


def text_encoder(kind: type, seed: int, width: int, act: str = "quick_gelu", layers: int = 3) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=520, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        projection_dim=width, hidden_act=act, eos_token_id=2, bos_token_id=518, pad_token_id=1,
    )  # fmt: skip
    return randomise(kind(config), seed)


def vae(seed: int = 1, **changes) -> AutoencoderKL:
    settings = {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 8,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "sample_size": 128, "latent_channels": 4,
    }  # fmt: skip
    return randomise(AutoencoderKL(**(settings | changes)), seed)


def write_sd21(folder: Path, prediction_type: str = "v_prediction") -> str:
    """SD2.1: linear projections in attention, an OpenCLIP-like text encoder without its last layer, padded with "!"."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16, 16), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=40,
        norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae(), text_encoder(CLIPTextModel, 3, 40, "gelu"), tokenizer("!"), randomise(unet, 2),
        PNDMScheduler(**SCHEDULE, skip_prk_steps=True, prediction_type=prediction_type), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return str(folder)


def write_sdxl(folder: Path, vae_model: AutoencoderKL | None = None, force_zeros: bool = True, seed: int = 0) -> str:
    """SDXL at 128 pixels: three levels, the first without attention, two text encoders, added size conditions."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 24), attention_head_dim=(1, 2, 3), cross_attention_dim=16 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae_model or vae(4, scaling_factor=0.13025, force_upcast=True), text_encoder(CLIPTextModel, 5, 16),
        text_encoder(CLIPTextModelWithProjection, 6, 24, "gelu"), tokenizer(), tokenizer("!"),
        randomise(unet, 7 + seed), EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=force_zeros,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return str(folder)


def write_official_sdxl_lrm(folder: Path, base: str, logit_scale: float | torch.Tensor = 2.9, seed: int = 20) -> str:
    """An LRM in the official layout, fine-tuned from `base` as far as its weights are concerned."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    parts = {"unet": unet, **{n: kind.from_pretrained(base, subfolder=n) for n, kind in encoders.items()}}
    generator = torch.Generator().manual_seed(seed)
    for name, part in parts.items():
        with torch.no_grad():
            for _, parameter in sorted(part.named_parameters()):
                parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
        part.save_pretrained(folder / name)
    widths = unet.config.block_out_channels
    weight = torch.randn(parts["text_encoder_2"].config.projection_dim, sum(widths) + widths[-1], generator=generator)
    torch.save({"visual_projection": {"weight": weight * 0.2}, "logit_scale": logit_scale}, folder / "state_dict.pt")
    return str(folder)


def with_vae(base: str, folder: Path, vae_model: AutoencoderKL) -> str:
    """A copy of a base with another VAE."""
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "vae")
    vae_model.save_pretrained(folder / "vae")
    return str(folder)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
