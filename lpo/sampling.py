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

Row = tuple[int, str] | tuple[int, str, int]  # seed, prompt and, in a search, which candidate of the seed
Choose = Callable[[int, float, float, Tensor, Tensor, Tensor], Tensor]  # see `trajectory`


@dataclass(frozen=True)
class Step:
    """One step of a trajectory of B rows: x_t, the predicted clean x0, the Gaussian of x_{t-1} and the draw taken."""

    index: int
    t: float
    prev_t: float  # -1 at the end
    x_t: Tensor
    x0: Tensor
    mean: Tensor
    std: Tensor  # (B,)
    next: Tensor


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """PIL pictures of (B, 3, H, W) in [0, 1]."""
    array = (pictures.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def start_noise(backbone: Backbone, rows: Sequence[Row], shape: tuple[int, int, int]) -> Tensor:
    """x_T of the rows: (B, C, H, W) on the backbone's device."""
    return torch.stack([_drawn(shape, "start", *row) for row in rows]).to(backbone.device)


def step_noise(backbone: Backbone, rows: Sequence[Row], shape: tuple[int, int, int], step: int) -> Tensor:
    """The noise of one step for the rows: (B, C, H, W) on the backbone's device."""
    return torch.stack([_drawn(shape, step, *row) for row in rows]).to(backbone.device)


def sibling_noise(
    backbone: Backbone, rows: Sequence[Row], shape: tuple[int, int, int], step: int, siblings: int
) -> Tensor:
    """(K - 1, B, C, H, W): the noise of siblings 1 to K - 1 of one step; sibling 0 has `step_noise`."""
    drawn = [
        torch.stack([normal(shape, seed, "sibling", prompt, step, k) for seed, prompt, *_ in rows])
        for k in range(1, siblings)
    ]
    return torch.stack(drawn).to(backbone.device)


def _drawn(shape: tuple[int, int, int], place: int | str, seed: int, prompt: str, candidate: int = 0) -> Tensor:
    """Candidate 0 of a seed is the plain sample of that seed."""
    return normal(shape, seed, "sample", prompt, place, *([candidate] if candidate else []))


@torch.no_grad()
def trajectory(
    backbone: Backbone,
    conditioning: Conditioning,
    x_t: Tensor,
    steps: int,
    guidance_scale: float,
    eta: float,
    noise: Callable[[int], Tensor],
    choose: Choose | None = None,
    batch_size: int | None = None,
) -> Iterator[Step]:
    """Denoise x_t (B, C, H, W) step by step; `noise(step)` gives (B, C, H, W) and is asked only where eta > 0.

    `choose(step, t, prev_t, mean, std, x_{t-1})` may put another draw in the place of x_{t-1}, (B, C, H, W). At most
    `batch_size` rows go through the network together; all without it.
    """
    for index, (t, prev_t) in enumerate(transitions(backbone.timesteps(steps, tuple(x_t.shape[1:])))):
        prediction = _predict(backbone, x_t, t, conditioning, guidance_scale, batch_size)
        x0, mean, std = backbone.transition(x_t, prediction, t, prev_t, eta)
        following = mean + std.view(-1, 1, 1, 1) * noise(index) if eta > 0 else mean
        if choose is not None:
            following = choose(index, t, prev_t, mean, std, following)
        yield Step(index, t, prev_t, x_t, x0, mean, std, following)
        x_t = following


def _predict(
    backbone: Backbone,
    x_t: Tensor,
    t: float,
    conditioning: Conditioning,
    guidance_scale: float,
    batch_size: int | None,
) -> Tensor:
    """The network's prediction of all rows, at most `batch_size` of them together."""
    if batch_size is None or len(x_t) <= batch_size:
        return backbone.predict(x_t, t, conditioning, guidance_scale)
    starts = range(0, len(x_t), batch_size)
    parts = [range(start, min(start + batch_size, len(x_t))) for start in starts]
    return torch.cat(
        [backbone.predict(x_t[p.start : p.stop], t, conditioning.rows(list(p)), guidance_scale) for p in parts]
    )


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
    rows: Sequence[Row],
    shape: tuple[int, int, int],
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    negative_prompt: str = "",
    choose: Choose | None = None,
) -> Tensor:
    """Final latents (B, C, H, W) of the rows; `choose` as in `trajectory`."""
    conditioning = backbone.encode_prompts([row[1] for row in rows], negative_prompt)

    def noise(step: int) -> Tensor:
        return step_noise(backbone, rows, shape, step)

    x_t = start_noise(backbone, rows, shape)
    for step in trajectory(backbone, conditioning, x_t, steps, guidance_scale, eta, noise, choose):
        x_t = step.next
    return x_t
