"""What a latent reward model needs of a network: the early part that turns noisy latents into pooled features, and the
text towers that read the prompt. One small class per architecture; the LRM itself (heads, scoring, training, files)
does not know which it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lpo.backbones import Conditioning, Features
from lpo.config import ConfigError
from lpo.options import parse_json


@dataclass(frozen=True)
class TextEncoding:
    """The text towers' outputs: token states (B, L, D) for cross-attention, pooled (B, P) before any projection."""

    states: Tensor
    pooled: Tensor

    def rows(self, part: slice | Tensor) -> TextEncoding:
        return TextEncoding(self.states[part], self.pooled[part])


def beside(text: TextEncoding, unconditional: TextEncoding) -> Conditioning:
    """Both guidance branches side by side; unconditional has 1 or B rows."""
    batch = len(text.states)
    return Conditioning(
        text.states, unconditional.states.expand(batch, -1, -1), text.pooled, unconditional.pooled.expand(batch, -1)
    )


class Trunk(Protocol):
    """The early part of a diffusion network with its tokenizers and text encoders; no up blocks, no VAE.

    `parts` are its modules under the names that their weights have in files, `network` is the name of the denoiser
    among them and `text_parts` are the names of the text encoders that may be trained.
    """

    kind: str  # sd, sdxl or sd3: says in lrm.json which class reads it
    parts: dict[str, nn.Module]
    network: str
    text_parts: tuple[str, ...]
    channels: int  # of the latents
    last_t: int  # the noisiest timestep: 999, or 1000 for flow matching
    width: int  # of the pooled features: every entry of Features.down, then mid
    text_width: int  # of TextEncoding.pooled
    projects_text: bool  # pooled text goes through a learned projection, or is compared as it is

    def encode(self, prompts: Sequence[str]) -> TextEncoding: ...
    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features: ...  # fp32
    def unused(self) -> list[nn.Parameter]: ...  # parameters of `parts` that no score depends on: never trained
    def describe(self) -> dict: ...  # plain JSON values: `architecture` of lrm.json, with `kind`
    def save_tokenizers(self, folder: Path) -> None: ...

    @classmethod
    def from_description(cls, architecture: dict, folder: Path) -> Trunk: ...  # untrained weights; tokenizers of folder
    @classmethod
    def from_official(cls, folder: Path, source: str, dtype: torch.dtype) -> Trunk: ...  # tokenizers of the base
    def export_official(self, folder: Path, source: str, state: dict[str, Tensor]) -> None: ...


def trunk_class(kind: str) -> type[Trunk]:
    """The trunk class of an `architecture.kind` in lrm.json. Raises ConfigError for one of a newer program."""
    if kind == "sd":
        from lpo.backbones.sd_trunk import StableDiffusionTrunk

        return StableDiffusionTrunk
    if kind == "sdxl":
        from lpo.backbones.sdxl_trunk import StableDiffusionXLTrunk

        return StableDiffusionXLTrunk
    if kind == "sd3":
        from lpo.backbones.sd3_trunk import StableDiffusion3Trunk

        return StableDiffusion3Trunk
    raise ConfigError(f"This LRM's architecture is {kind!r}, which this program does not know: update the program.")


def official_kind(folder: Path) -> str:
    """Which architecture an official LRM folder holds, from its UNet. Raises ConfigError if that is not readable."""
    refused = f"The official LRM folder {folder} has no readable unet/config.json."
    try:
        config = parse_json((folder / "unet" / "config.json").read_bytes(), dict, refused)
    except OSError as error:
        raise ConfigError(refused) from error
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def cast(part: nn.Module, dtype: torch.dtype) -> None:
    """`part.to(dtype)`, but no cast where none is needed: diffusers warns of each."""
    if part.dtype != dtype:
        part.to(dtype=dtype)
