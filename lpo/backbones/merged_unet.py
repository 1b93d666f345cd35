"""A whole UNet in place of the base's own: official LPO policies come as merged `unet/` folders of diffusers layout."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from lpo.backbones.source import reason
from lpo.config import ConfigError
from lpo.places import unet_source


def replace_unet(network: torch.nn.Module, unet: str, base: str) -> None:
    """Give `network` the weights of `unet`, a folder or hub id; its device, dtype and memory layout stay.

    Only safetensors are read. Raises ConfigError if the UNet is not there or has another architecture than the base's.
    """
    if not isinstance(network, UNet2DConditionModel):
        raise ConfigError(f"{base} has no UNet that {unet} could replace: leave the UNet empty for this base.")
    source, subfolder = unet_source(unet)
    try:
        merged = UNet2DConditionModel.from_pretrained(
            source, subfolder=subfolder, torch_dtype=network.dtype, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"The UNet {unet} could not be loaded from safetensors: {reason(error)}.") from error
    try:
        network.load_state_dict(merged.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"The UNet {unet} has another architecture than {base}: name the base it was made from."
        ) from error
