"""A whole UNet in place of the base's own: official LPO policies come as merged `unet/` folders of diffusers layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from lpo.config import ConfigError


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
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"The UNet {unet} could not be loaded from safetensors: {reason}") from error
    try:
        network.load_state_dict(merged.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"The UNet {unet} has another architecture than {base}: name the base it was made from."
        ) from error


def unet_source(unet: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder): a folder is the UNet's own or holds `unet/`; owner/name[/folder] is on a hub."""
    folder = Path(unet).expanduser()
    if folder.is_dir():
        inner = folder / "unet" if (folder / "unet").is_dir() else folder
        if not (inner / "config.json").exists():
            raise ConfigError(f"{unet} is not a UNet folder of diffusers layout (it has no config.json).")
        return str(inner), None
    owner, _, rest = unet.partition("/")
    name, _, subfolder = rest.partition("/")
    if not owner or not name or unet[0] in "./~":
        raise ConfigError(f"There is no UNet at {unet}: give a folder of diffusers layout or a hub id.")
    return f"{owner}/{name}", subfolder or "unet"
