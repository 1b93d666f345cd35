"""Trains the f = 4 autoencoder of the Scenes model: 64 x 64 pictures to 4 x 16 x 16 latents.

FACTS of the prototype: f = 8 loses small and white objects; channels 16/24/48 reach 30 dB in 12 CPU
minutes. The learning rate follows the clock, so that the decay always
happens, however many other programs share the cores.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from lpo.scenes.dataset import object_weights, scene_of
from lpo.scenes.progress import Log, load_state, save_state

LEARNING_RATE, BATCH, KL_WEIGHT, OBJECT_WEIGHT = 2e-3, 16, 3e-4, 3.0


def build_vae() -> AutoencoderKL:
    """A tiny AutoencoderKL of SD's structure: 3 levels, 4 latent channels, attention in the middle."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def to_tensor(pictures: np.ndarray, device: str) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1], channels last."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """L1 + 0.5 L1 of the gradients (edges name shapes) + KL per latent element.

    x (B, 3, H, W) in [-1, 1]; weights (B, 1, H, W), mean 1: objects count more than sky.
    """
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    error = y - x
    pixels = (weights * error.abs()).mean()
    edges = (weights[..., 1:] * error.diff(dim=-1).abs()).mean() + (
        weights[..., 1:, :] * error.diff(dim=-2).abs()
    ).mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    psnr = -10 * math.log10(float(((error.detach() / 2) ** 2).mean()))
    report = {"pixels": pixels.item(), "edges": edges.item(), "kl": kl.item(), "psnr": psnr}
    return pixels + 0.5 * edges + KL_WEIGHT * kl, report


def train_vae(out: Path, pictures: np.ndarray, minutes: float, device: str, log: Log, seed: int = 0) -> AutoencoderKL:
    """Trains for `minutes` of wall time in all, resuming from `out`/vae.pt; returns the finished autoencoder."""
    torch.manual_seed(seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    state = load_state(out / "vae.pt", {"model": vae, "optimiser": optimiser})
    step, spent = state.get("step", 0), state.get("seconds", 0.0)
    if spent >= 60 * minutes:
        return vae.eval()
    scenes = [scene_of(seed, i) for i in range(len(pictures))]
    started = saved = time.monotonic()
    while True:
        seconds = spent + time.monotonic() - started
        done = seconds / (60 * minutes)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            rate = 0.02 + 0.49 * (1 + math.cos(math.pi * max(0.0, (done - 0.35) / 0.65)))
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * rate
        batch = np.sort(np.random.default_rng((seed, step)).integers(len(pictures), size=BATCH))
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            x = to_tensor(pictures[batch], device).to(memory_format=torch.channels_last)
            weights = np.stack([object_weights(scenes[i], 64, OBJECT_WEIGHT) for i in batch])[:, None]
            loss, report = vae_loss(vae, x, torch.from_numpy(weights).to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            log("vae", step=step, seconds=seconds, lr=group["lr"], norm=float(norm), **report)
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            save_state(out / "vae.pt", {"model": vae, "optimiser": optimiser}, step=step, seconds=seconds)
    save_state(out / "vae.pt", {"model": vae, "optimiser": optimiser}, step=step, seconds=seconds)
    return vae.eval()


@torch.no_grad()
def cached_latents(
    out: Path, vae: AutoencoderKL, pictures: np.ndarray, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std of every picture, fp16 (N, 4, 16, 16) each, computed once and kept in `out`."""
    path = out / "latents.pt"
    if not path.exists():
        means, stds = [], []
        for i in range(0, len(pictures), 256):
            x = to_tensor(pictures[i : i + 256], device).to(memory_format=torch.channels_last)
            posterior = vae.encode(x).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        part = path.with_suffix(".part")
        torch.save({"mean": torch.cat(means), "std": torch.cat(stds)}, part)
        part.rename(path)
    stored = torch.load(path, weights_only=True)
    return stored["mean"].contiguous(), stored["std"].contiguous()
