"""Every setting of every command, in one place: frozen classes whose field metadata feeds the command line, the forms
and the docs, and which refuse absurd values with one sentence. Imports no torch, so the web process may read it.

The presets, each value with its source, are in lpo/presets.py and re-exported here as PRESETS.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lpo.options import ConfigError, from_dict, opt, ordered, to_dict, validate
from lpo.policy import Adapter, Policy, Search, search_args, searchable
from lpo.presets import PRESETS, SOURCES

DTYPES = ("auto", "float32", "bfloat16", "float16")


# Settings shared word for word by several commands.
def _steps(default: int = 20) -> Any:
    return opt(default, "denoising steps of the sampler", min=1, max=1000, main=True)


def _guidance(default: float = 5.0) -> Any:
    return opt(default, "classifier-free guidance scale of the policy; 1 is off", min=0.0, max=50.0, main=True)


def _eta(default: float) -> Any:
    return opt(default, "noise of each step: 0 is deterministic DDIM, 1 adds as much noise as DDPM", min=0.0, max=1.0)


def _side() -> Any:
    return opt(None, "picture side in pixels; empty means the model's own size", min=8, max=4096)


def _device() -> Any:
    return opt("auto", "auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one")


def _dtype() -> Any:
    return opt(
        "auto",
        "number format of the frozen weights; trained weights stay float32. auto: bfloat16 on a GPU that has it, else "
        "float32",
        choices=DTYPES,
    )


def _channels_last() -> Any:
    return opt(
        "auto",
        "memory layout of convolutions, for speed only; auto is on for CPUs and NVIDIA GPUs",
        choices=("auto", "on", "off"),
    )


def _compile() -> Any:
    return opt(False, "compile the repeated layers: minutes at the start, then faster steps; for long runs on a GPU")


def _tf32() -> Any:
    return opt(True, "NVIDIA GPUs: multiply float32 matrices at TF32 precision, which is still above bfloat16's")


def _micro_batch() -> Any:
    return opt(
        None,
        "pairs in one forward and backward; gradients are added up, so it changes memory and speed only; empty takes "
        "the whole batch at once",
        min=1,
        max=65536,
    )


def _seed() -> Any:
    return opt(0, "every random draw of the run is keyed by this number", min=0, max=2**63 - 1)


def _mismatch() -> Any:
    return opt(False, "use an LRM or adapter of another latent space than the base's (such an LRM scores noise)")


@dataclass(frozen=True)
class SampleConfig:
    """`sample`: pictures for every prompt x every seed."""

    policy: Policy = opt(  # noqa: RUF009
        Policy(), "the model that draws", main=True
    )
    prompts: tuple[str, ...] = opt((), "the prompts, or one path of a .json or .txt prompt file", main=True)
    seeds: tuple[int, ...] = opt(
        (0,), "a picture per prompt and seed; a seed is the same noise for every policy", main=True
    )
    steps: int = _steps()
    guidance_scale: float = _guidance()
    eta: float = _eta(0.0)
    height: int | None = _side()
    width: int | None = _side()
    negative_prompt: str = opt("", "what the unconditional branch is told")
    batch_size: int = opt(16, "pictures sampled together; changes speed and memory only", min=1, max=4096)
    device: str = _device()
    allow_latent_mismatch: bool = _mismatch()
    dtype: str = _dtype()
    channels_last: str = _channels_last()
    compile: bool = _compile()
    tf32: bool = _tf32()

    def __post_init__(self) -> None:
        validate(self)
        searchable(self.policy, self.eta)


@dataclass(frozen=True)
class TraceConfig:
    """`trace`: the trajectories of one prompt, kept whole and scored by LRMs at every step."""

    policy: Policy = opt(  # noqa: RUF009
        Policy(), "the model that draws", main=True
    )
    lrm: tuple[str, ...] = opt(("scenes",), "LRM folders that score the trace; 'scenes' is the shipped one", main=True)
    prompt: str = opt("", "the prompt to follow", main=True)
    seeds: tuple[int, ...] = opt((0,), "one trajectory per seed", main=True)
    steps: int = _steps()
    guidance_scale: float = _guidance()
    eta: float = _eta(1.0)
    siblings: int = opt(
        0, "candidates drawn and scored at each step, as LPO does; 0 for none", min=0, max=64, main=True
    )
    threshold: str = opt(
        "sigma", "how the keep threshold of siblings varies with t", choices=("none", "linear", "variance", "sigma")
    )
    threshold_min: float = opt(0.35, "threshold at the last step", min=0.0, max=1.0)
    threshold_max: float = opt(0.5, "threshold at the first step", min=0.0, max=1.0)
    score_timestep: str = opt(
        "own", "timestep siblings are scored at: their parent's (official) or their own", choices=("parent", "own")
    )
    height: int | None = _side()
    width: int | None = _side()
    negative_prompt: str = opt("", "what the unconditional branch is told")
    allow_latent_mismatch: bool = _mismatch()
    device: str = _device()
    dtype: str = _dtype()
    channels_last: str = _channels_last()
    compile: bool = _compile()
    tf32: bool = _tf32()

    def __post_init__(self) -> None:
        validate(self)
        if self.siblings == 1:
            raise ConfigError("siblings is 1: one candidate cannot be compared; use 0 (none) or 2 and more.")
        ordered(self, "threshold_min", "threshold_max")
        searchable(self.policy, self.eta)


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
    steps: int = opt(4000, "optimiser steps", min=1, max=10**7, main=True, source="paper, SD1.5")
    batch_size: int = opt(128, "pairs per step", min=1, max=65536, main=True, source="paper, SD1.5")
    warmup_steps: int = opt(
        500, "steps over which the learning rate rises from 0", min=0, max=10**6, source="paper, SD1.5"
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
        "", "safetensors file with CLIP's text_projection.weight, for init 'base'; empty starts it as the identity"
    )
    guidance_scale: float = opt(
        7.5, "visual feature enhancement: guidance applied to the mid feature", min=0.0, max=50.0, source="paper"
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
    seed: int = _seed()
    save_every: int = opt(1000, "steps between checkpoints; the last is always kept", min=1, max=10**7)
    eval_every: int = opt(200, "steps between evaluations on held-out pairs", min=1, max=10**7)
    micro_batch_size: int | None = _micro_batch()
    gradient_checkpointing: bool = opt(False, "less memory for about a third more compute in training")
    allow_latent_mismatch: bool = _mismatch()
    device: str = _device()
    dtype: str = _dtype()
    channels_last: str = _channels_last()
    compile: bool = _compile()
    tf32: bool = _tf32()

    def __post_init__(self) -> None:
        validate(self)
        ordered(self, "t_min", "t_max")


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
    steps: int = _steps()
    guidance_scale: float = _guidance()
    eta: float = _eta(1.0)
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
    seed: int = _seed()
    save_every: int = opt(
        20, "iterations between checkpoints; several are kept so that an earlier one can be chosen", min=1, max=10**7
    )
    height: int | None = _side()
    width: int | None = _side()
    score_batch_size: int = opt(256, "siblings scored together; changes speed and memory only", min=1, max=65536)
    micro_batch_size: int | None = _micro_batch()
    gradient_checkpointing: bool = opt(False, "less memory for about a third more compute in training")
    allow_latent_mismatch: bool = _mismatch()
    device: str = _device()
    dtype: str = _dtype()
    channels_last: str = _channels_last()
    compile: bool = _compile()
    tf32: bool = _tf32()

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


CONFIGS: dict[str, type] = {
    "sample": SampleConfig,
    "trace": TraceConfig,
    "train-lrm": LRMConfig,
    "train-lpo": LPOConfig,
}


def from_preset(cls: type, name: str, **overrides: Any) -> Any:
    """A config from a named preset; `overrides` are plain values that win over it."""
    command = next(c for c, k in CONFIGS.items() if k is cls)
    if name not in PRESETS[command]:
        raise ConfigError(f"There is no preset {name!r} for {command}; choose one of {', '.join(PRESETS[command])}.")
    return from_dict(cls, {**PRESETS[command][name], **overrides})


def to_args(cfg: Any, default: Any) -> list[str]:
    """The command-line flags that turn `default` into `cfg` (for showing the equivalent command)."""
    args: list[str] = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if value == getattr(default, f.name):
            continue
        if isinstance(value, Policy):
            args += ["--base", value.base]
            args += ["--unet", value.unet] if value.unet else []
            args += ["--adapters", *(f"{a.path}@{a.strength:g}" for a in value.adapters)] if value.adapters else []
            args += search_args(value.search) if value.search is not None else []
        elif isinstance(value, tuple):
            args += [f"--{f.name}", *map(str, value)]
        else:
            args += [
                f"--{f.name}",
                "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value),
            ]
    return args


__all__ = [
    "CONFIGS",
    "PRESETS",
    "SOURCES",
    "Adapter",
    "ConfigError",
    "LPOConfig",
    "LRMConfig",
    "Policy",
    "SampleConfig",
    "Search",
    "TraceConfig",
    "from_dict",
    "from_preset",
    "opt",
    "to_args",
    "to_dict",
    "validate",
]
