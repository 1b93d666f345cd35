"""Settings that change speed and memory and nothing else: memory layout, compilation, TF32. Measured in
docs/performance.md. What rests outside the device is placement.py's.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from lpo.config import ConfigError

# The layers that a network repeats, and most of its work: compiled one by one, equal ones share their code.
REPEATED = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock")
# A width, a batch shape, with or without gradients, policy or reference: each needs code of its own.
VARIANTS = 128


class SpeedSettings(Protocol):
    """What `tune` reads of a config."""

    channels_last: str  # auto, on or off
    compile: bool
    tf32: bool
    offload: str  # auto, on or off: see placement.py


def tune(network: nn.Module, device: torch.device, settings: SpeedSettings) -> None:
    """Bring a network on `device` into the wished state; may be called again. Raises ConfigError without a compiler."""
    last = settings.channels_last == "on" or (settings.channels_last == "auto" and device.type in ("cpu", "cuda"))
    network.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    if settings.compile:
        require_compiler(device)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for module in network.modules():
        if type(module).__name__ in REPEATED:
            if not settings.compile:
                module._compiled_call_impl = None
            elif module._compiled_call_impl is None:
                module.compile(dynamic=False)


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile does not work on `device`: tried once, on one addition."""
    try:
        torch.compile(_plus_one, dynamic=False)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:  # whatever the compiler lacks, torch wraps it in a RuntimeError
        what = "Triton" if device.type == "cuda" else "a C++ compiler"
        raise ConfigError(
            f"compile is on, but torch.compile does not work here ({type(error).__name__}): install {what} or switch "
            "compile off."
        ) from error


def _plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1
