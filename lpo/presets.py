"""Named settings for each command, every value beside its source. Plain data, no imports, no torch.

paper = arXiv 2502.01051; code = the official repository Kwai-Kolors/LPO; per nat = carried over to 4x16x16 latents
at the same strength per nat; measured = chosen by this project's own runs on Scenes.
"""

_SD15, _SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base"
_SDXL, _SD3 = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-3-medium-diffusers"

_SAMPLING = {
    "steps": (20, "paper: 20-step DDIM"),
    "guidance_scale": (5.0, "paper, LPO sampling"),
}
_LPO_PUBLISHED = {
    **_SAMPLING,
    "eta": (1.0, "paper"),
    "siblings": (4, "paper: K = 4"),
    "threshold": ("sigma", "paper: the dynamic threshold"),
    "threshold_min": (0.35, "paper, SD1.5 and SD2.1"),
    "threshold_max": (0.5, "paper, SD1.5 and SD2.1"),
    "beta": (500.0, "paper, on log-probabilities averaged over 4x64x64"),
    "clamp": (0.1, "code: ratios clamped to [0.9, 1.1]"),
    "lora_rank": (4, "code, SD1.5"),
    "weight_decay": (1e-4, "code"),
    "prompts_per_iteration": (5, "code, SD1.5: sample batch"),
    "train_batch_size": (10, "code, SD1.5: train batch"),
    "micro_batch_size": (5, "counted: 12 GiB instead of 22, same maths; docs/performance.md"),
    "iterations": (4000, "code: 5 epochs over 4,000 prompts, 5 a round"),
    "save_every": (200, "ours: twenty checkpoints"),
    "eval_every": (100, "ours"),
}
_LPO_SD = {
    **_LPO_PUBLISHED,
    "lr": (6e-5, "code (the paper says 5e-5)"),
    "score_timestep": ("own", "ours: siblings are less noisy than their parent"),
    "max_grad_norm": (1.0, "ours: the published numbers were tuned unclipped"),
}
_LRM_PUBLISHED = {
    "train": ("full", "paper"),
    "lr": (1e-5, "paper"),
    "steps": (4000, "paper, SD1.5"),
    "batch_size": (128, "paper, SD1.5"),
    "micro_batch_size": (4, "counted: 15 GiB; the whole batch would take 226, more than any card has"),
    "warmup_steps": (500, "paper, SD1.5"),
    "guidance_scale": (7.5, "paper"),
    "timesteps": (20, "code: t uniform over {1, 51, ..., 951}"),
}

_LPO_SDXL = {
    **_LPO_SD,
    "policy": ({"base": _SDXL}, "code; its VAE there is sdxl-vae-fp16-fix, the same latent space"),
    "threshold_min": (0.45, "paper, SDXL"),
    "threshold_max": (0.6, "paper, SDXL"),
    "beta": (500.0, "paper, on log-probabilities averaged over 4x128x128"),
    "lora_rank": (64, "code, SDXL"),
    "lr": (1e-5, "code, SDXL"),
    "prompts_per_iteration": (4, "code, SDXL: sample batch"),
    "train_batch_size": (4, "code, SDXL: train batch"),
    "micro_batch_size": (2, "counted: 11 GiB instead of 13, same maths"),
    "iterations": (5000, "code: 5 epochs over 4,000 prompts, 4 a round"),
    "gradient_checkpointing": (True, "code, SDXL"),
    "score_batch_size": (8, "counted: half the siblings of a step at once, 2.5 GiB; all would want more than training"),
}
_LRM_SDXL = {
    **_LRM_PUBLISHED,
    "base": (_SDXL, "code"),
    "init": ("base", "paper"),
    "steps": (8000, "paper, SDXL"),
    "batch_size": (32, "paper, SDXL"),
    "micro_batch_size": (2, "counted: 37 GiB; the whole batch would take 82"),
    "warmup_steps": (1000, "paper, SDXL"),
    "gradient_checkpointing": (True, "ours: 1024 pixels"),
}

# The paper says of SD3 which layer an LRM reads and that its text encoders stay frozen, and gives no settings of LPO.
_SD3_SAMPLING = {
    "policy": ({"base": _SD3}, "hub id"),
    "steps": (20, "ours, unmeasured: as for SD1.5 and SDXL"),
    "guidance_scale": (5.0, "ours, unmeasured: as for SD1.5 and SDXL"),
    "eta": (0.7, "ours, unmeasured: 1 would draw all the noise anew at every step"),
}
_LPO_SD3 = {
    **_LPO_SD,
    **_SD3_SAMPLING,
    "threshold_min": (0.35, "ours, unmeasured: SD1.5's of the paper; watch the kept fraction"),
    "threshold_max": (0.5, "ours, unmeasured: as threshold_min"),
    "beta": (500.0, "ours, unmeasured: the paper's of both its sizes, on log-probabilities averaged over C, H, W"),
    "lora_rank": (64, "ours, unmeasured: SDXL's in the code"),
    "lr": (1e-5, "ours, unmeasured: SDXL's in the code"),
    "prompts_per_iteration": (4, "ours, unmeasured: SDXL's in the code"),
    "train_batch_size": (4, "ours, unmeasured: SDXL's in the code"),
    "micro_batch_size": (2, "ours, not counted: as for SDXL"),
    "score_batch_size": (8, "ours, not counted: as for SDXL"),
    "iterations": (5000, "ours, unmeasured: 5 epochs over 4,000 prompts, 4 a round"),
    "gradient_checkpointing": (True, "ours: two billion weights"),
}
_LRM_SD3 = {
    **_LRM_PUBLISHED,
    "base": (_SD3, "hub id"),
    "init": ("base", "paper"),
    "feature_layer": (18, "paper"),
    "train_text_encoder": (False, "paper: frozen encoders"),
    "t5": (False, "ours: the score compares with CLIP's pooled text; T5 alone is larger than all the rest"),
    "steps": (8000, "ours, unmeasured: SDXL's in the paper"),
    "batch_size": (32, "ours, unmeasured: SDXL's in the paper"),
    "micro_batch_size": (2, "ours, not counted: as for SDXL"),
    "warmup_steps": (1000, "ours, unmeasured: SDXL's in the paper"),
    "gradient_checkpointing": (True, "ours: two billion weights"),
}

_SOURCED: dict[str, dict[str, dict]] = {
    "sample": {
        "scenes": {**_SAMPLING, "policy": ({"base": "scenes"}, "the embedded model")},
        "sd15": {
            "steps": (20, "paper"),
            "guidance_scale": (7.5, "Stable Diffusion's default"),
            "policy": ({"base": _SD15}, "hub id"),
        },
        "sd21": {
            "steps": (20, "paper"),
            "guidance_scale": (7.5, "Stable Diffusion's default"),
            "policy": ({"base": _SD21}, "hub id"),
        },
        "sdxl": {
            "steps": (20, "paper"),
            "guidance_scale": (5.0, "the stock pipeline's default"),
            "policy": ({"base": _SDXL}, "hub id"),
        },
        "sd3": {
            "steps": (28, "the stock pipeline's default"),
            "guidance_scale": (7.0, "the stock pipeline's default"),
            "policy": ({"base": _SD3}, "hub id"),
        },
    },
    "trace": {
        "scenes": {
            **_SAMPLING,
            "eta": (1.0, "paper"),
            "policy": ({"base": "scenes"}, "the embedded model"),
            "lrm": (["scenes"], "the shipped LRM"),
            "threshold_min": (0.08, "train-lpo's on Scenes, so that a trace says what a training would keep"),
            "threshold_max": (0.2, "as threshold_min"),
        },
        "sd15": {**_SAMPLING, "eta": (1.0, "paper"), "policy": ({"base": _SD15}, "hub id")},
        "sd21": {**_SAMPLING, "eta": (1.0, "paper"), "policy": ({"base": _SD21}, "hub id")},
        "sdxl": {
            **_SAMPLING,
            "eta": (1.0, "paper"),
            "threshold_min": (0.45, "paper, SDXL"),
            "threshold_max": (0.6, "paper, SDXL"),
            "policy": ({"base": _SDXL}, "hub id"),
        },
        "sd3": _SD3_SAMPLING,
    },
    "train-lrm": {
        "scenes": {
            "base": ("scenes", "the embedded model"),
            "init": ("scenes", "few labels must go far: start from the shipped warm LRM"),
            "text_projection": ("identity", "for init 'base': the embedded model was made without a projection"),
            "fit_start": (True, "measured: style from 200 labels 0.70-0.75 at t <= 601 before any gradient step"),
            "train": ("full", "measured: 200 labels add 0.22 on style; lora, heads 0.19; on alignment each 0.02"),
            "lr": (1e-4, "measured: 0.71 over all t on style; 3e-4 gave 0.72, within the interval"),
            "steps": (100, "measured at 90: 90 seconds on one core"),
            "batch_size": (16, "measured together with steps"),
            "warmup_steps": (10, "a tenth of the steps"),
            "max_epochs": (10, "about what 200 labels get in 100 steps; more passes over 25 labels harm the warm LRM"),
            "lr_decay": ("cosine", "measured together with steps"),
            "save_every": (50, "ours"),
            "eval_every": (50, "ours"),
        },
        "sd15": {**_LRM_PUBLISHED, "base": (_SD15, "hub id"), "init": ("base", "paper")},
        "sd21": {**_LRM_PUBLISHED, "base": (_SD21, "hub id"), "init": ("base", "paper")},
        "sdxl": _LRM_SDXL,
        "sd3": _LRM_SD3,
        "official": {
            **_LRM_PUBLISHED,
            "base": (_SD15, "hub id"),
            "init": ("base", "paper"),
            "resample_latents": (True, "code: latents are drawn from the posterior"),
            "max_grad_norm": (0.0, "code: unclipped"),
        },
        "lab": {**_LRM_PUBLISHED, "base": (_SD15, "hub id"), "init": ("base", "paper"), "lr_decay": ("cosine", "ours")},
    },
    "train-lpo": {
        "scenes": {
            **_SAMPLING,
            "policy": ({"base": "scenes"}, "the embedded model"),
            "lrm": ("scenes", "the shipped warm LRM"),
            "beta": (31.0, "per nat: 500 at 4x64x64 is 31 at 4x16x16"),
            "threshold_min": (0.08, "measured: 0.35 to 0.5 keeps 7 % of the pairs of a 200-label LRM, this 52 %"),
            "threshold_max": (0.2, "measured, as threshold_min"),
            "t_min": (300, "measured: judge +0.003, with every t -0.006 (intervals overlap); half the time"),
            "t_max": (700, "measured, as t_min"),
            "score_timestep": ("own", "ours"),
            "lora_rank": (8, "prototype on Scenes"),
            "lr": (1e-3, "measured: 15 iterations move the style axis by 0.45 standard deviations"),
            "iterations": (30, "measured, as lr; two to three minutes on one core"),
            "prompts_per_iteration": (6, "prototype on Scenes"),
            "train_batch_size": (20, "ours: fewer, fuller optimiser steps"),
            "save_every": (10, "ours: an earlier checkpoint often keeps more of the alignment"),
            "eval_every": (10, "ours"),
        },
        "sd15": {**_LPO_SD, "policy": ({"base": _SD15}, "hub id")},
        "sd21": {**_LPO_SD, "policy": ({"base": _SD21}, "paper: SD2.1 was optimised from 2-1-base with the SD1.5 LRM")},
        "sdxl": _LPO_SDXL,
        "sd3": _LPO_SD3,
        "official": {
            **_LPO_PUBLISHED,
            "policy": ({"base": _SD15}, "hub id"),
            "lr": (6e-5, "code (the paper says 5e-5)"),
            "score_timestep": ("parent", "code: siblings are scored at their parent's timestep"),
            "max_grad_norm": (0.0, "code: its clipping never happened"),
            "beta_unit": ("mean", "code"),
        },
        "lab": {
            **_LPO_SD,
            "policy": ({"base": _SD15}, "hub id"),
            "t_min": (701, "paper: t in [750, 950] keeps almost everything; measured: 0.32 of the time"),
        },
    },
}

PRESETS: dict[str, dict[str, dict]] = {
    c: {p: {f: v for f, (v, _) in fields.items()} for p, fields in presets.items()} for c, presets in _SOURCED.items()
}
SOURCES: dict[str, dict[str, dict[str, str]]] = {
    c: {p: {f: s for f, (_, s) in fields.items()} for p, fields in presets.items()} for c, presets in _SOURCED.items()
}
