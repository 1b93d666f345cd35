"""Settings shared word for word by several commands, each a field of its config class. Imports no torch."""

from __future__ import annotations

from typing import Any

from lpo.options import opt

DTYPES = ("auto", "float32", "bfloat16", "float16")


def steps() -> Any:
    return opt(20, "denoising steps of the sampler", min=1, max=1000, main=True)


def guidance() -> Any:
    return opt(5.0, "classifier-free guidance scale of the policy; 1 is off", min=0.0, max=50.0, main=True)


def eta(default: float) -> Any:
    return opt(default, "noise of each step: 0 is deterministic, 1 as much as DDPM (SD3: all anew)", min=0.0, max=1.0)


def side() -> Any:
    return opt(None, "picture side in pixels; empty means the model's own size", min=8, max=4096)


def device() -> Any:
    return opt("auto", "auto, cpu, cuda, cuda:N or mps; auto takes an NVIDIA GPU if there is one")


def dtype() -> Any:
    return opt(
        "auto",
        "number format of the frozen weights; trained weights stay float32. auto: bfloat16 on a GPU that has it, else "
        "float32",
        choices=DTYPES,
    )


def channels_last() -> Any:
    return opt(
        "auto",
        "memory layout of convolutions, for speed only; auto is on for CPUs and NVIDIA GPUs",
        choices=("auto", "on", "off"),
    )


def compile_layers() -> Any:
    return opt(False, "compile the repeated layers: minutes at the start, then faster steps; for long runs on a GPU")


def tf32() -> Any:
    return opt(True, "NVIDIA GPUs: multiply float32 matrices at TF32 precision, which is still above bfloat16's")


def offload() -> Any:
    return opt(
        "auto",
        "text encoders and VAE rest in main memory and visit the device only to work: less GPU memory, same numbers; "
        "auto is on for NVIDIA GPUs",
        choices=("auto", "on", "off"),
    )


def checkpointing() -> Any:
    return opt(False, "less memory for about a third more compute in training")


def micro_batch() -> Any:
    return opt(
        None,
        "pairs in one forward and backward; gradients are added up, so it changes memory and speed only; empty takes "
        "the whole batch at once",
        min=1,
        max=65536,
    )


def seed() -> Any:
    return opt(0, "every random draw of the run is keyed by this number", min=0, max=2**63 - 1)


def allow_mismatch() -> Any:
    return opt(False, "use an LRM or adapter of another latent space than the base's (such an LRM scores noise)")
