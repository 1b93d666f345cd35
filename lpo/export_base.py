"""What an export must know of a base model without loading its weights: its kind, its networks with nothing in them
(so that an adapter can be fitted to them in a second), its prediction type and picture size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lpo.backbones.source import config_folder, pipeline_class
from lpo.config import ConfigError
from lpo.places import resolve_base

STANDARD = {"sd1": (320, 640, 1280, 1280), "sd2": (320, 640, 1280, 1280), "sdxl": (320, 640, 1280)}


@dataclass(frozen=True)
class Base:
    """`kind` is sd1, sd2, sdxl or sd3; `prefix` names the denoiser `net` in LoRA files; all modules are hollow."""

    name: str
    kind: str
    prefix: str
    net: nn.Module
    text_encoders: dict[str, nn.Module]
    prediction_type: str  # epsilon, v or flow
    side: int  # pixels

    @property
    def is_standard(self) -> bool:
        """Whether the network has the size that other tools know under this kind's name."""
        return self.kind == "sd3" or tuple(self.net.config.block_out_channels) == STANDARD[self.kind]


def describe_base(name: str) -> Base:
    """Reads configuration files only. Raises ConfigError with one sentence if they are not there."""
    source = resolve_base(name)
    pipeline, folder = pipeline_class(source), config_folder(source)
    try:
        if pipeline == "StableDiffusion3Pipeline":
            net = hollow(SD3Transformer2DModel, SD3Transformer2DModel.load_config(folder, subfolder="transformer"))
            index = DiffusionPipeline.load_config(folder)
            clip = [part for part in ("text_encoder", "text_encoder_2") if (index.get(part) or [None])[0]]
            encoders = {part: _hollow_text(CLIPTextModelWithProjection, folder, part) for part in clip}
            return Base(name, "sd3", "transformer", net, encoders, "flow", net.config.sample_size * _factor(folder))
        if pipeline not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            raise ConfigError(f"{name} is a {pipeline}; supported are Stable Diffusion 1.x, 2.x, XL and 3.")
        net = hollow(UNet2DConditionModel, UNet2DConditionModel.load_config(folder, subfolder="unet"))
        encoders = {"text_encoder": _hollow_text(CLIPTextModel, folder, "text_encoder")}
        kind = "sd2" if net.config.cross_attention_dim == 1024 else "sd1"
        if pipeline == "StableDiffusionXLPipeline":
            kind = "sdxl"
            encoders["text_encoder_2"] = _hollow_text(CLIPTextModelWithProjection, folder, "text_encoder_2")
        size = net.config.sample_size
        side = (size if isinstance(size, int) else size[0]) * _factor(folder)
        return Base(name, kind, "unet", net, encoders, _prediction(folder), side)
    except (OSError, KeyError, TypeError) as error:
        raise ConfigError(f"The configuration of {name} is incomplete: get the model folder again.") from error


def hollow(kind: type, config: dict) -> nn.Module:
    """A diffusers model whose weights are one zero, expanded: right shapes, no memory."""
    with torch.device("meta"):
        model = kind.from_config(config)
    return _empty(model)


def _hollow_text(kind: type, folder: str, name: str) -> nn.Module:
    config = CLIPTextConfig.from_pretrained(folder, subfolder=name)
    with torch.device("meta"):
        model = kind(config)
    return _empty(model)


def _empty(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zero = torch.zeros(1, dtype=torch.float32).expand(weight.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(1, dtype=buffer.dtype).expand(buffer.shape))
    return model


def _factor(folder: str) -> int:
    """Pixels a latent is wide."""
    return 2 ** (len(AutoencoderKL.load_config(folder, subfolder="vae")["block_out_channels"]) - 1)


def _prediction(folder: str) -> str:
    told = DDIMScheduler.load_config(folder, subfolder="scheduler").get("prediction_type", "epsilon")
    return {"v_prediction": "v"}.get(told, told)
