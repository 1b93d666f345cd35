"""What every backbone does alike, whatever its network: prompts, pictures in and out of the latent space, one Gaussian
step of its process, and the adapters on its denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lpo.backbones import Conditioning, placement
from lpo.backbones.latent_space import encode_pictures, scale_and_shift, vae_fingerprint
from lpo.backbones.lora import AdapterStack
from lpo.backbones.speed import SpeedSettings, tune
from lpo.backbones.text_memory import TextMemory
from lpo.config import Adapter, Policy
from lpo.diffusion import Process

VAE_AREA = 4 * 64 * 64  # of latents that the VAE takes at once: four of SD1.5 or one of SDXL, 1.5 GiB in half precision


class LatentDiffusion:
    """The common half of a `Backbone`: text encoders, a VAE, a process and a stack of adapters on the denoiser,
    `adapters.net`. Text encoders and VAE may rest in main memory between uses."""

    zero_empty = False  # no negative prompt means zeros, not the encoded ""

    def __init__(
        self,
        vae: AutoencoderKL,
        process: Process,
        adapters: AdapterStack,
        text_encoders: Mapping[str, nn.Module],
        base: str,
        device: torch.device,
    ):
        self.vae, self.process, self.adapters = vae, process, adapters
        self.text_encoders, self.texts = list(text_encoders.values()), TextMemory()
        self.device, self.policy = device, Policy(base)
        self._fingerprint: dict | None = None

    # Text
    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token states (B, L, D) and, for models that use it, pooled text (B, P)."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
        """The prompts and, beside each, the negative prompt. Each text is encoded once and by itself, so that neither
        its neighbours nor what was asked before can touch its last digits."""
        zeros = self.zero_empty and not negative_prompt
        rows = self.texts.recall(prompts if zeros else [*prompts, negative_prompt], self._one_by_one, self.device)
        own = [part[: len(prompts)] for part in rows]
        other = [torch.zeros_like(a) if zeros else b[-1:].expand_as(a) for a, b in zip(own, rows, strict=True)]
        return Conditioning(own[0], other[0], *own[1:], *other[1:])

    def _one_by_one(self, texts: Sequence[str]) -> list[Tensor]:
        with placement.at_work(self.device, *self.text_encoders):
            encoded = [self.encode_texts([text]) for text in texts]
        return [torch.cat(part) for part in zip(*encoded, strict=True)]

    # Pictures
    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled posterior mean and std (B, C, h, w), fp32, of pictures (B, 3, H, W) in [-1, 1]."""
        with placement.at_work(self.device, self.vae):
            found = [encode_pictures(self.vae, part) for part in pictures.split(self._together(8, pictures))]
        mean, std = (torch.cat(part) for part in zip(*found, strict=True))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], fp32, of scaled latents."""
        scale, shift = scale_and_shift(self.vae)
        raw = (latents / scale + shift).to(self.device, self.vae.dtype)
        with placement.at_work(self.device, self.vae):
            pictures = [self.vae.decode(part).sample for part in raw.split(self._together(1, latents))]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _together(factor: int, rows: Tensor) -> int:
        """How many rows the VAE takes at once; `factor`: how often larger than its latents they are."""
        return max(1, VAE_AREA * factor**2 // (rows.shape[-2] * rows.shape[-1]))

    def fingerprint(self) -> dict:
        """Of the latent space; computed once."""
        if self._fingerprint is None:
            with placement.at_work(self.device, self.vae):
                self._fingerprint = vae_fingerprint(self.vae, self.process)
        return self._fingerprint

    # One Gaussian step
    def transition(
        self, x_t: Tensor, prediction: Tensor, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.process.step(x_t, prediction, t, prev_t, eta)

    def step_std(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        return self.process.step_std(t, prev_t, eta)

    def step_sensitivity(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        return self.process.step_sensitivity(t, prev_t, eta)

    # Adapters
    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        self.texts.clear()  # adapters may change the text encoders
        self.adapters.set_frozen(adapters)
        self.policy = replace(self.policy, adapters=tuple(adapters))

    def add_trainable_adapter(self, rank: int, targets: Sequence[str], seed: int) -> None:
        self.adapters.add_trainable(rank, targets, seed)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.adapters.trainable_parameters()

    def reference(self) -> AbstractContextManager[None]:
        return self.adapters.reference()

    def enable_gradient_checkpointing(self) -> None:
        self.adapters.net.enable_gradient_checkpointing()

    def tune(self, settings: SpeedSettings) -> None:
        tune(self.adapters.net, self.device, settings)
        placement.place([*self.text_encoders, self.vae], self.device, settings.offload)

    def save_adapter(self, path: Path) -> None:
        self.adapters.save(path)
