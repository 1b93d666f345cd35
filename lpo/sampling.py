"""Pictures from a policy. A seed fixes the noise whatever the policy, batch size or device, so two policies can be
compared picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lpo.backbones import Backbone, Conditioning, transitions
from lpo.rng import normal


@dataclass(frozen=True)
class Step:
    """One step of a trajectory of B rows: x_t, the predicted clean x0, the Gaussian of x_{t-1} and the draw taken."""

    index: int
    t: int
    prev_t: int  # -1 at the end
    x_t: Tensor
    x0: Tensor
    mean: Tensor
    std: Tensor  # (B,)
    next: Tensor


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """PIL pictures of (B, 3, H, W) in [0, 1]."""
    array = (pictures.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def start_noise(backbone: Backbone, rows: Sequence[tuple[int, str]], shape: tuple[int, int, int]) -> Tensor:
    """x_T of rows (seed, prompt): (B, C, H, W) on the backbone's device."""
    return torch.stack([normal(shape, seed, "sample", prompt, "start") for seed, prompt in rows]).to(backbone.device)


def step_noise(backbone: Backbone, rows: Sequence[tuple[int, str]], shape: tuple[int, int, int], step: int) -> Tensor:
    """The noise of one step for rows (seed, prompt): (B, C, H, W) on the backbone's device."""
    return torch.stack([normal(shape, seed, "sample", prompt, step) for seed, prompt in rows]).to(backbone.device)


@torch.no_grad()
def trajectory(
    backbone: Backbone,
    conditioning: Conditioning,
    x_t: Tensor,
    steps: int,
    guidance_scale: float,
    eta: float,
    noise: Callable[[int], Tensor],
) -> Iterator[Step]:
    """Denoise x_t (B, C, H, W) step by step; `noise(step)` gives (B, C, H, W) and is asked only where eta > 0."""
    for index, (t, prev_t) in enumerate(transitions(backbone.timesteps(steps))):
        prediction = backbone.predict(x_t, t, conditioning, guidance_scale)
        x0, mean, std = backbone.transition(x_t, prediction, t, prev_t, eta)
        following = mean + std.view(-1, 1, 1, 1) * noise(index) if eta > 0 else mean
        yield Step(index, t, prev_t, x_t, x0, mean, std, following)
        x_t = following


def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: float = 5.0,
    eta: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> Iterator[tuple[int, int, Image.Image]]:
    """Every prompt with every seed: yields (prompt index, seed, picture) as batches finish, prompts first."""
    shape = backbone.latent_shape(height, width)
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        rows = [(seed, prompts[index]) for index, seed in batch]
        latents = sample_latents(backbone, rows, shape, steps, guidance_scale, eta, negative_prompt)
        for (index, seed), picture in zip(batch, to_pil(backbone.decode(latents)), strict=True):
            yield index, seed, picture


def sample_latents(
    backbone: Backbone,
    rows: Sequence[tuple[int, str]],
    shape: tuple[int, int, int],
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    negative_prompt: str = "",
) -> Tensor:
    """Final latents (B, C, H, W) of rows (seed, prompt)."""
    conditioning = encode_rows(backbone, [prompt for _, prompt in rows], negative_prompt)

    def noise(step: int) -> Tensor:
        return step_noise(backbone, rows, shape, step)

    x_t = start_noise(backbone, rows, shape)
    for step in trajectory(backbone, conditioning, x_t, steps, guidance_scale, eta, noise):
        x_t = step.next
    return x_t


def encode_rows(backbone: Backbone, prompts: Sequence[str], negative_prompt: str = "") -> Conditioning:
    """Conditioning of every row, each distinct prompt encoded once."""
    unique = list(dict.fromkeys(prompts))
    return backbone.encode_prompts(unique, negative_prompt).rows([unique.index(p) for p in prompts])
