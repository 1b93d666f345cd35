"""A stack of adapters as one LoRA: ranks put side by side, strengths and alphas folded in; and its names in the files
that other tools read. One LoRA of the same layers gives the same pictures as the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpo.backbones.lora import AdapterStack, lora_layers
from lpo.config import Adapter, ConfigError
from lpo.export_base import Base
from lpo.export_names import kohya_name


@dataclass(frozen=True)
class Layer:
    """The update up @ down of one layer, fp32: down (rank, in, ...), up (out, rank, ...), nothing left to scale."""

    down: Tensor
    up: Tensor


@torch.no_grad()
def merge(base: Base, adapters: Sequence[Adapter]) -> dict[str, Layer]:
    """{path of a layer, beginning with the name of its network: its merged update} of a stack that fits `base`."""
    stack = AdapterStack(base.net, base.prefix, base.text_encoders)
    stack.set_frozen(adapters)
    layers = {}
    for prefix, part in stack.parts.items():
        for path, layer in lora_layers(part):
            names = [name for name, _ in stack.frozen if name in layer.lora_A]
            downs = [layer.lora_A[name].weight.float() for name in names]
            ups = [layer.lora_B[name].weight.float() * layer.scaling[name] for name in names]
            layers[f"{prefix}.{path}"] = Layer(torch.cat(downs), torch.cat(ups, dim=1))
    return layers


def diffusers_tensors(layers: dict[str, Layer], dtype: torch.dtype) -> dict[str, Tensor]:
    """The layout of diffusers' `load_lora_weights`; without alphas, so that each layer counts as it is."""
    tensors = {}
    for path, layer in layers.items():
        prefix, _, rest = path.partition(".")
        if prefix.startswith("text_encoder") and not rest.startswith(("text_model.", "text_projection")):
            rest = f"text_model.{rest}"  # transformers 5 dropped this level, the files keep it
        tensors[f"{prefix}.{rest}.lora_A.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{prefix}.{rest}.lora_B.weight"] = layer.up.to(dtype).contiguous()
    return tensors


def kohya_tensors(layers: dict[str, Layer], base: Base, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layout that ComfyUI and A1111 read. Every layer has the same alpha, the highest rank: for text encoders
    diffusers takes only one, whatever the file says. Raises ConfigError for SD3, which has no such layout."""
    if base.kind == "sd3":
        raise ConfigError(
            "There is no kohya layout of SD3 LoRA that tools agree on: export as diffusers, which ComfyUI reads too."
        )
    tensors, alpha = {}, max(len(layer.down) for layer in layers.values())
    for path, layer in layers.items():
        name = kohya_name(path, base.kind == "sdxl", base.net.config.layers_per_block)
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = (layer.up * (len(layer.down) / alpha)).to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors
