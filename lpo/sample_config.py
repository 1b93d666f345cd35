"""The settings of `sample` and `trace`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lpo import shared_settings as shared
from lpo.options import ConfigError, opt, ordered, validate
from lpo.policy import Policy, searchable
from lpo.prompts import read_prompts


def _different(seeds: tuple[int, ...]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds are {', '.join(map(str, seeds[:20]))}: name each once, its pictures are the same.")


@dataclass(frozen=True)
class SampleConfig:
    """`sample`: pictures for every prompt x every seed."""

    policy: Policy = opt(  # noqa: RUF009
        Policy(), "the model that draws", main=True
    )
    prompts: tuple[str, ...] = opt((), "the prompts, or one path of a .json or .txt prompt file", main=True)
    seeds: tuple[int, ...] = opt(
        (0,), "a picture per prompt and seed; a seed is the same noise for every policy",
        min=0, max=2**63 - 1, main=True,
    )  # fmt: skip
    steps: int = shared.steps()
    guidance_scale: float = shared.guidance()
    eta: float = shared.eta(0.0)
    height: int | None = shared.side()
    width: int | None = shared.side()
    negative_prompt: str = opt("", "what the unconditional branch is told")
    batch_size: int = opt(16, "pictures sampled together; changes speed and memory only", min=1, max=4096)
    device: str = shared.device()
    allow_latent_mismatch: bool = shared.allow_mismatch()
    dtype: str = shared.dtype()
    channels_last: str = shared.channels_last()
    compile: bool = shared.compile_layers()
    tf32: bool = shared.tf32()
    offload: str = shared.offload()

    def __post_init__(self) -> None:
        validate(self)
        _different(self.seeds)
        searchable(self.policy, self.eta)

    def texts(self) -> list[str]:
        """The prompts, read where they are the path of a file. Raises ConfigError if there is nothing to draw."""
        one_file = len(self.prompts) == 1 and self.prompts[0].endswith((".json", ".txt"))
        texts = read_prompts(self.prompts[0]) if one_file else list(self.prompts)
        if not texts or not self.seeds:
            raise ConfigError("sample needs at least one prompt and one seed.")
        return texts


@dataclass(frozen=True)
class TraceConfig:
    """`trace`: the trajectories of one prompt, kept whole and scored by LRMs at every step."""

    policy: Policy = opt(  # noqa: RUF009
        Policy(), "the model that draws", main=True
    )
    lrm: tuple[str, ...] = opt(("scenes",), "LRM folders that score the trace; 'scenes' is the shipped one", main=True)
    prompt: str = opt("", "the prompt to follow", main=True)
    seeds: tuple[int, ...] = opt((0,), "one trajectory per seed", min=0, max=2**63 - 1, main=True)
    steps: int = shared.steps()
    guidance_scale: float = shared.guidance()
    eta: float = shared.eta(1.0)
    siblings: int = opt(
        0, "candidates drawn and scored at each step, as LPO does; 0 for none", min=0, max=64, main=True
    )
    threshold: str = opt(
        "sigma", "how the keep threshold of siblings varies with t", choices=("none", "linear", "variance", "sigma")
    )
    threshold_min: float = opt(0.35, "threshold at the last step", min=0.0, max=1.0)
    threshold_max: float = opt(0.5, "threshold at the first step", min=0.0, max=1.0)
    score_timestep: str = opt(
        "own", "timestep siblings are scored at: their parent's (official) or their own", choices=("parent", "own")
    )
    height: int | None = shared.side()
    width: int | None = shared.side()
    negative_prompt: str = opt("", "what the unconditional branch is told")
    allow_latent_mismatch: bool = shared.allow_mismatch()
    device: str = shared.device()
    dtype: str = shared.dtype()
    channels_last: str = shared.channels_last()
    compile: bool = shared.compile_layers()
    tf32: bool = shared.tf32()
    offload: str = shared.offload()

    def __post_init__(self) -> None:
        validate(self)
        _different(self.seeds)
        if self.siblings == 1:
            raise ConfigError("siblings is 1: one candidate cannot be compared; use 0 (none) or 2 and more.")
        ordered(self, "threshold_min", "threshold_max")
        searchable(self.policy, self.eta)

    def text(self) -> str:
        """The prompt. Raises ConfigError if there is nothing to follow."""
        if not self.prompt or not self.seeds:
            raise ConfigError("trace needs a prompt and at least one seed.")
        return self.prompt
