"""Trains the judge's network on spoilt renderings: python -m lpo.scenes.judge_train --out DIR [--minutes 5]

Pictures of --out (the training scenes of `python -m lpo.scenes.train`) are bent, blurred, noised and recoloured a
little, which keeps their labels, or spoilt: bent so far that no shape is left, or two pictures laid over each other.
Spoilt objects are labelled unreadable, so that the network can say so of a generator's blobs. Writes weights/judge.npz.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lpo.scenes.dataset import rendered, scene_of
from lpo.scenes.judge import CENTRES, CROP, LAYOUTS, OBJECT_HEADS, SCENE_HEADS, STRIDES, WEIGHTS, truth
from lpo.scenes.vae import to_tensor
from lpo.scenes.world import BACKGROUNDS, Scene

IGNORE = -100
SHAPE = (2, 5)  # columns of labels: layout, background, then (shape, colour, size) of the first and second object


class Trunk(nn.Module):
    """Convolutions, a hidden layer of 128 and one linear layer of answers; judge.py has the same in numpy."""

    def __init__(self, name: str, side: int, widths: tuple[int, ...], answers: int) -> None:
        super().__init__()
        channels = (3, *widths)
        kernels = (5, 3, 3, 3)
        layers = zip(channels[:-1], widths, kernels, STRIDES[name], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths)
        for stride in STRIDES[name]:
            side = -(-side // stride)
        self.hidden, self.out = nn.Linear(widths[-1] * side**2, 128), nn.Linear(128, answers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, 3, H, W) in [-1, 1] -> hidden (B, 128)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return F.relu(self.hidden(F.dropout(x.flatten(1), 0.1, self.training)))


class JudgeNetwork(nn.Module):
    """The scene's reader, the objects' reader, and the style axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Trunk("scene", 64, (16, 32, 48, 64), sum(map(len, SCENE_HEADS.values())))
        self.object = Trunk("object", CROP, (24, 32, 48, 64), sum(map(len, OBJECT_HEADS.values())))
        self.style = nn.Linear(128, 1)

    def folded(self) -> dict[str, np.ndarray]:
        """fp16 arrays for judge.npz, batch norms folded into the convolutions."""
        arrays = {"style.weight": self.style.weight, "style.bias": self.style.bias}
        for name in ("scene", "object"):
            trunk = getattr(self, name)
            for i, (conv, norm) in enumerate(zip(trunk.convs, trunk.norms, strict=True)):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                arrays[f"{name}.convs.{i}.weight"] = conv.weight * scale[:, None, None, None]
                arrays[f"{name}.convs.{i}.bias"] = norm.bias - norm.running_mean * scale
            for part in ("hidden", "out"):
                arrays[f"{name}.{part}.weight"] = getattr(trunk, part).weight
                arrays[f"{name}.{part}.bias"] = getattr(trunk, part).bias
        return {name: value.detach().cpu().numpy().astype(np.float16) for name, value in arrays.items()}


def labels_of(scene: Scene) -> list[float]:
    """Classes of layout, background, and (shape, colour, size) of both places; IGNORE for nothing; style last."""
    seen = truth(scene)
    row = [LAYOUTS.index(seen.layout), BACKGROUNDS.index(seen.background)]
    for thing in seen.objects:
        row += [classes.index(value) for classes, value in zip(OBJECT_HEADS.values(), thing, strict=True)]
    return [*row, *[IGNORE] * (8 - len(row)), scene.style]


def crops(x: torch.Tensor, layout: torch.Tensor, second: bool) -> torch.Tensor:
    """(B, 3, CROP, CROP) around the first or second place of each picture's layout."""
    wide = F.pad(x, (CROP // 2,) * 4, mode="replicate")
    parts = []
    for picture, number in zip(wide, layout.tolist(), strict=True):
        cx, cy = CENTRES[LAYOUTS[number]][int(second)]
        parts.append(picture[:, cy : cy + CROP, cx : cx + CROP])
    return torch.stack(parts)


def bent(x: torch.Tensor, amplitude: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Warps x (B, 3, 64, 64) by a smooth random field of `amplitude` (B,) pixels (RMS)."""
    field = F.interpolate(torch.randn(len(x), 2, 9, 9, generator=random), size=64, mode="bicubic")
    field = field / field.std((1, 2, 3), keepdim=True) * amplitude[:, None, None, None] / 32
    y, col = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    grid = torch.stack([col, y], -1)[None] + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of x (B, 3, H, W) with a sigma (B,) each, in pixels."""
    reach = torch.arange(-3, 4)
    kernel = torch.exp(-(reach**2) / (2 * sigma[:, None].clamp(min=1e-3) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    b, c, h, w = x.shape
    flat = F.pad(x, (3, 3, 3, 3), mode="replicate").reshape(1, b * c, h + 6, w + 6)
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=b * c)
    return F.conv2d(flat, kernel[:, :, :, None], groups=b * c).reshape(b, c, h, w)


def spoil(x: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments a batch and rewrites the labels (B, 8) that the damage destroys; about a fifth becomes unreadable."""
    count, labels = len(x), labels.clone()
    unreadable = len(OBJECT_HEADS["shape"]) - 1
    lot = torch.rand(count, generator=random)
    amplitude = 0.7 * torch.rand(count, generator=random)
    ruined = lot < 0.12
    amplitude[ruined] = 3.2 + 2.5 * torch.rand(int(ruined.sum()), generator=random)
    x = bent(x, amplitude, random)
    other = torch.randperm(count, generator=random)
    ghost = (lot > 0.12) & (lot < 0.2) & (labels[:, 0] == labels[other, 0])  # two pictures of one layout overlaid
    share = 0.4 + 0.2 * torch.rand(count, 1, 1, 1, generator=random)
    x = torch.where(ghost[:, None, None, None], share * x + (1 - share) * x[other], x)
    for column in range(1, 8):
        lost = ghost & (labels[:, column] != labels[other, column])
        if column in SHAPE:
            lost = (lost | ruined) & (labels[:, column] != IGNORE)
            labels[:, column] = torch.where(lost, unreadable, labels[:, column])
        else:
            labels[:, column] = torch.where(lost, IGNORE, labels[:, column])
    x = blurred(x, 1.1 * torch.rand(count, generator=random) ** 1.5)
    x = x + torch.randn(x.shape, generator=random) * 0.06 * torch.rand(count, 1, 1, 1, generator=random)
    return x.clamp(-1, 1), labels


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, heads: dict) -> torch.Tensor:
    """Sum over heads of the mean cross-entropy over the labels that are known."""
    losses = []
    for part, target in zip(logits.split([len(c) for c in heads.values()], 1), labels.unbind(1), strict=True):
        known = (target != IGNORE).sum().clamp(min=1)
        losses.append(F.cross_entropy(part, target, ignore_index=IGNORE, reduction="sum") / known)
    return torch.stack(losses).sum()


def train(out: Path, count: int, minutes: float, seed: int = 0, batch: int = 80) -> JudgeNetwork:
    """Trains for `minutes` on `count` training scenes and a sixth as many with held-out colour-shape pairs."""
    torch.manual_seed(seed)
    extra = count // 6
    common, rare = rendered(out, count, seed), rendered(out, extra, seed + 1, held_out_pairs=True)
    answers = [labels_of(scene_of(seed, i)) for i in range(count)]
    answers = torch.tensor(answers + [labels_of(scene_of(seed + 1, i, True)) for i in range(extra)])
    network = JudgeNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.02, fused=True)
    random, started, step = torch.Generator().manual_seed(seed), time.monotonic(), 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = (
            2e-3 * min(1, (step + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))
        )
        index = torch.randint(count + extra, (batch,), generator=random).sort().values
        border = int((index < count).sum())
        pictures = np.concatenate([common[index[:border].numpy()], rare[(index[border:] - count).numpy()]])
        style = answers[index, -1]
        x, labels = spoil(to_tensor(pictures, "cpu"), answers[index, :-1].long(), random)
        scene = network.scene(x.contiguous(memory_format=torch.channels_last))
        two = labels[:, 0] >= 2
        things = torch.cat([crops(x, labels[:, 0], False), crops(x[two], labels[two, 0], True)])
        thing = network.object(things.contiguous(memory_format=torch.channels_last))
        loss = answer_loss(network.scene.out(scene), labels[:, :2], SCENE_HEADS)
        loss = loss + answer_loss(
            network.object.out(thing), torch.cat([labels[:, 2:5], labels[two, 5:8]]), OBJECT_HEADS
        )
        whole = labels[:, 1] != IGNORE
        loss = loss + 10 * ((network.style(scene)[:, 0] - style) ** 2)[whole].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} at {done:.0%}", flush=True)
    print(f"{step * batch} pictures in {minutes} minutes, last loss {loss.item():.3f}")
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=48_000)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    network = train(args.out, args.scenes, args.minutes)
    np.savez(WEIGHTS, **network.folded())


if __name__ == "__main__":
    main()
