"""What the tests of model files share: the tiny base, LoRA files as other tools write them, and merging by hand."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lpo.rng import normal

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")


def kohya_of(prefix: str, path: str, layer: nn.Module, size: float = 0.15) -> dict[str, Tensor]:
    """A random LoRA of one layer under kohya's names; rank 2 to 4 by the path's length, alpha 1.5."""
    rank, weight = 2 + len(path) % 3, layer.weight
    name = prefix + path.replace(".", "_")
    down = normal((rank, *weight.shape[1:]), "down", path) * size
    up = normal((weight.shape[0], rank, *[1] * (weight.ndim - 2)), "up", path) * size
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}


@torch.no_grad()
def merge_by_hand(net: nn.Module, prefix: str, weights: dict[str, Tensor], strength: float) -> None:
    """W += strength x alpha / rank x up down, as the definition of LoRA says."""
    for path, layer in net.named_modules():
        name = prefix + path.replace(".", "_")
        if f"{name}.alpha" in weights:
            down, up = weights[f"{name}.lora_down.weight"], weights[f"{name}.lora_up.weight"]
            factor = strength * float(weights[f"{name}.alpha"]) / len(down)
            layer.weight += factor * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
