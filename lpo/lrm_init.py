"""The LRM that a training starts from, and the labels that it keeps back: decided once, before the first step."""

from __future__ import annotations

import math

import torch

from lpo import rng
from lpo.backbones import Backbone
from lpo.backbones.clip_projection import own_projection, read_projection
from lpo.backbones.latent_space import require_same
from lpo.config import LRMConfig
from lpo.data import Pair, normalise_prompt
from lpo.lrm_files import from_backbone, latent_space
from lpo.places import IDENTITY, require_projection, resolve_base
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
        lrm.guidance_scale = config.guidance_scale
        if config.text_projection != IDENTITY:
            _init_text_projection(lrm, config)
    else:
        lrm = LatentRewardModel.from_pretrained(config.init, config.base, config.device, config.dtype)
        require_same(latent_space(lrm, config.base), backbone.fingerprint(), config.init, config.base,
                     config.allow_latent_mismatch)
        with torch.no_grad():
            lrm.logit_scale -= math.log(lrm.temperature)
        lrm.temperature = 1.0
    return lrm


def _init_text_projection(lrm: LatentRewardModel, config: LRMConfig) -> None:
    """CLIP's, from where the config says or else from the base itself. Raises ConfigError if it is missing."""
    needed = lrm.text_projection and tuple(lrm.text_projection.weight.shape)
    place, weight = config.text_projection, None
    if needed:
        weight = read_projection(place) if place else own_projection(resolve_base(config.base))
    require_projection(config.base, place, needed, None if weight is None else tuple(weight.shape))
    if needed:
        lrm.init_heads(config.seed, weight)
