"""The trunk of a latent reward model on Stable Diffusion 3: the first transformer blocks and the frozen text encoders.

Differs from the paper: T5 is left out unless asked for. It is larger than all the rest together, the pooled text that a
score compares with comes from the two CLIPs alone, and SD3 was trained to do without any of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from lpo.backbones import Conditioning, Features
from lpo.backbones.mmdit import check_layer, guided_features, strip, unread
from lpo.backbones.sd3_text import TextTowers
from lpo.backbones.source import plain_config
from lpo.backbones.trunk import TextEncoding
from lpo.config import ConfigError


class StableDiffusion3Trunk:
    """See lpo/backbones/trunk.py. Takes the modules over: the transformer loses the blocks after `layer` (from 1)."""

    kind, network, text_parts, projects_text, last_t = "sd3", "transformer", (), False, 1000

    def __init__(self, transformer: SD3Transformer2DModel, towers: TextTowers, layer: int):
        if towers.encoders[0] is None and towers.encoders[1] is None:
            raise ConfigError("An LRM compares with the pooled text of CLIP, but this model has neither CLIP encoder.")
        self.layers, self.layer = transformer.config.num_layers, layer
        self.transformer, self.towers = strip(transformer, layer), towers
        self.parts: dict[str, nn.Module] = {"transformer": transformer, **dict(towers.named())}
        self.channels = transformer.config.in_channels
        self.width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.text_width = transformer.config.pooled_projection_dim

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        return TextEncoding(*self.towers.encode(prompts, self.transformer.device, self.transformer.dtype))

    def features(self, x_t: Tensor, t: float | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.transformer, x_t, t, conditioning, self.layer)

    def unused(self) -> list[nn.Parameter]:
        return unread(self.transformer)

    def describe(self) -> dict:
        config = {**plain_config(self.transformer), "num_layers": self.layers}
        return {"kind": self.kind, "transformer": config, "feature_layer": self.layer, **self.towers.describe()}

    def save_tokenizers(self, folder: Path) -> None:
        self.towers.save_tokenizers(folder)

    @classmethod
    def from_description(cls, architecture: dict, folder: Path) -> StableDiffusion3Trunk:
        config, layer = architecture["transformer"], architecture["feature_layer"]
        check_layer(layer, config["num_layers"])
        # One block more than is kept is enough to build the kept ones as they were: only the very last is different.
        short = {**config, "num_layers": min(layer + 1, config["num_layers"])}
        transformer = SD3Transformer2DModel.from_config(short)
        widths = config["joint_attention_dim"], config["pooled_projection_dim"]
        trunk = cls(transformer, TextTowers.from_description(architecture, folder, *widths), layer)
        trunk.layers = config["num_layers"]
        return trunk

    @classmethod
    def from_official(cls, folder: Path, source: str, dtype: torch.dtype) -> StableDiffusion3Trunk:
        raise ConfigError(f"{folder} cannot be read: there is no official layout of SD3 LRMs, only this program's own.")

    def export_official(self, folder: Path, source: str, state: dict[str, Tensor]) -> None:
        raise ConfigError("There is no official layout of SD3 LRMs: this program's own format is the one to share.")


def without_t5(towers: TextTowers) -> TextTowers:
    """The same towers with nothing where T5 was."""
    return TextTowers(
        [*towers.encoders[:2], None], [*towers.tokenizers[:2], None], towers.states_width, towers.pooled_width
    )
