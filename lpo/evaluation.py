"""What training does to prompts it never sees: the LRM's reward of finished pictures, their diversity, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lpo.backbones import Backbone
from lpo.config import LPOConfig
from lpo.ranks import Ranks
from lpo.reward_model import LatentRewardModel
from lpo.sampling import start_noise, step_noise, to_pil, trajectory

# Finished latents are scored at the smallest timestep LRMs are trained on, in every run alike. Not lpo/search.py's 0: a
# search compares candidates with each other and must agree with the end of a curve and the last step of a roll-out.
FINISHED_T = 1


def diversity(latents: Tensor) -> Tensor:
    """Mean RMS distance between the latents of different seeds, per prompt: (P, S, C, H, W) -> (P,). 0 for one seed."""
    prompts, seeds = latents.shape[:2]
    if seeds == 1:
        return torch.zeros(prompts)
    flat = latents.flatten(2)
    distances = (flat[:, :, None] - flat[:, None]).pow(2).mean(-1).sqrt()  # (P, S, S)
    return distances.sum(dim=(1, 2)) / (seeds * (seeds - 1))


class HeldOut:
    """The held-out half of LPO's metrics. The noise is fixed, so changes over training are the policy's doing alone.

    `measure` is a generator (it takes a while; None marks where it may be stopped), `result` what it found.
    """

    def __init__(
        self, policy: Backbone, lrm: LatentRewardModel, prompts: Sequence[str], config: LPOConfig, ranks: Ranks
    ):
        self.policy, self.lrm, self.config, self.ranks = policy, lrm, config, ranks
        self.prompts = list(prompts[: config.eval_count])
        self.reference: dict = {}
        self._found: dict = {}

    def measure_reference(self) -> Iterator[None]:
        """The same numbers for the policy before training."""
        yield from self.measure(None)
        self.reference = {f"{name}_reference": value for name, value in self._found.items()}

    def result(self) -> dict:
        """heldout_reward, diversity, and both of the reference; empty without held-out prompts."""
        return {**self._found, **self.reference} if self._found else {}

    def measure(self, folder: Path | None) -> Iterator[None]:
        """Sample, score, and save the first prompts' pictures into `folder`."""
        config, batches = self.config, []
        rows = [(seed, prompt) for prompt in self.prompts for seed in range(config.eval_seeds)]
        if not rows:
            return
        own = [rows[row] for row in self.ranks.share(len(rows)).rows]
        shape = self.policy.latent_shape(config.height, config.width)
        together = min(16, config.score_batch_size)
        for start in range(0, len(own), together):
            part = own[start : start + together]
            conditioning = self.policy.encode_prompts([prompt for _, prompt in part])

            def noise(step: int, part: list = part) -> Tensor:
                return step_noise(self.policy, part, shape, step)

            x_t = start_noise(self.policy, part, shape)
            for step in trajectory(self.policy, conditioning, x_t, config.steps, config.guidance_scale, 0.0, noise):
                x_t = step.next
                yield None
            batches.append(x_t)
        latents = torch.cat(batches)
        with torch.no_grad():
            scores = self.lrm.score(latents, FINISHED_T, [prompt for _, prompt in own], config.score_batch_size)
        scores, latents = (self.ranks.gather(part, len(rows)) for part in (scores, latents))
        spread = diversity(latents.view(len(self.prompts), config.eval_seeds, *shape))
        self._found = {"heldout_reward": float(scores.mean()), "diversity": float(spread.mean())}
        if folder is not None and config.sample_count and self.ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            shown = rows[: config.sample_count * config.eval_seeds]
            for (seed, prompt), picture in zip(shown, to_pil(self.policy.decode(latents[: len(shown)])), strict=True):
                picture.save(folder / f"prompt{self.prompts.index(prompt)}_seed{seed}.png")
