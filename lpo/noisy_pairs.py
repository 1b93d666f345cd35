"""The two pictures of every pair as an LRM sees them in training: encoded once, then noised to a timestep as often as
it is asked for, with noise that depends on keys alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from lpo import rng
from lpo.backbones import Backbone
from lpo.config import LRMConfig
from lpo.data import LatentCache, Pair
from lpo.ranks import Ranks


class NoisyPairs:
    """`mean` and `std` (P, C, h, w), fp32 on the CPU, are the scaled posteriors of all pictures, `row` their places.

    Several ranks share out the encoding; `folder` must be one that all of them see.
    """

    def __init__(self, config: LRMConfig, backbone: Backbone, pairs: list[Pair], folder: Path, ranks: Ranks):
        self.seed, self.resample, self.process = config.seed, config.resample_latents, backbone.process
        pictures = sorted({str(picture) for pair in pairs for picture in (pair.first, pair.second)})
        # what the encoder makes of fixed pictures names it; at worst another machine's rounding encodes once more
        encoder = hashlib.blake2b(json.dumps(backbone.fingerprint()).encode(), digest_size=8).hexdigest()
        factor = 64 // backbone.encode(torch.zeros(1, 3, 64, 64))[0].shape[-1]
        _, height, width = backbone.latent_shape()
        cache = LatentCache(folder, backbone.encode, encoder, (height * factor, width * factor))
        paths = [cache.path(picture) for picture in pictures]
        cache.fill({paths[row]: pictures[row] for row in ranks.share(len(pictures)).rows})
        ranks.any(False)  # the others have encoded theirs
        cache.fill(dict(zip(paths, pictures, strict=True)))
        self.mean, self.std = cache.load(paths)
        self.row = {picture: row for row, picture in enumerate(pictures)}

    def noised(
        self, pairs: list[Pair], timesteps: list[int], draws: list[tuple[int | str, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents (2 N, C, h, w), all first pictures and then all second ones, and their timesteps (2 N,).

        `draws`: one key a pair; its noise depends on the run's seed, this key and the side, not on the batch.
        """
        keys = [(self.seed, *draw, side) for side in ("first", "second") for draw in draws]
        rows = [self.row[str(pair.first)] for pair in pairs] + [self.row[str(pair.second)] for pair in pairs]
        clean, shape = self.mean[rows], tuple(self.mean.shape[1:])
        if self.resample:
            clean = clean + self.std[rows] * torch.stack([rng.normal(shape, *key, "posterior") for key in keys])
        noise = torch.stack([rng.normal(shape, *key, "noise") for key in keys])
        t = torch.tensor(timesteps * 2)
        return self.process.add_noise(clean, noise, t), t
