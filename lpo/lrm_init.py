"""The LRM that a training starts from, and the labels that it keeps back: decided once, before the first step."""

from __future__ import annotations

import math

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lpo import rng
from lpo.backbones import Backbone
from lpo.backbones.latent_space import require_same
from lpo.config import LRMConfig
from lpo.data import DataError, Pair, normalise_prompt
from lpo.lrm_files import from_backbone, latent_space
from lpo.reward_model import LatentRewardModel


def split_calibration(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, calibration) pairs; whole prompts move, in a keyed order, until the calibration share is reached."""
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[normalise_prompt(pair.prompt)] = sizes.get(normalise_prompt(pair.prompt), 0) + 1
    aside: set[str] = set()
    held = 0
    for prompt in sorted(sizes, key=lambda text: rng.key_seed(seed, "lrm-calibration", text)):
        if held + sizes[prompt] <= share * len(pairs):
            aside.add(prompt)
            held += sizes[prompt]
    return ([pair for pair in pairs if normalise_prompt(pair.prompt) not in aside],
            [pair for pair in pairs if normalise_prompt(pair.prompt) in aside])


def start_lrm(config: LRMConfig, backbone: Backbone) -> LatentRewardModel:
    """The LRM that training starts from, in the latent space of `backbone`, with temperature 1.

    A warm start's temperature moves into its logit scale, so its scores stay what they were and the loss sees them so.
    """
    if config.init == "base":
        lrm = from_backbone(backbone, config.projection_dim, config.seed, config.feature_layer, config.t5)
        lrm.with_guidance(config.guidance_scale)
        if config.text_projection:
            if lrm.text_projection is None:
                raise DataError(f"{config.base} compares with its pooled text as it is; leave text_projection empty")
            lrm.init_heads(config.seed, _read_text_projection(config.text_projection, lrm.text_projection.weight.shape))
    else:
        lrm = LatentRewardModel.from_pretrained(config.init, config.base, config.device, config.dtype)
        require_same(latent_space(lrm, config.base), backbone.fingerprint(), config.init, config.base,
                     config.allow_latent_mismatch)
        with torch.no_grad():
            lrm.logit_scale -= math.log(lrm.temperature)
        lrm.temperature = 1.0
    return lrm


def _read_text_projection(path: str, shape: torch.Size) -> torch.Tensor:
    try:
        weight = load_file(path)["text_projection.weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is no safetensors file with text_projection.weight; give CLIP's, or leave it out "
                        "to start from the identity") from error
    if weight.shape != shape:
        raise DataError(f"text_projection.weight in {path} is {tuple(weight.shape)}, but {tuple(shape)} is needed; "
                        "set projection_dim to fit, or leave the file out")
    return weight.float()
