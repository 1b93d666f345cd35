"""How much of the style axis can be read from a noisy latent at all? A bound for the table "Labels and the LRM".

    python -m benchmarks.study_ceiling --out study        # after `make study`, whose pictures it reads

Ridge regression on the pooled features of the shipped LRM's trunk, told the true style of every picture of the training
pool (1,600, without noise in the labels, each under four draws of noise) instead of 200 noisy choices, judged on pairs
of prompts that it has not seen. What such a reader cannot tell apart, 200 labels cannot teach.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.study import PLANS, Study
from lpo import rng
from lpo.backbones import load_policy
from lpo.config import Policy
from lpo.reward_model import LatentRewardModel
from lpo.scenes.judge import style_score

FOLDS, DRAWS, RIDGES = 5, 4, (1.0, 10.0, 100.0)
TIE = 0.02  # of the simulated annotator: closer pairs have no answer


def ceiling(features: np.ndarray, values: np.ndarray, group: np.ndarray, ridge: float) -> tuple[float, float]:
    """Share of pairs ordered rightly by cross-validated ridge regression: of all with an answer, and of those that
    differ by more than the median.

    features (D, N, K) of N pictures under D draws of noise, pictures 2i and 2i + 1 being a pair; values (N,) is what
    they truly differ in; group (N,) the fold of each, the same for both of a pair.
    """
    scaled = (features - features.mean((0, 1))) / features.std((0, 1)).clip(1e-8)
    predicted = np.zeros(len(values))
    for fold in np.unique(group):
        seen = group != fold
        x = scaled[:, seen].reshape(-1, scaled.shape[-1])
        y = np.tile(values[seen] - values[seen].mean(), len(features))
        weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        predicted[~seen] = scaled[0, ~seen] @ weights
    gaps, guessed = np.diff(values.reshape(-1, 2)).ravel(), np.diff(predicted.reshape(-1, 2)).ravel()
    answered = np.abs(gaps) > TIE
    wide = np.abs(gaps) > np.median(np.abs(gaps[answered]))
    right = gaps * guessed > 0
    return float(right[answered].mean()), float(right[wide].mean())


@torch.no_grad()
def features_at(lrm: LatentRewardModel, backbone, latents: torch.Tensor, t: int) -> np.ndarray:
    """(DRAWS, N, K) pooled features of clean latents (N, C, H, W) noised to timestep t, without a prompt."""
    empty, draws = lrm.encode_text([""]), []
    for draw in range(DRAWS):
        noisy = backbone.process.add_noise(latents, rng.normal(tuple(latents.shape), "ceiling", t, draw), t)
        parts = [lrm.features(x, torch.full((len(x),), t), empty.rows([0] * len(x)), empty) for x in noisy.split(64)]
        draws.append(torch.cat([torch.cat([*part.down, part.mid], dim=1) for part in parts]))
    return torch.stack(draws).double().numpy()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full", help="of the study in --out")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the study")
    args = parser.parse_args()
    pairs = Study(args.out, PLANS[args.plan]).pool("train")
    pictures = [Image.open(pair[side]).convert("RGB") for pair in pairs for side in ("first", "second")]
    values = np.array([style_score(picture) for picture in pictures])
    prompts = sorted({pair["prompt"] for pair in pairs})
    group = np.repeat([prompts.index(pair["prompt"]) % FOLDS for pair in pairs], 2)
    backbone, lrm = load_policy(Policy("scenes")), LatentRewardModel.from_pretrained("scenes")
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([backbone.encode(some)[0] for some in pixels.split(64)])
    print("| t | pairs ordered rightly | of the half that differs more |\n|---|---|---|")
    for t in (1, 201, 401, 501, 601, 701):
        features = features_at(lrm, backbone, latents, t)
        right, wide = max(ceiling(features, values, group, ridge) for ridge in RIDGES)
        print(f"| {t} | {right:.2f} | {wide:.2f} |", flush=True)


if __name__ == "__main__":
    main()
