"""How much GPU memory a training step needs at full size, and how many pairs fit on a card: counted, not measured, so
it needs neither a GPU nor the weights.

    python -m benchmarks.activations --sizes sd15 sdxl

Runs forward and backward on PyTorch's meta device (shapes without numbers), as a GPU would in bfloat16, and adds up the
bytes of what is alive at the worst moment. Not in it: CUDA's own half GiB, workspaces, and what the allocator wastes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import measure
from benchmarks.work import OFFICIAL, SD, TARGETS, carry_out, inputs, parts, resident, weigh
from lpo.backbones.lora import AdapterStack
from lpo.backbones.unet import early_features, strip
from lpo.config import LPOConfig, from_preset

CARDS = (12, 16, 24, 48, 80)  # GB
USABLE = 0.85  # of a card; the rest is CUDA's, workspaces and fragments
PRESET = {"sdxl": "sdxl", "tiny-sdxl": "sdxl"}  # else sd15
GIB = 2**30
ADAM = 16  # bytes of a trained float32 weight with its gradient and AdamW's two moments
HALF = ("linear", "conv2d")  # what CUDA's autocast computes in bfloat16, beside attention
WHOLE = ("group_norm", "layer_norm")  # and in float32


class Alive(TorchDispatchMode):
    """Bytes of all tensors alive: `now`, and at the worst moment since the start, `peak`."""

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in given:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class FusedAttention(torch.autograd.Function):
    """What every fused kernel keeps for the backward pass: its inputs, its output and one sum a query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, _gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


@contextmanager
def like_cuda(autocast: bool) -> Iterator[None]:
    """Fused attention and, with `autocast`, CUDA's choice of precision: the meta device has neither."""
    cast_weights: dict[int, Tensor] = {}  # autocast too casts a weight once

    def cast(one, dtype: torch.dtype):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            return one
        if isinstance(one, torch.nn.Parameter) and one.dtype != dtype:
            return cast_weights.setdefault(id(one), one.to(dtype))
        return one.to(dtype)

    def in_precision(function: Callable, dtype: torch.dtype) -> Callable:
        def call(*args, **kwargs):
            args, kwargs = tree_map(lambda one: cast(one, dtype), (args, kwargs)) if autocast else (args, kwargs)
            return function(*args, **kwargs)

        return call

    def attention(query: Tensor, key: Tensor, value: Tensor, *_args, **_options) -> Tensor:
        return FusedAttention.apply(query, key, value)

    with ExitStack() as patches:
        for name in HALF:
            patches.enter_context(patch.object(F, name, in_precision(getattr(F, name), torch.bfloat16)))
        for name in WHOLE:
            patches.enter_context(patch.object(F, name, in_precision(getattr(F, name), torch.float32)))
        patches.enter_context(patch.object(F, "scaled_dot_product_attention", in_precision(attention, torch.bfloat16)))
        yield


def peak(weights: Iterable[Tensor], forward: Callable[[], Tensor], autocast: bool = False) -> float:
    """GiB above the weights and their gradients at the worst moment of `forward()` and its backward pass."""
    weights = list(weights)
    for weight in weights:
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    with like_cuda(autocast), Alive([*weights, *(w.grad for w in weights if w.requires_grad)]) as alive:
        start = alive.now
        forward().sum().backward()
    return (alive.peak - start) / GIB


def copies(unet: UNet2DConditionModel, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], dict | None]:
    """`rows` rows of the network's inputs, floats in `dtype`."""

    def many(one: Tensor) -> Tensor:
        repeated = one.expand(rows, *one.shape[1:]).clone()
        return repeated.to(dtype) if one.is_floating_point() else repeated

    with torch.device("meta"):
        row, added = inputs(unet)
    return [many(one) for one in row], added and {name: many(one) for name, one in added.items()}


def lpo_step(size: str, checkpointing: bool) -> dict[str, float]:
    """`line` of an adapter's training: 2 rows a pair, the two guidance branches of the parent."""
    frozen, rank = resident(weigh(size), naive=False), {**SD, **OFFICIAL.get(size, {})}["rank"]
    unet = half(parts(size)[0].requires_grad_(False))
    AdapterStack(unet, "unet").add_trainable(rank, TARGETS, 0)
    adapter = ADAM * sum(p.numel() for p in unet.parameters() if p.requires_grad) / GIB
    if checkpointing:
        unet.enable_gradient_checkpointing()

    def more(pairs: int) -> float:
        row, added = copies(unet, 2 * pairs, torch.bfloat16)
        return peak(unet.parameters(), lambda: unet(*row, added_cond_kwargs=added).sample)

    return line(frozen + adapter, more) | {"adapter": adapter}


def lrm_step(size: str, checkpointing: bool) -> dict[str, float]:
    """`line` of an LRM of which everything trains: 4 rows a pair (two pictures, two guidance branches), and the text
    encoders read a prompt a pair and the empty one."""
    unet, towers, _vae = parts(size)
    trunk = strip(unet)
    if checkpointing:
        trunk.enable_gradient_checkpointing()  # as the LRM does: not its text encoders
    weights = [p for part in (trunk, *towers) for p in part.parameters()]

    def more(pairs: int) -> float:
        row, added = copies(trunk, 4 * pairs, torch.float32)
        ids = torch.zeros(pairs + 1, 77, dtype=torch.long, device="meta")

        def forward() -> Tensor:
            texts = [tower(ids)[0] for tower in towers]
            levels, mid = early_features(trunk, *row, added)
            return torch.stack([found.float().sum() for found in (*texts, *levels, mid)])

        return peak(weights, forward, autocast=True)

    return line(ADAM * sum(p.numel() for p in weights) / GIB, more)


def half(part: torch.nn.Module) -> torch.nn.Module:
    for parameter in part.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return part


def line(stays: float, more: Callable[[int], float]) -> dict[str, float]:
    """GiB that stay, GiB more for one pair, and for each further pair."""
    few, many = more(8), more(16)
    return {"stays": stays, "one": more(1), "pair": (many - few) / 8, "start": few - (many - few)}


def needs(found: dict[str, float], pairs: int) -> float:
    """GiB for so many pairs in one forward."""
    return found["stays"] + max(found["one"], found["start"] + pairs * found["pair"])


def fits(found: dict[str, float], card: int) -> int:
    """The most pairs in one forward on a card of so many GB; 0 if not one."""
    free = USABLE * card * 1e9 / GIB
    if needs(found, 1) > free:
        return 0
    return int((free - found["stays"] - found["start"]) / found["pair"])


def naive(size: str, found: dict[str, float], pairs: int) -> float:
    """GiB of the naive pattern for so many pairs: winner and loser each keep activations, and more weights stay."""
    return resident(weigh(size), naive=True) + found["adapter"] + 2 * pairs * found["pair"]


def measure_size(size: str) -> dict[str, dict[str, float]]:
    """`line` of every kind of training step of one size, and what one official minibatch needs in both patterns."""
    steps = {"LPO": lpo_step, "LRM, everything trained": lrm_step}
    found = {
        name + ", checkpointing" * checkpointing: step(size, checkpointing)
        for name, step in steps.items()
        for checkpointing in (False, True)
    }
    preset = from_preset(LPOConfig, PRESET.get(size, "sd15"), lrm="none", prompts="none")
    own = found["LPO" + ", checkpointing" * preset.gradient_checkpointing]
    batch = preset.train_batch_size
    needed = [needs(own, preset.micro_batch_size or batch), needs(own, batch), naive(size, own, batch)]
    return {"steps": found, "minibatch": dict(zip(("preset", "whole", "naive"), needed, strict=True))}


def report(found: dict) -> str:
    """The tables, in Markdown."""
    lines = []
    for size, one in found.items():
        rows = [
            [kind, *(f"{step[name]:.2f}" for name in ("stays", "one", "pair")), *(str(fits(step, c)) for c in CARDS)]
            for kind, step in one["steps"].items()
        ]
        titles = [
            f"{size}, bfloat16: GiB",
            "stays",
            "one pair",
            "each more",
            *(f"pairs in {card} GB" for card in CARDS),
        ]
        lines += [measure.table(titles, rows), ""]
        own, whole, theirs = (one["minibatch"][name] for name in ("preset", "whole", "naive"))
        lines += [
            f"One LPO minibatch with the preset's micro-batches {own:.1f} GiB (at once {whole:.1f}), "
            f"naive {theirs:.1f}: ratio {own / theirs:.2f} ({whole / theirs:.2f}).",
            "",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return carry_out(__doc__, measure_size, report, argv)


if __name__ == "__main__":
    sys.exit(main())
