"""The settings of `train-lpo`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lpo import shared_settings as shared
from lpo.options import ConfigError, opt, ordered, validate
from lpo.policy import Policy


@dataclass(frozen=True)
class LPOConfig:
    """`train-lpo`: a LoRA adapter that raises the reward of an LRM, step by step."""

    policy: Policy = opt(  # noqa: RUF009
        Policy(), "where training starts; its adapters stay frozen and belong to the reference", main=True
    )
    lrm: str = opt(
        "scenes",
        "LRM folder that judges siblings; 'scenes' is the shipped one; FOLDER@BASE for an official one of another base",
        main=True,
    )
    prompts: str = opt("", "training prompts: a .json list or a .txt file", main=True)
    eval_prompts: str = opt(
        "", "held-out prompts for the held-out reward and the sample pictures; empty switches both off"
    )
    eval_count: int = opt(16, "how many held-out prompts are sampled at an evaluation", min=1, max=10000)
    eval_seeds: int = opt(2, "pictures per held-out prompt at an evaluation", min=1, max=64)
    eval_every: int = opt(10, "iterations between evaluations", min=1, max=10**7)
    sample_count: int = opt(4, "how many held-out prompts are also saved as pictures", min=0, max=64)
    iterations: int = opt(100, "rounds of sample, score, select, train", min=1, max=10**7, main=True)
    prompts_per_iteration: int = opt(5, "prompts sampled per round", min=1, max=4096, main=True, source="code, SD1.5")
    train_batch_size: int = opt(10, "kept pairs per optimiser step", min=1, max=65536, source="code, SD1.5")
    steps: int = shared.steps()
    guidance_scale: float = shared.guidance()
    eta: float = shared.eta(1.0)
    siblings: int = opt(4, "candidates x_{t-1} drawn from each x_t", min=2, max=64, main=True, source="paper")
    antithetic: bool = opt(False, "draw siblings in pairs +e, -e: a wider range for the same (even) number")
    threshold: str = opt(
        "sigma", "how the keep threshold varies with t", choices=("none", "linear", "variance", "sigma"), source="paper"
    )
    threshold_min: float = opt(
        0.35, "threshold on p_winner - p_loser at the last step", min=0.0, max=1.0, source="paper, SD1.5"
    )
    threshold_max: float = opt(
        0.5, "threshold on p_winner - p_loser at the first step", min=0.0, max=1.0, source="paper, SD1.5"
    )
    score_timestep: str = opt(
        "own", "timestep siblings are scored at: their parent's (official) or their own", choices=("parent", "own")
    )
    t_min: int = opt(
        0, "smallest timestep branched; the trajectory stops after the last useful step", min=0, max=1000, main=True
    )
    t_max: int = opt(1000, "largest timestep branched", min=0, max=1000)
    beta: float = opt(
        31.0,
        "strength of the pull on the log-ratio margin; small moves far, large moves carefully",
        min=0.0,
        max=1e7,
        main=True,
    )
    beta_unit: str = opt(
        "mean",
        "mean: beta times log-ratios averaged over C, H, W (official); nat: times their sum, alike at every size",
        choices=("mean", "nat"),
    )
    clamp: float = opt(
        0.1, "ratios are clamped to 1 +- this, the real trust region; 0 is off", min=0.0, max=0.99, source="code"
    )
    timestep_weighting: str = opt(
        "none",
        "equal: every step gets the same gradient weight (differs from the paper)",
        choices=("none", "equal"),
    )
    lora_rank: int = opt(8, "rank of the trained LoRA", min=1, max=1024, main=True)
    lora_targets: tuple[str, ...] = opt(("to_q", "to_k", "to_v", "to_out.0"), "layers that get a LoRA", source="code")
    lr: float = opt(1e-4, "learning rate of AdamW", min=0.0, max=1.0, main=True)
    lr_warmup_steps: int = opt(0, "optimiser steps over which the learning rate rises from 0", min=0, max=10**6)
    weight_decay: float = opt(1e-4, "AdamW weight decay", min=0.0, max=10.0, source="code")
    max_grad_norm: float = opt(1.0, "gradient norm clipped to this; 0 is off, as published", min=0.0, max=1e6)
    seed: int = shared.seed()
    save_every: int = opt(
        20, "iterations between checkpoints; several are kept so that an earlier one can be chosen", min=1, max=10**7
    )
    height: int | None = shared.side()
    width: int | None = shared.side()
    score_batch_size: int = opt(256, "siblings scored together; changes speed and memory only", min=1, max=65536)
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
        ordered(self, "threshold_min", "threshold_max")
        if self.policy.search is not None:
            raise ConfigError("LPO trains what samples plainly: leave the search out of its policy.")
        if self.eta == 0:
            raise ConfigError("eta is 0: LPO compares noisy siblings, so eta must be above 0 (published: 1).")
        if self.antithetic and self.siblings % 2:
            raise ConfigError(f"antithetic needs an even number of siblings, not {self.siblings}.")
