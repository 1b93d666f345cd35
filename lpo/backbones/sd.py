"""Stable Diffusion 1.x and 2.x (and Scenes, which is one) behind the backbone protocol, on stock diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lpo import diffusion
from lpo.backbones import Conditioning, Features
from lpo.backbones.latent_diffusion import LatentDiffusion
from lpo.backbones.latent_space import vae_fingerprint
from lpo.backbones.lora import AdapterStack
from lpo.backbones.sd_trunk import StableDiffusionTrunk, tokenize
from lpo.backbones.source import load_part, load_parts
from lpo.backbones.trunk import cast
from lpo.backbones.unet import Added, guided_features
from lpo.config import ConfigError


class StableDiffusion(LatentDiffusion):
    """The `Backbone` of Stable Diffusion 1.x / 2.x. `base` is the name the user gave, `source` what it resolved to."""

    pipeline, added_condition = "StableDiffusionPipeline", None
    kinds: ClassVar[dict[str, type]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,  # DDIM with the noise schedule of the model, whichever sampler its folder names
    }

    def __init__(self, parts: dict, base: str, device: torch.device, dtype: torch.dtype):
        """parts: one object of each of `kinds`; taken over, frozen, moved and cast. Raises ConfigError."""
        unet, vae, scheduler = parts["unet"], parts["vae"], parts["scheduler"]
        if unet.config.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"{base} takes {unet.config.in_channels} channels where its latents have {vae.config.latent_channels}: "
                "inpainting and editing models cannot be sampled from noise alone; take a text-to-image model."
            )
        if unet.config.addition_embed_type != self.added_condition:
            raise ConfigError(
                f"The UNet of {base} is not that of a {self.pipeline} (SDXL's takes picture sizes, the "
                "others' do not): correct _class_name in its model_index.json, or get the model again."
            )
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(device)
                # fp16 overflows in Stable Diffusion's VAE unless it was made for it; bf16 and fp32 do not.
                upcast = name == "vae" and dtype == torch.float16 and vae.config.force_upcast
                cast(part, torch.float32 if upcast else dtype)
        self.unet, self.scheduler = unet.to(memory_format=torch.channels_last), scheduler
        self.text_encoder, self.tokenizer = parts["text_encoder"], parts["tokenizer"]
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
        super().__init__(
            vae, diffusion_process(scheduler, device), AdapterStack(self.unet, "unet", encoders), encoders, base, device
        )

    @classmethod
    def from_pretrained(cls, source: str, base: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """From a diffusers folder, a hub id or a .safetensors file. Raises ConfigError with one sentence."""
        return cls(load_parts(cls.kinds, cls.pipeline, source, base, dtype), base, device, dtype)

    @classmethod
    def read_fingerprint(cls, source: str) -> dict:
        """Of a base's latent space, without loading its network."""
        scheduler = load_part(DDIMScheduler, source, "scheduler")
        return vae_fingerprint(load_part(AutoencoderKL, source, "vae"), diffusion_process(scheduler))

    # Text and pictures
    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return (self.text_encoder(tokenize(self.tokenizer, self.text_encoder, texts).to(self.device))[0],)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = self.unet.config.sample_size
        own = size if isinstance(size, (list, tuple)) else (size, size)
        height, width = height or own[0] * factor, width or own[1] * factor
        rows, columns = height // factor, width // factor
        halvings = 2 ** (len(self.unet.config.down_block_types) - 1)
        if rows % halvings or columns % halvings or not rows or not columns:
            step = halvings * factor
            raise ConfigError(f"{width} x {height} pixels do not fit this model: use multiples of {step}.")
        return self.unet.config.in_channels, rows, columns

    # One Gaussian step
    def timesteps(self, steps: int, shape: tuple[int, int, int] | None = None) -> list[int]:
        """Of the live scheduler, descending; the same for every latent shape."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist()

    def predict(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The network's prediction (B, C, H, W), fp32, both guidance branches in one batch."""
        t = torch.as_tensor(t, device=x_t.device).reshape(-1).expand(len(x_t))
        if guidance_scale == 1:
            return self._forward(x_t, t, conditioning.text, conditioning.pooled)
        states, pooled = torch.cat([conditioning.unconditional, conditioning.text]), None
        if conditioning.pooled is not None:
            pooled = torch.cat([conditioning.pooled_unconditional, conditioning.pooled])
        unconditional, text = self._forward(torch.cat([x_t, x_t]), torch.cat([t, t]), states, pooled).chunk(2)
        return unconditional + guidance_scale * (text - unconditional)

    def _forward(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor | None) -> Tensor:
        dtype = self.unet.dtype
        added = self._added(x, pooled)
        return self.unet(x.to(dtype), t, states.to(dtype), added_cond_kwargs=added).sample.float()

    def _added(self, x: Tensor, pooled: Tensor | None) -> Added:
        """What the UNet is told besides time and text: nothing."""
        return None

    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.unet, x_t, t, conditioning)

    def trunk(self, feature_layer: int = 18, t5: bool = False) -> StableDiffusionTrunk:
        """The early blocks and text encoder as an LRM's trunk. The backbone cannot sample afterwards."""
        return StableDiffusionTrunk(self.unet, self.text_encoder, self.tokenizer)


def diffusion_process(scheduler: DDIMScheduler, device: torch.device | str = "cpu") -> diffusion.Diffusion:
    """The scheduler's noise schedule, with one more entry at its end: where the last step leads, index -1."""
    alphas = torch.cat([scheduler.alphas_cumprod.float(), scheduler.final_alpha_cumprod.float().reshape(1)])
    return diffusion.Diffusion(alphas.to(device), scheduler.config.prediction_type)
