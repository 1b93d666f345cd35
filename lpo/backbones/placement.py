"""Networks that a training needs only now and then may rest in main memory and visit the device while they work: text
encoders and VAE. Their weights are frozen, so nothing is copied back, and what they compute stays the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def place(parts: Iterable[nn.Module], device: torch.device, offload: str) -> None:
    """Where `parts` are between visits: in main memory if `offload` is on, or auto and the device is an NVIDIA GPU
    (others share the main memory); else on `device`. May be called again."""
    if offload == "on" or (offload == "auto" and device.type == "cuda"):
        rest(parts)
    else:
        for part in parts:
            part.to(device)


def rest(parts: Iterable[nn.Module]) -> None:
    for part in parts:
        part.to("cpu")


@contextlib.contextmanager
def at_work(device: torch.device, *parts: nn.Module) -> Iterator[None]:
    """Inside, `parts` compute on `device`, with copies of what rests elsewhere; afterwards they are as they were."""
    away = [
        (module, name, tensor)
        for part in parts
        for module in part.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.device.type != device.type
    ]
    copies = {tensor: tensor.detach().to(device) for _, _, tensor in away}  # one for weights that two modules share
    try:
        for module, name, tensor in away:
            copy = copies[tensor]
            setattr(module, name, nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)
        del copies
        yield
    finally:
        for module, name, tensor in away:
            setattr(module, name, tensor)


def tensors(*parts: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer."""
    for part in parts:
        yield from part.parameters()
        yield from part.buffers()
