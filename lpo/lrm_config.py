"""The settings of `train-lrm`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpo import shared_settings as shared
from lpo.options import ConfigError, opt, ordered, validate


@dataclass(frozen=True)
class LRMConfig:
    """`train-lrm`: a latent reward model from preference pairs."""

    base: str = opt("scenes", "model whose latents, tokenizer and (for init 'base') weights are used", main=True)
    init: str = opt("scenes", "start weights: 'base', an LRM folder, or 'scenes' (the shipped warm LRM)", main=True)
    pairs: str = opt("pairs.jsonl", "preference pairs, one JSON object a line", main=True)
    train: str = opt(
        "full",
        "what is trained: all weights, a LoRA on the trunk, or only the heads",
        choices=("full", "lora", "heads"),
        main=True,
    )
    lr: float = opt(1e-5, "peak learning rate of AdamW", min=0.0, max=1.0, main=True, source="paper")
    heads_lr: float | None = opt(
        None, "learning rate of the projections and logit scale; empty means lr", min=0.0, max=1.0
    )
    steps: int = opt(4000, "optimiser steps, at most", min=1, max=10**7, main=True, source="paper, SD1.5")
    batch_size: int = opt(128, "pairs per step", min=1, max=65536, main=True, source="paper, SD1.5")
    warmup_steps: int = opt(
        500, "steps over which the learning rate rises from 0", min=0, max=10**6, source="paper, SD1.5"
    )
    max_epochs: float = opt(
        0.0,
        "fewer steps when the pairs are few: no pair is seen more often than this; 0 is off",
        min=0.0,
        max=1e6,
    )
    lr_decay: str = opt("constant", "learning rate after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = opt(0.01, "AdamW weight decay", min=0.0, max=10.0, source="torch's default")
    max_grad_norm: float = opt(1.0, "gradient norm clipped to this; 0 is off", min=0.0, max=1e6)
    lora_rank: int = opt(8, "rank of the trunk's LoRA, when train is lora", min=1, max=1024)
    train_text_encoder: bool = opt(True, "train the LRM's text encoder too (when train is full)", source="paper")
    projection_dim: int | None = opt(
        None, "size of the shared embedding for init 'base'; empty means the text encoder's own", min=1, max=8192
    )
    text_projection: str = opt(
        "",
        "for init 'base' on SD1.x and SD2.x, whose folders lack CLIP's text projection: a CLIP folder, hub id or "
        ".safetensors file that has it; 'identity' does without, which takes more training to read prompts",
    )
    guidance_scale: float = opt(
        7.5,
        "visual feature enhancement: guidance applied to the mid feature; for init 'base' only, another start LRM "
        "keeps the one that it was trained with",
        min=0.0,
        max=50.0,
        source="paper",
    )
    feature_layer: int = opt(
        18,
        "SD3, for init 'base': transformer layer, from 1, whose image tokens are read; later layers are dropped",
        min=1,
        max=1000,
        source="paper, SD3",
    )
    t5: bool = opt(False, "SD3, for init 'base': the LRM reads prompts with T5 too (19 GB more in float32)")
    timesteps: int = opt(
        20, "number of timesteps on the training grid {1, 51, ...}", min=1, max=1000, source="code: 20"
    )
    t_min: int = opt(0, "smallest timestep trained", min=0, max=1000)
    t_max: int = opt(1000, "largest timestep trained", min=0, max=1000)
    resample_latents: bool = opt(False, "draw latents from the encoder's posterior anew instead of using its mean")
    calibration: float = opt(0.1, "share of the training pairs set aside to fit the temperature", min=0.0, max=0.5)
    keep: str = opt(
        "last",
        "the final LRM: the last step, or the step with the lowest loss on the calibration pairs",
        choices=("last", "best"),
    )
    anchor: float = opt(
        0.0, "pull towards the start weights, per step and learning rate, as a weight decay", min=0.0, max=1e6
    )
    fit_start: bool = opt(
        False, "before training, solve for what chosen pictures have in common whatever the prompt (few labels go far)"
    )
    latent_cache: str = opt("", "folder of cached latents, shared between runs; empty means the run's own")
    seed: int = shared.seed()
    save_every: int = opt(1000, "steps between checkpoints; the last is always kept", min=1, max=10**7)
    eval_every: int = opt(200, "steps between evaluations on held-out pairs", min=1, max=10**7)
    micro_batch_size: int | None = shared.micro_batch()
    gradient_checkpointing: bool = shared.checkpointing()
    allow_latent_mismatch: bool = shared.allow_mismatch()
    device: str = shared.device()
    dtype: str = shared.dtype()
    channels_last: str = shared.channels_last()
    compile: bool = shared.compile_layers()
    tf32: bool = shared.tf32()
    offload: str = shared.offload()

    def __post_init__(self) -> None:
        validate(self)
        ordered(self, "t_min", "t_max")
        if not self.grid():
            raise ConfigError(
                f"No timestep of the grid of {self.timesteps} lies between t_min {self.t_min} and t_max {self.t_max}: "
                "widen the window or use more timesteps."
            )

    def grid(self) -> list[int]:
        """The timesteps trained, ascending."""
        grid = (1 + 1000 * k // self.timesteps for k in range(self.timesteps))
        return [t for t in grid if self.t_min <= t <= self.t_max]

    def planned_steps(self, pairs: int) -> int:
        """The steps taken with so many training pairs: `steps`, or what `max_epochs` passes need, if fewer."""
        if not self.max_epochs:
            return self.steps
        return min(self.steps, max(1, math.ceil(self.max_epochs * pairs / self.batch_size)))
