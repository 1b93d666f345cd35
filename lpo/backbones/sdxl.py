"""Stable Diffusion XL behind the backbone protocol: two text encoders, pooled text and picture size as conditions.

Without a negative prompt the unconditional branch is zeros, as in the stock pipeline (force_zeros_for_empty_prompt) and
as LPO's official roll-out has it. The official LRM differs: its unconditional branch is the encoded "" (sdxl_trunk.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpo.backbones import Conditioning, Features
from lpo.backbones.sd import StableDiffusion
from lpo.backbones.sdxl_trunk import StableDiffusionXLTrunk, TextTowers, size_ids
from lpo.backbones.source import model_index
from lpo.backbones.unet import Added, guided_features


class StableDiffusionXL(StableDiffusion):
    """The `Backbone` of Stable Diffusion XL. See lpo/backbones/sd.py."""

    pipeline, added_condition, zero_empty = "StableDiffusionXLPipeline", "text_time", True
    kinds: ClassVar[dict[str, type]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }

    def __init__(self, parts: dict, base: str, device: torch.device, dtype: torch.dtype):
        super().__init__(parts, base, device, dtype)
        encoders = parts["text_encoder"], parts["text_encoder_2"]
        self.towers = TextTowers(encoders, (parts["tokenizer"], parts["tokenizer_2"]))
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = tuple(side * self.factor for side in self.latent_shape()[1:])  # the model's own, in pixels

    @classmethod
    def from_pretrained(cls, source: str, base: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionXL:
        backbone = super().from_pretrained(source, base, device, dtype)
        backbone.zero_empty = model_index(source).get("force_zeros_for_empty_prompt", True)
        return backbone

    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        return self.towers.encode(texts)

    def _size_ids(self, latents: Tensor) -> Tensor:
        """(6,): original and target size are the picture's own and nothing is cropped, as in the stock pipeline."""
        return size_ids(tuple(side * self.factor for side in latents.shape[-2:])).to(latents.device)

    def _added(self, x: Tensor, pooled: Tensor | None) -> Added:
        return {
            "text_embeds": pooled.to(self.unet.dtype),
            "time_ids": self._size_ids(x).to(pooled.dtype).expand(len(x), -1),
        }

    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.unet, x_t, t, conditioning, self._size_ids(x_t))

    def trunk(self, feature_layer: int = 18, t5: bool = False) -> StableDiffusionXLTrunk:
        """The early blocks and text encoders as an LRM's trunk. The backbone cannot sample afterwards."""
        return StableDiffusionXLTrunk(self.unet, self.towers, self.size)
