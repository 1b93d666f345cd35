"""LatentRewardModel: how well does a noisy latent x_t, at timestep t, on its way to a picture, please for this prompt?

It owns its trunk (lpo/backbones/trunk.py: the network's early blocks and the text encoders; no up blocks, no VAE), so
it may have another architecture than the policy. score = exp(logit_scale) cos(image, text) / temperature, where the
image embedding is one bias-free linear map of the pooled features of the trunk. Files: lpo/lrm_files.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from lpo.backbones import Features, pick_device, pick_dtype, placement
from lpo.backbones.speed import SpeedSettings, tune
from lpo.backbones.text_memory import TextMemory
from lpo.backbones.trunk import TextEncoding, Trunk, beside, cast
from lpo.config import ConfigError
from lpo.rng import normal

LOGIT_SCALE_START = 2.6592  # paper: CLIP's ln(1 / 0.07)
GUIDANCE_SCALE = 7.5  # paper: visual feature enhancement


class LatentRewardModel(nn.Module):
    """The LRM. Call `score`; `from_pretrained` and `save` read and write its files."""

    def __init__(self, trunk: Trunk, projection_dim: int, guidance_scale: float = GUIDANCE_SCALE):
        """Raises ConfigError if the projection does not fit a trunk whose pooled text is compared as it is."""
        super().__init__()
        if not trunk.projects_text and projection_dim != trunk.text_width:
            raise ConfigError(
                f"projection_dim is {projection_dim}, but this architecture compares with its {trunk.text_width} "
                "pooled text features: leave projection_dim empty."
            )
        self.trunk = trunk  # no nn.Module: its parts are registered under their own names, which are those in files
        for name, part in trunk.parts.items():
            self.add_module(name, part)
        self.visual_projection = nn.Linear(trunk.width, projection_dim, bias=False)
        self.text_projection = nn.Linear(trunk.text_width, projection_dim, bias=False) if trunk.projects_text else None
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_START))
        self.guidance_scale = guidance_scale  # of the visual feature enhancement; stored with the weights
        self.temperature = 1.0
        self.fingerprint: dict | None = None  # of the latent space; None until known (official folders)
        self.meta: dict = {}
        self.name = ""
        self.mixed_precision: torch.dtype | None = None  # what a trunk with float32 weights computes in; None: float32
        self.same_shapes = False  # compiled: every scored batch is filled up to the batch size
        self._texts = TextMemory()

    @classmethod
    def from_base(
        cls,
        base: str,
        projection_dim: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        feature_layer: int = 18,
        t5: bool = False,
    ) -> LatentRewardModel:
        """An untrained LRM on a base model's early blocks. See `lrm_files.from_base`."""
        from lpo import lrm_files

        where = pick_device(device)
        return lrm_files.from_base(base, projection_dim, where, pick_dtype(dtype, where), seed, feature_layer, t5)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, base: str | None = None, device: str = "auto", dtype: str = "auto"
    ) -> LatentRewardModel:
        """Own format, 'scenes' (the shipped LRM), or an official folder (`base` gives tokenizer and latent space)."""
        from lpo import lrm_files

        where = pick_device(device)
        return lrm_files.load(str(path), base, where, pick_dtype(dtype, where))

    def save(self, path: str | Path, meta: dict | None = None, dtype: str = "float32") -> None:
        """Write own format: lrm.json, model.safetensors (LoRA merged), tokenizer/. Whole or not at all."""
        from lpo import lrm_files

        lrm_files.save(self, Path(path), meta, pick_dtype(dtype, self.device))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def heads(self) -> list[nn.Linear]:
        """The projections: the visual one, and the text one of architectures that have it."""
        return [head for head in (self.visual_projection, self.text_projection) if head is not None]

    def init_heads(self, seed: int, text_projection: Tensor | None = None) -> None:
        """Visual projection gaussian with std 0.02 (paper); text projection as given (CLIP's), else the identity."""
        with torch.no_grad():
            shape = tuple(self.visual_projection.weight.shape)
            self.visual_projection.weight.copy_(normal(shape, seed, "visual_projection") * 0.02)
            if self.text_projection is not None:
                weight = self.text_projection.weight
                weight.copy_(torch.eye(*weight.shape) if text_projection is None else text_projection)

    def cast(self, dtype: torch.dtype) -> LatentRewardModel:
        """Trunk in `dtype`; the heads stay fp32: they are small and set the scale of the score."""
        for part in self.trunk.parts.values():
            cast(part, dtype)
            if isinstance(part, UNet2DConditionModel):
                part.to(memory_format=torch.channels_last)
        return self

    # Scoring
    def text_encoders(self) -> list[nn.Module]:
        """The trunk's parts that read prompts."""
        return [part for name, part in self.trunk.parts.items() if name != self.trunk.network]

    def encode_text(self, prompts: Sequence[str]) -> TextEncoding:
        """One row per prompt. Each distinct prompt is encoded once, and remembered while the text encoder is frozen."""
        if torch.is_grad_enabled() and any(p.requires_grad for part in self.text_encoders() for p in part.parameters()):
            self._texts.clear()  # the weights are about to change
            unique = list(dict.fromkeys(prompts))
            return self.trunk.encode(unique).rows(torch.tensor([unique.index(p) for p in prompts], device=self.device))
        return TextEncoding(*self._texts.recall(prompts, self._encode_frozen, self.device))

    @torch.no_grad()
    def _encode_frozen(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        with placement.at_work(self.device, *self.text_encoders()):
            out = self.trunk.encode(prompts)
        return out.states, out.pooled

    def forget_texts(self) -> None:
        """Call after changing weights by hand: remembered prompts were encoded by the old ones."""
        self._texts.clear()

    def text_features(self, pooled: Tensor) -> Tensor:
        """Text embeddings (B, D), fp32, not normalised: pooled text, projected where the architecture projects it."""
        if self.text_projection is None:
            return pooled.float()
        return self.text_projection(pooled.to(self.text_projection.weight.dtype)).float()

    def guided(self, features: Features) -> Tensor:
        """Pooled features (B, K) of all levels, fp32. Visual feature enhancement: the mid feature is guided,
        uncond + guidance_scale (text - uncond); the down features are the text branch's."""
        mid = features.unconditional_mid + self.guidance_scale * (features.mid - features.unconditional_mid)
        return torch.cat([*features.down, mid], dim=1)

    def image_features(self, features: Features) -> Tensor:
        """Image embeddings (B, D), fp32, not normalised."""
        return self.visual_projection(self.guided(features).to(self.visual_projection.weight.dtype)).float()

    def features(self, latents: Tensor, timesteps: Tensor, text: TextEncoding, unconditional: TextEncoding) -> Features:
        """Pooled features of latents (N, C, H, W) at timesteps (N,); text N rows, unconditional 1 or N rows."""
        mixed = self.mixed_precision
        with torch.autocast(self.device.type, mixed, enabled=mixed is not None):
            return self.trunk.features(latents, timesteps, beside(text, unconditional))

    def forward(self, latents: Tensor, timesteps: Tensor, text: TextEncoding, unconditional: TextEncoding) -> Tensor:
        """Scores (N,). latents (N, C, H, W); timesteps (N,); text N rows; unconditional 1 or N rows."""
        image = self.image_features(self.features(latents, timesteps, text, unconditional))
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
        text, unconditional = self.encode_text(prompts), self.encode_text([""])
        size, parts = batch_size or n, []
        for start in range(0, n, size):
            # compiled code is for one shape: the last rows are repeated, and what becomes of them is dropped
            end = start + size if self.same_shapes and n > size else min(start + size, n)
            rows = torch.arange(start, end).clamp(max=n - 1).to(latents.device)
            here = rows.to(self.device)
            parts.append(self(latents[rows].to(self.device), t[here], text.rows(here), unconditional))
        return torch.cat(parts)[:n]

    # Training
    def set_trainable(self, mode: str, lora_rank: int = 8, train_text_encoder: bool = True, seed: int = 0) -> None:
        """Choose what learns: 'full' (trunk, heads, and the text encoder if wanted), 'lora' (LoRA on the trunk's
        attention, heads) or 'heads'. Everything that learns is fp32."""
        self.requires_grad_(False)
        self._texts.clear()
        network = self.trunk.parts[self.trunk.network]
        if mode == "full":
            network.float().requires_grad_(True)
            for name in self.trunk.text_parts if train_text_encoder else ():
                self.trunk.parts[name].float().requires_grad_(True)
            for parameter in self.trunk.unused():
                parameter.requires_grad_(False)
        elif mode == "lora":
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if ".lora_" in name:
                        parameter.data = parameter.data.float()
                    if ".lora_A." in name:
                        parameter.copy_(normal(tuple(parameter.shape), seed, "lrm lora", name) / lora_rank)
                    parameter.requires_grad_(".lora_" in name)
        elif mode != "heads":
            raise ValueError(f"train is {mode!r}; choose full, lora or heads.")
        for head in self.heads():
            head.float().requires_grad_(True)
        self.logit_scale.data = self.logit_scale.data.float()
        self.logit_scale.requires_grad_(True)

    def enable_gradient_checkpointing(self) -> None:
        self.trunk.parts[self.trunk.network].enable_gradient_checkpointing()

    def tune(self, settings: SpeedSettings) -> None:
        """Layout and compilation of the network, where frozen text encoders rest; changes speed and memory only. See
        lpo/backbones/speed.py and placement.py."""
        tune(self.trunk.parts[self.trunk.network], self.device, settings)
        frozen = [part for part in self.text_encoders() if not any(p.requires_grad for p in part.parameters())]
        placement.place(frozen, self.device, settings.offload)
        self.same_shapes = settings.compile

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def describe(self) -> dict:
        """What lrm.json says besides the weights."""
        return {
            "temperature": self.temperature,
            "guidance_scale": self.guidance_scale,
            "projection_dim": self.visual_projection.out_features,
            "fingerprint": self.fingerprint,
            "meta": dict(self.meta),
        }
