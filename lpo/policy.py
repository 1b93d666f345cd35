"""What samples: a base model, adapters on it, and perhaps an LRM that chooses while it samples. Re-exported by
lpo/config.py. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpo.options import ConfigError, opt, ordered, validate

SEARCHES = ("best-of-n", "steps")


@dataclass(frozen=True)
class Adapter:
    """One frozen LoRA of a policy."""

    path: str = opt("", "folder or .safetensors file of a LoRA in diffusers layout")
    strength: float = opt(1.0, "factor on the LoRA's update; 1 is as trained", min=-4.0, max=4.0)

    def __post_init__(self) -> None:
        validate(self)
        if not self.path:
            raise ConfigError("An adapter needs a path: the folder or .safetensors file of a LoRA.")


@dataclass(frozen=True)
class Search:
    """An LRM that chooses among candidates while a policy samples; nothing is trained. See lpo/search.py."""

    method: str = opt(
        "best-of-n",
        "best-of-n chooses among whole pictures, steps among the siblings x_{t-1} of every noisy step",
        choices=SEARCHES,
    )
    lrm: str = opt("scenes", "LRM folder that chooses; 'scenes' is the shipped one")
    candidates: int = opt(4, "how many candidates the LRM chooses from; 1 is sampling without it", min=1, max=64)
    t_min: int = opt(0, "steps: smallest timestep at which the LRM chooses", min=0, max=1000)
    t_max: int = opt(1000, "steps: largest timestep at which the LRM chooses", min=0, max=1000)

    def __post_init__(self) -> None:
        validate(self)
        ordered(self, "t_min", "t_max")
        if not self.lrm:
            raise ConfigError("A search needs an LRM: name its folder, or 'scenes' for the shipped one.")

    def covers(self, t: float) -> bool:
        """Whether the siblings of a step at timestep `t` are searched."""
        return self.method == "steps" and self.candidates > 1 and self.t_min <= t <= self.t_max


@dataclass(frozen=True)
class Policy:
    """A base model and an ordered list of frozen adapters, with or without an LRM that chooses while it samples."""

    base: str = opt(
        "scenes", "'scenes' (the embedded model), a diffusers folder, a single .safetensors file or a hub id", main=True
    )
    adapters: tuple[Adapter, ...] = opt((), "frozen adapters, applied in this order", main=True)
    search: Search | None = opt(None, "an LRM that chooses among candidates at sampling time; empty samples plainly")  # noqa: RUF009
    unet: str = opt("", "folder or hub id of a merged UNet that replaces the base's own, as official LPO policies are")

    def __post_init__(self) -> None:
        validate(self)
        if not self.base:
            raise ConfigError(
                "The base model is empty: give 'scenes', a diffusers folder, a .safetensors file or a hub id."
            )


def searchable(policy: Policy, eta: float) -> None:
    """Step-level search needs siblings that differ."""
    if policy.search is not None and policy.search.method == "steps" and eta == 0:
        raise ConfigError(
            "eta is 0, but the search over steps chooses among noisy siblings: set eta above 0 (1 as LPO does), "
            "or use best-of-n."
        )


def search_args(search: Search) -> list[str]:
    """The command-line flags of a search."""
    args = ["--search", search.method, "--search_lrm", search.lrm, "--candidates", str(search.candidates)]
    if search.method == "steps":
        args += ["--search_t_min", str(search.t_min), "--search_t_max", str(search.t_max)]
    return args
