"""The trunk of a latent reward model on Stable Diffusion XL: UNet down and mid blocks, CLIP-L and OpenCLIP-bigG.

The score compares the image with bigG's pooled output as it is. The unconditional branch is the encoded "", states and
pooled, as the official LRM has it (the policy's is zeros), and the sizes that the UNet is told are always the model's
own, whatever the latents' are, as in the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lpo.backbones import Conditioning, Features
from lpo.backbones.sd_trunk import export_text_encoder, export_unet, part_of, tokenize
from lpo.backbones.source import config_folder, load_part, plain_config
from lpo.backbones.trunk import TextEncoding
from lpo.backbones.unet import guided_features, pooled_width, strip
from lpo.config import ConfigError

NAMES = ("text_encoder", "text_encoder_2")
KINDS = (CLIPTextModel, CLIPTextModelWithProjection)


def size_ids(size: tuple[int, int]) -> Tensor:
    """SDXL's six size conditions: original (H, W), crop (0, 0), target (H, W), in pixels; size = (H, W)."""
    return torch.tensor([*size, 0, 0, *size], dtype=torch.float32)


class TextTowers:
    """Both text encoders: states from their penultimate layers side by side, pooled from the second's projection."""

    def __init__(
        self,
        encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    ):
        self.encoders, self.tokenizers = encoders, tokenizers

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, D1 + D2) and pooled (B, P)."""
        outs = [
            encoder(tokenize(tokenizer, encoder, prompts).to(encoder.device), output_hidden_states=True)
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        ]
        return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[1].text_embeds


class StableDiffusionXLTrunk:
    """See lpo/backbones/trunk.py. Takes the modules over: the UNet loses its up blocks. size: the model's (H, W)."""

    kind, network, text_parts, projects_text, last_t = "sdxl", "unet", NAMES, False, 999

    def __init__(self, unet: UNet2DConditionModel, towers: TextTowers, size: tuple[int, int]):
        if unet.config.addition_embed_type != "text_time":
            raise ConfigError("This UNet takes no picture sizes; an SDXL UNet is expected.")
        self.unet, self.towers, self.size = strip(unet), towers, size
        self.parts = {"unet": unet, **dict(zip(NAMES, towers.encoders, strict=True))}
        self.channels, self.width = unet.config.in_channels, pooled_width(unet)
        self.text_width = towers.encoders[1].config.projection_dim

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        return TextEncoding(*self.towers.encode(prompts))

    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.unet, x_t, t, conditioning, size_ids(self.size).to(x_t.device))

    def unused(self) -> list[nn.Parameter]:
        """Only the penultimate layer of the first encoder is read: its last layer and final norm feed nothing."""
        first = self.towers.encoders[0]
        return [*first.encoder.layers[-1].parameters(), *first.final_layer_norm.parameters()]

    def describe(self) -> dict:
        parts = {name: plain_config(part) for name, part in self.parts.items()}
        return {"kind": self.kind, **parts, "size": list(self.size)}

    def save_tokenizers(self, folder: Path) -> None:
        for name, tokenizer in zip(("tokenizer", "tokenizer_2"), self.towers.tokenizers, strict=True):
            tokenizer.save_pretrained(folder / name)

    @classmethod
    def from_description(cls, architecture: dict, folder: Path) -> StableDiffusionXLTrunk:
        unet = UNet2DConditionModel.from_config(architecture["unet"])
        encoders = tuple(
            kind(CLIPTextConfig(**architecture[name])) for name, kind in zip(NAMES, KINDS, strict=True)
        )
        return cls(unet, TextTowers(encoders, read_tokenizers(str(folder))), tuple(architecture["size"]))

    @classmethod
    def from_official(cls, folder: Path, source: str, dtype: torch.dtype) -> StableDiffusionXLTrunk:
        """Text encoders that were frozen in training are not in the folder; they are the base's."""
        unet = load_part(UNet2DConditionModel, str(folder), "unet", dtype)
        encoders = tuple(
            load_part(kind, str(folder) if (folder / name).is_dir() else source, name, dtype)
            for name, kind in zip(NAMES, KINDS, strict=True)
        )
        config = config_folder(source)
        latents = UNet2DConditionModel.load_config(config, subfolder="unet")["sample_size"]
        levels = AutoencoderKL.load_config(config, subfolder="vae")["block_out_channels"]
        side = latents * 2 ** (len(levels) - 1)
        return cls(unet, TextTowers(encoders, read_tokenizers(config)), (side, side))

    def export_official(self, folder: Path, source: str, state: dict[str, Tensor]) -> None:
        """unet/ (up blocks of the base at `source`), text_encoder/ and text_encoder_2/ from the LRM's `state`."""
        export_unet(folder, source, part_of(state, "unet"))
        for name, kind in zip(NAMES, KINDS, strict=True):
            export_text_encoder(folder / name, kind(self.parts[name].config), part_of(state, name))


def read_tokenizers(folder: str) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return tuple(CLIPTokenizer.from_pretrained(folder, subfolder=name) for name in ("tokenizer", "tokenizer_2"))
