"""The small protocol that roll-outs, trainers and curves see instead of a model, and the function that loads one.

Nothing outside this folder asks which model it has: it gets means and standard deviations, never epsilon or velocity.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lpo.backbones.latent_space import difference
from lpo.backbones.source import pipeline_class
from lpo.config import Adapter, ConfigError, Policy
from lpo.diffusion import Process
from lpo.places import resolve_base

if TYPE_CHECKING:
    from lpo.backbones.lora import AdapterStack
    from lpo.backbones.speed import SpeedSettings
    from lpo.backbones.trunk import Trunk


@dataclass(frozen=True)
class Conditioning:
    """What a prompt says to the network, both guidance branches side by side.

    text, unconditional: (B, L, D) token states. pooled, pooled_unconditional: (B, P) or None, for models that use them.
    """

    text: Tensor
    unconditional: Tensor
    pooled: Tensor | None = None
    pooled_unconditional: Tensor | None = None

    def _each(self, change) -> Conditioning:
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Conditioning(**{name: None if part is None else change(part) for name, part in parts.items()})

    def rows(self, index: Sequence[int] | Tensor) -> Conditioning:
        """The rows `index`, in that order, repeats allowed."""
        return self._each(lambda part: part[torch.as_tensor(index, device=part.device)])

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Features:
    """Spatially averaged features of the early part of a network, the two guidance branches apart.

    down: one (B, C_i) tensor per level, of the text branch; mid, unconditional_mid: (B, C_mid).
    """

    down: list[Tensor]
    mid: Tensor
    unconditional_mid: Tensor


class Backbone(Protocol):
    """A frozen diffusion model with adapters. Latents are scaled as the network sees them.

    t counts 0 (clean) to 999, or to 1000 in fractions for flow matching, whose schedules have no whole numbers; there
    it is rounded to thousandths, so that it is short as a key. `t` and `prev_t` may be one number or a (B,) tensor;
    prev_t = -1 is the end of the trajectory.
    """

    device: torch.device
    policy: Policy
    adapters: AdapterStack  # its `net` is the denoiser
    process: Process  # how noise is added and one step undone; needs no network, so trainers may keep it alone

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str = ""
    ) -> Conditioning: ...  # one row a prompt, repeats allowed; each distinct one is encoded once and remembered
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]: ...  # (B, 3, H, W) in [-1, 1] -> posterior mean, std
    def decode(self, latents: Tensor) -> Tensor: ...  # -> (B, 3, H, W) in [0, 1], fp32
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]: ...
    def timesteps(
        self, steps: int, shape: tuple[int, int, int] | None = None
    ) -> list[float]: ...  # descending; shape: the latents', where the schedule depends on it (None: the own size)
    def predict(self, x_t: Tensor, t: float | Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor: ...
    def transition(
        self, x_t: Tensor, prediction: Tensor, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # x0, mean (B, C, H, W), std (B,)
    def step_std(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor: ...  # (B,), no network call
    def step_sensitivity(
        self, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> Tensor: ...  # (B,), |d mean/d net|/std
    def features(self, x_t: Tensor, t: float | Tensor, conditioning: Conditioning) -> Features: ...
    def fingerprint(self) -> dict: ...  # of the latent space, see lpo/backbones/latent_space.py
    def trunk(
        self, feature_layer: int = 18, t5: bool = False
    ) -> Trunk: ...  # hands its early part over to an LRM, and samples no more; UNets have neither layers nor a T5

    def set_adapters(self, adapters: Sequence[Adapter]) -> None: ...
    def add_trainable_adapter(self, rank: int, targets: Sequence[str], seed: int) -> None: ...
    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]: ...
    def reference(self) -> AbstractContextManager[None]: ...  # inside: the policy without its trainable adapter
    def enable_gradient_checkpointing(self) -> None: ...
    def tune(self, settings: SpeedSettings) -> None: ...  # speed and memory only, see lpo/backbones/speed.py
    def save_adapter(self, path: Path) -> None: ...


def transitions(timesteps: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(t, prev_t) of every step; the last prev_t is -1, the end."""
    return zip(timesteps, [*timesteps[1:], -1], strict=True)


def pick_device(device: str) -> torch.device:
    """'auto' takes an NVIDIA GPU if there is one. Raises ConfigError for a device this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"Device {device!r} cannot be used here; use auto or cpu.") from error
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the GPU computes in it, else float32: float16 would need its gradients scaled."""
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_policy(
    policy: Policy, device: str = "auto", dtype: str = "auto", allow_latent_mismatch: bool = False
) -> Backbone:
    """Load a base and its frozen adapters. Raises ConfigError with one sentence if anything is unsuitable."""
    base = resolve_base(policy.base)
    where = pick_device(device)
    backbone = backbone_class(base, policy.base).from_pretrained(base, policy.base, where, pick_dtype(dtype, where))
    if policy.unet:
        from lpo.backbones.merged_unet import replace_unet

        replace_unet(backbone.adapters.net, policy.unet, policy.base)
        backbone.policy = dataclasses.replace(backbone.policy, unet=policy.unet)
    use_adapters(backbone, policy.adapters, allow_latent_mismatch)
    return backbone


def use_adapters(backbone: Backbone, adapters: Sequence[Adapter], allow_latent_mismatch: bool = False) -> None:
    """Make `adapters` the frozen ones. Raises ConfigError for one that does not fit or was trained in another latent
    space, as far as its checkpoint says (adapters of other tools do not)."""
    for adapter in adapters if not allow_latent_mismatch else ():
        space = adapter_fingerprint(adapter)
        found = difference(space, backbone.fingerprint()) if space else None
        if found:
            raise ConfigError(
                f"The adapter {adapter.path} was not trained in the latent space of {backbone.policy.base} ({found}): "
                "take the base it was trained on, or set allow_latent_mismatch."
            )
    backbone.set_adapters(adapters)


def adapter_fingerprint(adapter: Adapter) -> dict | None:
    """What adapter.json beside an adapter's weights says of its latent space; None if there is none."""
    path = Path(adapter.path).expanduser()
    try:
        return json.loads((path if path.is_dir() else path.parent).joinpath("adapter.json").read_text())["fingerprint"]
    except (OSError, KeyError, TypeError, ValueError):  # ValueError: no JSON, or not UTF-8
        return None


def base_fingerprint(base: str) -> dict:
    """Of a base's latent space, without loading its network."""
    source = resolve_base(base)
    try:
        return backbone_class(source, base).read_fingerprint(source)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"The VAE or scheduler of {base} could not be loaded: get the model again.") from error


def backbone_class(source: str, base: str) -> type:
    """The class behind a resolved base, from its pipeline's name. Raises ConfigError for an unknown one."""
    pipeline = pipeline_class(source)
    if pipeline == "StableDiffusionPipeline":
        from lpo.backbones.sd import StableDiffusion

        return StableDiffusion
    if pipeline == "StableDiffusionXLPipeline":
        from lpo.backbones.sdxl import StableDiffusionXL

        return StableDiffusionXL
    if pipeline == "StableDiffusion3Pipeline":
        from lpo.backbones.sd3 import StableDiffusion3

        return StableDiffusion3
    raise ConfigError(f"{base} is a {pipeline}; supported are Stable Diffusion 1.x, 2.x, XL and 3.")
