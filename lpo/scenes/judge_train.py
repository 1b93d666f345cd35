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
from lpo.scenes.judge import HEADS, LAYOUTS, WEIGHTS, truth
from lpo.scenes.vae import to_tensor
from lpo.scenes.world import BACKGROUNDS

IGNORE = -100
SIZES = [len(classes) for classes in HEADS.values()]
COLUMN = {name: i for i, name in enumerate(HEADS)}


class JudgeNetwork(nn.Module):
    """Four convolutions and two linear layers; judge.py evaluates the same in numpy (batch norms folded in)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 24, 5, 2), (24, 48, 3, 2), (48, 64, 3, 1), (64, 80, 3, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.hidden, self.out, self.style = nn.Linear(80 * 64, 128), nn.Linear(128, sum(SIZES)), nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, 3, 64, 64) in [-1, 1] -> logits of all heads (B, sum), style (B,)."""
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        hidden = F.relu(self.hidden(F.dropout(x.flatten(1), 0.1, self.training)))
        return self.out(hidden), self.style(hidden)[:, 0]

    def folded(self) -> dict[str, np.ndarray]:
        """fp16 arrays for judge.npz."""
        arrays = {}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            arrays[f"conv{i}.weight"] = conv.weight * scale[:, None, None, None]
            arrays[f"conv{i}.bias"] = norm.bias - norm.running_mean * scale
        for name in ("hidden", "out", "style"):
            arrays[f"{name}.weight"], arrays[f"{name}.bias"] = getattr(self, name).weight, getattr(self, name).bias
        return {name: value.detach().cpu().numpy().astype(np.float16) for name, value in arrays.items()}


def labels_of(index: int, seed: int) -> list[float]:
    """Class of every head for the scene, IGNORE for a second object that is not there, and the style last."""
    scene = scene_of(seed, index)
    seen = truth(scene)
    row = [IGNORE] * len(HEADS)
    row[0], row[1] = LAYOUTS.index(seen.layout), BACKGROUNDS.index(seen.background)
    for number, thing in enumerate(seen.objects, 1):
        for kind, value in zip(("shape", "colour", "size"), thing):
            row[COLUMN[f"{kind}{number}"]] = HEADS[f"{kind}{number}"].index(value)
    return [*row, scene.style]


def bent(x: torch.Tensor, amplitude: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Warps x (B, 3, 64, 64) by a smooth random field of `amplitude` (B,) pixels (RMS)."""
    field = F.interpolate(torch.randn(len(x), 2, 9, 9, generator=random), size=64, mode="bicubic")
    field = field / field.std((1, 2, 3), keepdim=True) * amplitude[:, None, None, None] / 32
    y, col = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    grid = torch.stack([col, y], -1)[None] + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of x (B, 3, H, W) with a sigma (B,) each, in pixels."""
    reach = torch.arange(-4, 5)
    kernel = torch.exp(-(reach**2) / (2 * sigma[:, None].clamp(min=1e-3) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    b, c, h, w = x.shape
    flat = F.pad(x, (4, 4, 4, 4), mode="replicate").reshape(1, b * c, h + 8, w + 8)
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=b * c)
    return F.conv2d(flat, kernel[:, :, :, None], groups=b * c).reshape(b, c, h, w)


def spoil(x: torch.Tensor, labels: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments a batch and rewrites the labels that the damage destroys; about a fifth becomes unreadable."""
    count, labels = len(x), labels.clone()
    shapes = [COLUMN["shape1"], COLUMN["shape2"]]
    unreadable = len(HEADS["shape1"]) - 1
    lot = torch.rand(count, generator=random)
    amplitude = 0.7 * torch.rand(count, generator=random)
    ruined = lot < 0.13
    amplitude[ruined] = 3.2 + 2.5 * torch.rand(int(ruined.sum()), generator=random)
    x = bent(x, amplitude, random)
    ghost = (lot > 0.13) & (lot < 0.2)
    other = torch.randperm(count, generator=random)
    share = 0.4 + 0.2 * torch.rand(count, 1, 1, 1, generator=random)
    x = torch.where(ghost[:, None, None, None], share * x + (1 - share) * x[other], x)
    for row in shapes:
        gone = ruined | (ghost & (labels[:, row] != labels[other, row]))
        labels[:, row] = torch.where(gone & (labels[:, row] != IGNORE), unreadable, labels[:, row])
    for row in range(len(HEADS)):
        if row not in shapes:
            same = ~ghost | (labels[:, row] == labels[other, row])
            labels[:, row] = torch.where(same, labels[:, row], IGNORE)
    for number in (1, 2):
        labels[ruined, COLUMN[f"size{number}"]] = IGNORE
    x = blurred(x, 1.1 * torch.rand(count, generator=random) ** 1.5)
    x = x + torch.randn(x.shape, generator=random) * 0.06 * torch.rand(count, 1, 1, 1, generator=random)
    tint = 1 + 0.06 * torch.randn(count, 3, 1, 1, generator=random)
    return (x * tint + 0.05 * torch.randn(count, 3, 1, 1, generator=random)).clamp(-1, 1), labels


def train(out: Path, count: int, minutes: float, seed: int = 0, batch: int = 96) -> JudgeNetwork:
    """Trains on the first `count` scenes of `out` for `minutes` of wall time."""
    torch.manual_seed(seed)
    pictures = rendered(out, count, seed)
    answers = torch.tensor([labels_of(i, seed) for i in range(count)])
    network = JudgeNetwork().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.02)
    random, started, step = torch.Generator().manual_seed(seed), time.monotonic(), 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))
        index = torch.randint(count, (batch,), generator=random).sort().values
        x, labels = spoil(to_tensor(pictures[index.numpy()], "cpu"), answers[index, :-1].long(), random)
        logits, style = network(x.contiguous(memory_format=torch.channels_last))
        heads = zip(logits.split(SIZES, 1), labels.unbind(1))
        loss = sum(F.cross_entropy(p, t, ignore_index=IGNORE) for p, t in heads if (t != IGNORE).any())
        whole = labels[:, 0] != IGNORE  # two pictures over each other have no style of their own
        loss = loss + 10 * ((style - answers[index, -1]) ** 2)[whole].mean()
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
