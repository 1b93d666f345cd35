"""An LRM put to use without training anything: it chooses among candidates while a policy samples.

    python -m lpo sample --search best-of-n --search_lrm DIR --candidates 4 --prompts "a red ball" --run-dir runs/a
    python -m lpo sample --search steps --search_lrm DIR --candidates 4 --eta 1 --prompts "a red ball" --run-dir runs/b

*best-of-n* samples N whole pictures of a seed and keeps the one whose finished latents the LRM scores highest: N times
the network evaluations of sampling. *steps* draws K siblings x_{t-1} at every noisy step with t_min <= t <= t_max and
goes on from the best (LPO's roll-out goes on from a random one): no more network evaluations than sampling, but K
latents to score at each of those steps. Candidate 0 is always the plain draw of the seed, so one candidate is plain
sampling, and two policies that share seeds can be compared. Works on any backbone; nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lpo.backbones import Backbone, transitions
from lpo.backbones.latent_space import require_same
from lpo.config import Policy, Search
from lpo.lrm_files import latent_space
from lpo.reward_model import LatentRewardModel
from lpo.sampling import Row, sample_latents, sibling_noise, to_pil
from lpo.search_costs import Costs, count

# Finished latents are scored at the timestep at which curves and roll-outs end; a run's held-out reward, which is
# compared with those of other runs, at 1 (lpo/evaluation.py).
FINISHED_T = 0


@dataclass(frozen=True)
class Found:
    """Final latents (B, C, H, W) and, of best-of-n, every candidate's score (N, B) and which was chosen (B,)."""

    latents: Tensor
    scores: Tensor | None
    chosen: Tensor | None


@dataclass(frozen=True)
class Siblings:
    """The candidates x_{t-1} of one searched step (K, B, C, H, W), their scores (K, B) and the chosen ones (B,)."""

    latents: Tensor
    scores: Tensor
    chosen: Tensor


def load_lrm(
    policy: Policy, backbone: Backbone, device: str = "auto", dtype: str = "float32", allow_mismatch: bool = False
) -> LatentRewardModel:
    """The LRM of the policy's search. ConfigError if it cannot be loaded or judges another latent space."""
    lrm = LatentRewardModel.from_pretrained(policy.search.lrm, policy.base, device, dtype)
    require_fit(lrm, policy, backbone, allow_mismatch)
    return lrm


def require_fit(lrm: LatentRewardModel, policy: Policy, backbone: Backbone, allow_mismatch: bool = False) -> None:
    """ConfigError with one sentence if the LRM judges another latent space than the policy's."""
    require_same(latent_space(lrm, policy.base), backbone.fingerprint(), lrm.name, policy.base, allow_mismatch)


class StepSearch:
    """The `choose` of a trajectory: the best of K siblings by the LRM, each scored at its own timestep.

    `last` is what the last step was chosen from, None if it was not searched.
    """

    def __init__(
        self, backbone: Backbone, lrm: LatentRewardModel, search: Search, rows: Sequence[Row], batch_size: int = 64
    ):
        self.backbone, self.lrm, self.search, self.rows, self.batch_size = backbone, lrm, search, rows, batch_size
        self.last: Siblings | None = None

    @torch.no_grad()
    def __call__(self, step: int, t: float, prev_t: float, mean: Tensor, std: Tensor, plain: Tensor) -> Tensor:
        self.last = None
        if not self.search.covers(t) or not bool((std > 0).all()):
            return plain
        count, prompts = self.search.candidates, [row[1] for row in self.rows]
        noise = sibling_noise(self.backbone, self.rows, tuple(mean.shape[1:]), step, count)
        siblings = torch.cat([plain[None], mean + std.view(1, -1, 1, 1, 1) * noise])
        scores = self.lrm.score(siblings.flatten(0, 1), max(prev_t, 0), prompts * count, self.batch_size)
        scores = scores.view(count, -1).to(mean.device)
        chosen = scores.argmax(dim=0)  # the first of equals
        self.last = Siblings(siblings, scores, chosen)
        return siblings[chosen, torch.arange(len(prompts), device=chosen.device)]


def candidate_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows of `count` candidates of each of the B rows (seed, prompt): candidate 0 of all, then candidate 1, ..."""
    return [(row[0], row[1], k) for k in range(count) for row in rows]


@torch.no_grad()
def best(
    lrm: LatentRewardModel, finished: Tensor, prompts: Sequence[str], batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Scores (N, B) of finished latents (N * B, C, H, W), candidates of B prompts, and the best candidates (B,)."""
    count = len(finished) // len(prompts)
    scores = lrm.score(finished, FINISHED_T, list(prompts) * count, batch_size).view(count, -1).to(finished.device)
    return scores, scores.argmax(dim=0)


def search_latents(
    backbone: Backbone,
    lrm: LatentRewardModel,
    search: Search,
    rows: Sequence[tuple[int, str]],
    shape: tuple[int, int, int],
    steps: int,
    guidance_scale: float,
    eta: float,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> Found:
    """Sample the B rows (seed, prompt) with the LRM choosing; at most `batch_size` trajectories at a time."""
    if search.method == "steps":
        parts = []
        for part in _chunks(rows, batch_size):
            choose = StepSearch(backbone, lrm, search, part, batch_size)
            parts.append(sample_latents(backbone, part, shape, steps, guidance_scale, eta, negative_prompt, choose))
        return Found(torch.cat(parts), None, None)
    everyone = candidate_rows(rows, search.candidates)
    finished = torch.cat(
        [
            sample_latents(backbone, part, shape, steps, guidance_scale, eta, negative_prompt)
            for part in _chunks(everyone, batch_size)
        ]
    )
    scores, chosen = best(lrm, finished, [row[1] for row in rows], batch_size)
    taken = finished.view(search.candidates, len(rows), *shape)[chosen, torch.arange(len(rows), device=chosen.device)]
    return Found(taken, scores, chosen)


def sample_searched(
    backbone: Backbone,
    lrm: LatentRewardModel,
    search: Search,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: float = 5.0,
    eta: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> Iterator[tuple[int, int, Image.Image, list[float]]]:
    """As `lpo.sampling.sample`, with the LRM choosing: yields (prompt index, seed, picture, the candidates' scores);
    there are no such scores for a search over steps."""
    shape = backbone.latent_shape(height, width)
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    for batch in _chunks(jobs, batch_size):
        rows = [(seed, prompts[index]) for index, seed in batch]
        found = search_latents(
            backbone, lrm, search, rows, shape, steps, guidance_scale, eta, negative_prompt, batch_size
        )
        pictures = to_pil(backbone.decode(found.latents))
        scores = [[]] * len(rows) if found.scores is None else found.scores.T.tolist()
        for (index, seed), picture, own in zip(batch, pictures, scores, strict=True):
            yield index, seed, picture, own


def costs(
    backbone: Backbone,
    search: Search | None,
    steps: int,
    guidance_scale: float,
    eta: float,
    shape: tuple[int, int, int] | None = None,
) -> Costs:
    """What one picture takes on the live schedule."""
    pairs = list(transitions(backbone.timesteps(steps, shape)))
    noisy = [t for t, prev_t in pairs if bool((backbone.step_std(t, prev_t, eta) > 0).all())]
    return count(search, steps, guidance_scale, noisy)


def _chunks(rows: Sequence, size: int) -> Iterator[list]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
