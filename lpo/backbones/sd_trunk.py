"""The trunk of a latent reward model on Stable Diffusion 1.x / 2.x: UNet down and mid blocks, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lpo.backbones import Conditioning, Features
from lpo.backbones.source import config_folder, load_part, pipeline_class, plain_config
from lpo.backbones.trunk import TextEncoding
from lpo.backbones.unet import guided_features, pooled_width, strip
from lpo.config import ConfigError


def tokenize(tokenizer: CLIPTokenizer, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, L), padded and cut to the length the text encoder knows."""
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def part_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one part of an LRM's state, under the names that the part itself gives them."""
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


class StableDiffusionTrunk:
    """See lpo/backbones/trunk.py. Takes the modules over: the UNet loses its up blocks."""

    kind, network, text_parts, projects_text, last_t = "sd", "unet", ("text_encoder",), True, 999

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer):
        if unet.config.addition_embed_type is not None:
            raise ConfigError("This UNet needs added conditioning (SDXL); an SD1.x or SD2.x UNet is expected.")
        self.unet, self.text_encoder, self.tokenizer = strip(unet), text_encoder, tokenizer
        self.parts = {"unet": unet, "text_encoder": text_encoder}
        self.channels, self.width = unet.config.in_channels, pooled_width(unet)
        self.text_width = text_encoder.config.hidden_size

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        ids = tokenize(self.tokenizer, self.text_encoder, prompts)
        out = self.text_encoder(ids.to(self.text_encoder.device))
        return TextEncoding(out[0], out[1])

    def features(self, x_t: Tensor, t: int | Tensor, conditioning: Conditioning) -> Features:
        return guided_features(self.unet, x_t, t, conditioning)

    def unused(self) -> list[nn.Parameter]:
        return []

    def describe(self) -> dict:
        parts = {name: plain_config(part) for name, part in self.parts.items()}
        return {"kind": self.kind, **parts}

    def save_tokenizers(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @classmethod
    def from_description(cls, architecture: dict, folder: Path) -> StableDiffusionTrunk:
        unet = UNet2DConditionModel.from_config(architecture["unet"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"]))
        return cls(unet, text_encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer"))

    @classmethod
    def from_official(cls, folder: Path, source: str, dtype: torch.dtype) -> StableDiffusionTrunk:
        """A text encoder that was frozen in training is not in the folder; it is the base's."""
        unet = load_part(UNet2DConditionModel, str(folder), "unet", dtype)
        own = (folder / "text_encoder").is_dir()
        text_encoder = load_part(CLIPTextModel, str(folder) if own else source, "text_encoder", dtype)
        return cls(unet, text_encoder, CLIPTokenizer.from_pretrained(config_folder(source), subfolder="tokenizer"))

    def export_official(self, folder: Path, source: str, state: dict[str, Tensor]) -> None:
        """unet/ (up blocks of the base at `source`) and text_encoder/ from the LRM's `state`."""
        export_unet(folder, source, part_of(state, "unet"))
        text_encoder = CLIPTextModel(self.text_encoder.config)
        export_text_encoder(folder / "text_encoder", text_encoder, part_of(state, "text_encoder"))


def export_unet(folder: Path, source: str, early: dict[str, Tensor]) -> None:
    """folder/unet: the base's UNet with its early blocks replaced. Raises ConfigError if they do not fit."""
    if pipeline_class(source) == "StableDiffusion3Pipeline":
        raise ConfigError(f"{source} has no UNet: it cannot lend this LRM its up blocks.")
    unet = load_part(UNet2DConditionModel, source, "unet")
    shapes = {k: v.shape for k, v in unet.state_dict().items()}
    if any(shapes.get(k) != v.shape for k, v in early.items()):
        raise ConfigError(f"{source} has another architecture than this LRM: it cannot lend it its up blocks.")
    unet.load_state_dict(early, strict=False)
    unet.save_pretrained(folder / "unet")


def export_text_encoder(folder: Path, text_encoder: CLIPTextModel, state: dict[str, Tensor]) -> None:
    """Written under the names that every release of transformers reads: new ones drop `text_model.` when saving."""
    text_encoder.load_state_dict(state)
    text_encoder.save_pretrained(folder)
    named = {k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors", metadata={"format": "pt"})
