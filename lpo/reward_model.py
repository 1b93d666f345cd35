"""LatentRewardModel: how well does a noisy latent x_t, at timestep t, on its way to a picture, please for this prompt?

It owns its trunk (the UNet's down and mid blocks; no up blocks, no VAE), tokenizer and text encoder, so it may have
another architecture than the policy. score = exp(logit_scale) cos(image, text) / temperature, where the image embedding
is one bias-free linear map of the spatial means of every down level and the mid block. Files: lpo/lrm_files.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lpo.backbones import Conditioning, Features, pick_device, pick_dtype
from lpo.backbones.sd import guided_features, tokenize
from lpo.rng import normal

LOGIT_SCALE_START = 2.6592  # paper: CLIP's ln(1 / 0.07)
GUIDANCE_SCALE = 7.5  # paper: visual feature enhancement


@dataclass(frozen=True)
class TextEncoding:
    """The text tower's outputs: token states (B, L, D) for cross-attention, pooled (B, P) before projection."""

    states: Tensor
    pooled: Tensor


class LatentRewardModel(nn.Module):
    """The LRM. Call `score`; `from_pretrained` and `save` read and write its files."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        projection_dim: int,
        guidance_scale: float = GUIDANCE_SCALE,
    ):
        super().__init__()
        if unet.config.addition_embed_type is not None:
            raise ValueError("This UNet needs added conditioning (SDXL); an SD1.x or SD2.x UNet is expected.")
        unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        width = sum(unet.config.block_out_channels) + unet.config.block_out_channels[-1]  # SD1.5: 3520 + 1280 = 4800
        self.visual_projection = nn.Linear(width, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_START))
        self.guidance_scale = guidance_scale
        self.temperature = 1.0
        self.fingerprint: dict | None = None  # of the latent space; None until known (official folders)
        self.meta: dict = {}
        self.name = ""
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_base(
        cls, base: str, projection_dim: int | None = None, device: str = "auto", dtype: str = "float32", seed: int = 0
    ) -> LatentRewardModel:
        """An untrained LRM on a base model's early blocks. See `lrm_files.from_base`."""
        from lpo import lrm_files

        return lrm_files.from_base(base, projection_dim, pick_device(device), pick_dtype(dtype), seed)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, base: str | None = None, device: str = "auto", dtype: str = "float32"
    ) -> LatentRewardModel:
        """Own format, 'scenes' (the shipped LRM), or an official folder (`base` gives tokenizer and latent space)."""
        from lpo import lrm_files

        return lrm_files.load(str(path), base, pick_device(device), pick_dtype(dtype))

    def save(self, path: str | Path, meta: dict | None = None, dtype: str = "float32") -> None:
        """Write own format: lrm.json, model.safetensors (LoRA merged), tokenizer/. Whole or not at all."""
        from lpo import lrm_files

        lrm_files.save(self, Path(path), meta, pick_dtype(dtype))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def init_heads(self, seed: int, text_projection: Tensor | None = None) -> None:
        """Visual projection gaussian with std 0.02 (paper); text projection as given (CLIP's), else the identity."""
        with torch.no_grad():
            shape = tuple(self.visual_projection.weight.shape)
            self.visual_projection.weight.copy_(normal(shape, seed, "visual_projection") * 0.02)
            weight = self.text_projection.weight
            weight.copy_(torch.eye(*weight.shape) if text_projection is None else text_projection)

    # Scoring
    def encode_text(self, prompts: Sequence[str]) -> TextEncoding:
        """One row per prompt. Each distinct prompt is encoded once, and remembered while the text encoder is frozen."""
        unique = list(dict.fromkeys(prompts))
        training = torch.is_grad_enabled() and next(self.text_encoder.parameters()).requires_grad
        if training:
            self._cache.clear()  # the weights are about to change
            fresh, known = unique, {}
        else:
            fresh, known = [p for p in unique if p not in self._cache], self._cache
        if fresh:
            with torch.set_grad_enabled(training):
                out = self.text_encoder(tokenize(self.tokenizer, self.text_encoder, fresh).to(self.device))
            known.update({p: (out[0][i], out[1][i]) for i, p in enumerate(fresh)})
        rows = [known[p] for p in prompts]
        return TextEncoding(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))

    def forget_texts(self) -> None:
        """Call after changing weights by hand: remembered prompts were encoded by the old ones."""
        self._cache.clear()

    def text_features(self, pooled: Tensor) -> Tensor:
        """Text embeddings (B, D), fp32, not normalised."""
        return self.text_projection(pooled.to(self.text_projection.weight.dtype)).float()

    def image_features(self, features: Features) -> Tensor:
        """Image embeddings (B, D), fp32, not normalised. Visual feature enhancement: the mid feature is guided,
        uncond + guidance_scale (text - uncond); the down features are the text branch's."""
        mid = features.unconditional_mid + self.guidance_scale * (features.mid - features.unconditional_mid)
        pooled = torch.cat([*features.down, mid], dim=1).to(self.visual_projection.weight.dtype)
        return self.visual_projection(pooled).float()

    def forward(self, latents: Tensor, timesteps: Tensor, text: TextEncoding, unconditional: Tensor) -> Tensor:
        """Scores (N,). latents (N, C, H, W); timesteps (N,); text N rows; unconditional states (1 or N, L, D)."""
        conditioning = Conditioning(text.states, unconditional.expand(len(latents), -1, -1))
        image = self.image_features(guided_features(self.unet, latents, timesteps, conditioning))
        cosine = (F.normalize(image, dim=-1) * F.normalize(self.text_features(text.pooled), dim=-1)).sum(dim=-1)
        return self.logit_scale.float().exp() * cosine / self.temperature

    def score(
        self, latents: Tensor, timesteps: Tensor | int, prompts: Sequence[str], batch_size: int | None = None
    ) -> Tensor:
        """Scores (N,), fp32, of latents (N, C, H, W) at timesteps (N,) for N prompts.

        Carries gradients to whatever is trainable, unless under torch.no_grad. `batch_size` rows at a time.
        """
        n = len(latents)
        if len(prompts) != n:
            raise ValueError(f"{n} latents need {n} prompts, not {len(prompts)}.")
        t = torch.as_tensor(timesteps, device=self.device).reshape(-1).expand(n)
        text, unconditional = self.encode_text(prompts), self.encode_text([""]).states
        parts = []
        for start in range(0, n, batch_size or n):
            rows = slice(start, start + (batch_size or n))
            part = TextEncoding(text.states[rows], text.pooled[rows])
            parts.append(self(latents[rows].to(self.device), t[rows], part, unconditional))
        return torch.cat(parts)

    # Training
    def set_trainable(self, mode: str, lora_rank: int = 8, train_text_encoder: bool = True, seed: int = 0) -> None:
        """Choose what learns: 'full' (trunk, heads, and the text encoder if wanted), 'lora' (LoRA on the trunk's
        attention, heads) or 'heads'. Everything that learns is fp32."""
        self.requires_grad_(False)
        self._cache.clear()
        if mode == "full":
            self.unet.float().requires_grad_(True)
            if train_text_encoder:
                self.text_encoder.float().requires_grad_(True)
        elif mode == "lora":
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
            with torch.no_grad():
                for name, parameter in self.unet.named_parameters():
                    if ".lora_A." in name:
                        parameter.copy_(normal(tuple(parameter.shape), seed, "lrm lora", name) / lora_rank)
                    parameter.requires_grad_(".lora_" in name)
        elif mode != "heads":
            raise ValueError(f"train is {mode!r}; choose full, lora or heads.")
        for head in (self.visual_projection, self.text_projection):
            head.float().requires_grad_(True)
        self.logit_scale.data = self.logit_scale.data.float()
        self.logit_scale.requires_grad_(True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def with_guidance(self, guidance_scale: float) -> None:
        """Change the guidance of the visual feature enhancement (a property of the trained LRM; stored with it)."""
        self.guidance_scale = guidance_scale

    def describe(self) -> dict:
        """What lrm.json says besides the weights."""
        return {
            "temperature": self.temperature,
            "guidance_scale": self.guidance_scale,
            "projection_dim": self.visual_projection.out_features,
            "fingerprint": self.fingerprint,
            "meta": dict(self.meta),
        }
