"""Stable Diffusion 1.x and 2.x (and Scenes, which is one) behind the backbone protocol, on stock diffusers classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lpo import diffusion
from lpo.backbones import Conditioning, Features
from lpo.backbones.latent_space import fingerprint
from lpo.backbones.lora import AdapterStack
from lpo.backbones.sd_trunk import StableDiffusionTrunk, tokenize
from lpo.backbones.unet import guided_features
from lpo.config import Adapter, ConfigError, Policy

transformers_logging.disable_progress_bar()  # its bars end up in every log.txt


def _move(part: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """`part.to(device, dtype)`, but no cast where none is needed: diffusers warns of each."""
    return part.to(device) if part.dtype == dtype else part.to(device, dtype)


class StableDiffusion:
    """The `Backbone` of Stable Diffusion 1.x / 2.x. `base` is the name the user gave, `source` what it resolved to."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        base: str,
        device: torch.device,
        dtype: torch.dtype,
    ):
        for part in (unet, vae, text_encoder):
            part.requires_grad_(False).eval()
        # fp16 overflows in Stable Diffusion's VAE; bf16 and fp32 do not.
        vae_dtype = torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype
        self.unet = _move(unet, device, dtype).to(memory_format=torch.channels_last)
        self.vae = _move(vae, device, vae_dtype)
        self.text_encoder, self.tokenizer = _move(text_encoder, device, dtype), tokenizer
        self.scheduler, self.device, self.policy = scheduler, device, Policy(base)
        alphas = scheduler.alphas_cumprod.float()
        # One more entry at the end, so that index -1 is the end of the trajectory.
        self.alphas = torch.cat([alphas, scheduler.final_alpha_cumprod.float().reshape(1)]).to(device)
        self.process = diffusion.Diffusion(self.alphas, scheduler.config.prediction_type)
        self.adapters = AdapterStack(self.unet, "unet", {"text_encoder": self.text_encoder})
        self._fingerprint: dict | None = None

    @classmethod
    def from_pretrained(cls, source: str, base: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """From a diffusers folder, a hub id or a .safetensors file. Raises ConfigError with one sentence."""
        try:
            if os.path.isfile(source):
                from diffusers import StableDiffusionPipeline

                pipe = StableDiffusionPipeline.from_single_file(source, torch_dtype=dtype, safety_checker=None)
                unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
                scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
            else:
                unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=dtype)
                vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=dtype)
                text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype)
                tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
                scheduler = load_scheduler(source)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ConfigError(f"The model {base} could not be loaded as Stable Diffusion 1.x/2.x: {reason}") from error
        return cls(unet, vae, text_encoder, tokenizer, scheduler, base, device, dtype)

    # Text and pictures
    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """Token states (B, L, D) of the prompts and, beside each, of the negative prompt."""
        ids = tokenize(self.tokenizer, self.text_encoder, [*prompts, negative_prompt]).to(self.device)
        states = self.text_encoder(ids)[0]
        return Conditioning(states[:-1], states[-1:].expand(len(prompts), -1, -1))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled posterior mean and std (B, C, h, w), fp32, of pictures (B, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(pictures.to(self.device, self.vae.dtype)).latent_dist
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], fp32, of scaled latents."""
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        pictures = self.vae.decode((latents / scale + shift).to(self.device, self.vae.dtype)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = self.unet.config.sample_size
        default_height, default_width = size if isinstance(size, (list, tuple)) else (size, size)
        rows, columns = (height or default_height * factor) // factor, (width or default_width * factor) // factor
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
        dtype = self.unet.dtype
        if guidance_scale == 1:
            return self.unet(x_t.to(dtype), t, conditioning.text.to(dtype)).sample.float()
        states = torch.cat([conditioning.unconditional, conditioning.text]).to(dtype)
        both = self.unet(torch.cat([x_t, x_t]).to(dtype), torch.cat([t, t]), states).sample.float()
        unconditional, text = both.chunk(2)
        return unconditional + guidance_scale * (text - unconditional)

    def transition(
        self, x_t: Tensor, prediction: Tensor, t: int | Tensor, prev_t: int | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.process.step(x_t, prediction, t, prev_t, eta)

    def step_std(self, t: int | Tensor, prev_t: int | Tensor, eta: float) -> Tensor:
        return self.process.step_std(t, prev_t, eta)

    def step_sensitivity(self, t: int | Tensor, prev_t: int | Tensor, eta: float) -> Tensor:
        return self.process.step_sensitivity(t, prev_t, eta)

    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.unet, x_t, t, conditioning)

    def trunk(self) -> StableDiffusionTrunk:
        """The early blocks and text encoder as an LRM's trunk. The backbone cannot sample afterwards."""
        return StableDiffusionTrunk(self.unet, self.text_encoder, self.tokenizer)

    def fingerprint(self) -> dict:
        """Of the latent space; computed once."""
        if self._fingerprint is None:
            config = self.vae.config
            self._fingerprint = fingerprint(
                self.encode, config.scaling_factor, config.shift_factor or 0.0, self.process.describe()
            )
        return self._fingerprint

    # Adapters
    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        self.adapters.set_frozen(adapters)
        self.policy = Policy(self.policy.base, tuple(adapters))

    def add_trainable_adapter(self, rank: int, targets: Sequence[str], seed: int) -> None:
        self.adapters.add_trainable(rank, targets, seed)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.adapters.trainable_parameters()

    def reference(self) -> AbstractContextManager[None]:
        return self.adapters.reference()

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def save_adapter(self, path: Path) -> None:
        self.adapters.save(path)


def load_scheduler(source: str) -> DDIMScheduler:
    """DDIM with the noise schedule of the model, whichever sampler its folder names."""
    return DDIMScheduler.from_pretrained(source, subfolder="scheduler")
