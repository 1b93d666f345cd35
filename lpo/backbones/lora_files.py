"""LoRA files as they are found in the wild, read into diffusers' names: the diffusers layout, and the kohya layout that
A1111 and ComfyUI use (SD1.x, SD2.x and SDXL). Only plain LoRA, only safetensors; anything else gets one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import ConfigMixin
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpo.config import ConfigError

KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr",
               ".oft_": "OFT", "lora_mid": "a Tucker-decomposed LoCon"}  # fmt: skip
# What peft needs to scale a layer; a file may say more, but nothing that changes how its weights are read.
SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")


def read_lora(file: Path | str, network: ConfigMixin) -> tuple[dict[str, Tensor], dict | None]:
    """(weights in diffusers' names, scaling for peft or None if alpha is the rank everywhere) of a LoRA file.

    The names begin with `unet.`, `transformer.`, `text_encoder.` or `text_encoder_2.`. `network` is the denoiser: its
    number of layers a block tells kohya's SDXL names apart. Raises ConfigError with one sentence.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a readable .safetensors file.") from error
    for mark, kind in OTHER_KINDS.items():
        if any(mark in key for key in weights):
            raise ConfigError(f"{file} is {kind}, not a plain LoRA: only LoRA with a down and an up matrix is loaded.")
    if not weights or not all("lora" in key.lower() for key in weights):
        raise ConfigError(f"{file} is not a LoRA: it holds other weights too, or none at all.")
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ConfigError(f"{file} holds values that are not finite: the file is damaged, get it again.")
    if all(key.startswith(KOHYA) for key in weights):
        return _from_kohya(file, weights, network), None
    if any(key.startswith("lora_") for key in weights):
        raise ConfigError(f"{file} has kohya's layout of an architecture that is not read: only SD1.x, 2.x and SDXL.")
    # Files of 2023 nest the layers in processors; the names of today come out of the same function.
    return weights, _scaling(file, metadata)


def _from_kohya(file: Path | str, weights: dict[str, Tensor], network: ConfigMixin) -> dict[str, Tensor]:
    """Diffusers' names for kohya's, by diffusers' own converter; each alpha is folded into its up matrix before."""
    try:
        for key in [key for key in weights if key.endswith(".alpha")]:
            alpha, layer = float(weights.pop(key)), key.removesuffix(".alpha")
            up = weights[f"{layer}.lora_up.weight"]
            weights[f"{layer}.lora_up.weight"] = up.float() * (alpha / len(weights[f"{layer}.lora_down.weight"]))
        state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(weights, unet_config=network.config)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ConfigError(f"{file} has kohya's layout, but not for this model: its layers have other names.") from error
    return state


def _scaling(file: Path | str, metadata: dict[str, str]) -> dict | None:
    """The LoraConfig entries that diffusers writes into a file's header, under names such as `unet.lora_alpha`."""
    if "lora_adapter_metadata" not in metadata:
        return None
    try:
        told = json.loads(metadata["lora_adapter_metadata"])
        if any(told.get(key) for key in told if key.endswith(".use_dora")):
            raise ConfigError(f"{file} is DoRA, not a plain LoRA: only LoRA with a down and an up matrix is loaded.")
        return {key: value for key, value in told.items() if key.partition(".")[2] in SCALING}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"The header of {file} is damaged: its lora_adapter_metadata is no JSON object.") from error
