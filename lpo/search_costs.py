"""What a picture takes with and without a search, counted from its schedule. Imports no torch: the page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lpo.config import Search


@dataclass(frozen=True)
class Costs:
    """Of one picture: evaluations of the policy's network (with guidance a step takes two), and latents scored by the
    LRM (each takes the early half of its network, both guidance branches)."""

    policy: int
    lrm: int

    def in_words(self) -> str:
        """'40 network evaluations + 76 latents scored'."""
        return f"{self.policy} network evaluations" + (f" + {self.lrm} latents scored" if self.lrm else "")


def count(search: Search | None, steps: int, guidance_scale: float, noisy: Sequence[float]) -> Costs:
    """`noisy`: the timesteps of the steps that have noise; only a search over steps asks for them."""
    plain = steps * (1 if guidance_scale == 1 else 2)
    if search is None:
        return Costs(plain, 0)
    if search.method == "best-of-n":
        return Costs(plain * search.candidates, search.candidates)
    return Costs(plain, search.candidates * sum(search.covers(t) for t in noisy))
