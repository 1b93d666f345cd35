"""Stable Diffusion 3 and 3.5 behind the backbone protocol, on stock diffusers classes: MMDiT, flow matching."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from lpo import diffusion
from lpo.backbones import Conditioning, Features
from lpo.backbones.latent_diffusion import LatentDiffusion
from lpo.backbones.latent_space import vae_fingerprint
from lpo.backbones.lora import AdapterStack
from lpo.backbones.mmdit import FEATURE_LAYER, check_layer, guided_features
from lpo.backbones.sd3_text import TextTowers
from lpo.backbones.sd3_trunk import StableDiffusion3Trunk, without_t5
from lpo.backbones.source import load_part, reason
from lpo.backbones.trunk import cast
from lpo.config import ConfigError


class StableDiffusion3(LatentDiffusion):
    """The `Backbone` of Stable Diffusion 3.x. `base` is the name the user gave, `source` what it resolved to.

    t = 1000 sigma, rounded to thousandths (see Backbone); sigma comes from the live scheduler, shift and all.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        towers: TextTowers,
        scheduler: FlowMatchEulerDiscreteScheduler,
        base: str,
        device: torch.device,
        dtype: torch.dtype,
    ):
        if transformer.config.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"{base} takes {transformer.config.in_channels} channels where its latents have "
                f"{vae.config.latent_channels}: take a text-to-image model."
            )
        # fp16 overflows in the VAE unless its config says otherwise; bf16 and fp32 do not.
        upcast = dtype == torch.float16 and vae.config.force_upcast
        encoders = dict(towers.named())
        for part in (transformer, vae, *encoders.values()):
            part.requires_grad_(False).eval().to(device)
            cast(part, torch.float32 if part is vae and upcast else dtype)
        self.transformer, self.towers, self.scheduler = transformer, towers, scheduler
        clips = {name: one for name, one in encoders.items() if name != "text_encoder_3"}
        adapters = AdapterStack(transformer, "transformer", clips)
        super().__init__(vae, diffusion.Flow(), adapters, encoders, base, device)

    @classmethod
    def from_pretrained(cls, source: str, base: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion3:
        """From a diffusers folder or a hub id. Raises ConfigError with one sentence."""
        if os.path.isfile(source):
            raise ConfigError(f"{base} is a single file: load Stable Diffusion 3 from a diffusers folder or a hub id.")
        try:
            transformer = load_part(SD3Transformer2DModel, source, "transformer", dtype)
            vae = load_part(AutoencoderKL, source, "vae", dtype)
            config = transformer.config
            towers = TextTowers.from_pretrained(
                source, dtype, config.joint_attention_dim, config.pooled_projection_dim
            )
            scheduler = load_part(FlowMatchEulerDiscreteScheduler, source, "scheduler")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            told = f"The model {base} could not be loaded as Stable Diffusion 3: {reason(error)}."
            raise ConfigError(told) from error
        return cls(transformer, vae, towers, scheduler, base, device, dtype)

    @classmethod
    def read_fingerprint(cls, source: str) -> dict:
        """Of a base's latent space, without loading its transformer."""
        return vae_fingerprint(load_part(AutoencoderKL, source, "vae"), diffusion.Flow())

    # Text and pictures
    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return self.towers.encode(texts, self.device, self.transformer.dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        config = self.transformer.config
        factor, patch = 2 ** (len(self.vae.config.block_out_channels) - 1), config.patch_size
        height, width = (side or config.sample_size * factor for side in (height, width))
        rows, columns = height / factor, width / factor
        most = config.pos_embed_max_size * patch
        if any(side % patch or not 0 < side <= most for side in (rows, columns)):
            raise ConfigError(
                f"{width} x {height} pixels do not fit this model: use multiples of {patch * factor} up to "
                f"{most * factor}."
            )
        return config.in_channels, int(rows), int(columns)

    # One Gaussian step
    def timesteps(self, steps: int, shape: tuple[int, int, int] | None = None) -> list[float]:
        """Descending, in (0, 1000]. shape: of the latents; matters if the scheduler shifts by the picture's size."""
        mu = None
        if self.scheduler.config.use_dynamic_shifting:
            _, rows, columns = shape or self.latent_shape()
            config, patch = self.scheduler.config, self.transformer.config.patch_size
            tokens = (rows // patch) * (columns // patch)
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = config.base_shift + slope * (tokens - config.base_image_seq_len)  # as the stock pipeline
        self.scheduler.set_timesteps(steps, mu=mu)
        return [round(t, 3) for t in self.scheduler.timesteps.tolist()]

    def predict(self, x_t: Tensor, t: float | Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        """The velocity (B, C, H, W), fp32, both guidance branches in one batch."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).reshape(-1).expand(len(x_t))
        if guidance_scale == 1:
            return self._velocity(x_t, t, conditioning.text, conditioning.pooled)
        states = torch.cat([conditioning.unconditional, conditioning.text])
        pooled = torch.cat([conditioning.pooled_unconditional, conditioning.pooled])
        both = self._velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), states, pooled)
        unconditional, text = both.chunk(2)
        return unconditional + guidance_scale * (text - unconditional)

    def _velocity(self, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        dtype = self.transformer.dtype
        return self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=states.to(dtype),
            pooled_projections=pooled.to(dtype),
        ).sample.float()

    # For reward models
    def features(self, x_t: Tensor, t: float | Tensor, conditioning: Conditioning) -> Features:
        """Image tokens pooled after the paper's layer. Raises ConfigError for a smaller transformer."""
        check_layer(FEATURE_LAYER, len(self.transformer.transformer_blocks))
        return guided_features(self.transformer, x_t, t, conditioning, FEATURE_LAYER)

    def trunk(self, feature_layer: int = FEATURE_LAYER, t5: bool = False) -> StableDiffusion3Trunk:
        """The early blocks and text encoders as an LRM's trunk. The backbone cannot sample afterwards."""
        return StableDiffusion3Trunk(self.transformer, self.towers if t5 else without_t5(self.towers), feature_layer)
