"""Do two models share a latent space? An LRM scores noise if it is fed latents of another VAE, so every checkpoint
carries a fingerprint: channels, scale and shift, forward process, and what the encoder makes of four fixed pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lpo.diffusion import Process
from lpo.places import require_same_space
from lpo.rng import normal

_TOLERANCE = {"scaling_factor": 1e-3, "shift_factor": 1e-3, "alphas_cumprod": 1e-3}
# Of the encoders' means, root mean square: the same VAE in another precision or with rescaled insides
# (sdxl-vae-fp16-fix) stays well below, another VAE differs by about as much as its means are large.
_SAME_VAE, _NOTHING = 0.15, 0.02


def fixed_pictures() -> Tensor:
    """(4, 3, 64, 64) in [-1, 1]: a colour ramp, a checkerboard, a disc on a plain ground, smooth coloured noise."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    ramp = torch.stack([x, y, -x])
    checks = ((torch.arange(64)[:, None] // 8 + torch.arange(64)[None] // 8) % 2 * 2.0 - 1).expand(3, 64, 64)
    disc = torch.where((x**2 + y**2 < 0.4)[None], torch.tensor([0.9, -0.6, -0.8])[:, None, None], torch.tensor(0.2))
    noise = torch.nn.functional.interpolate(normal((1, 3, 8, 8), "latent space"), size=64, mode="bilinear")[0]
    return torch.stack([ramp, checks, disc.expand(3, 64, 64), noise.clamp(-1, 1)])


def fingerprint(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], scaling_factor: float, shift_factor: float, process: dict
) -> dict:
    """Plain JSON values that two models of one latent space agree on. `encode` gives scaled posterior mean and std,
    `process` is the forward process as it describes itself (lpo/diffusion.py)."""
    with torch.no_grad():
        mean, _ = encode(fixed_pictures())
    quarters = torch.nn.functional.adaptive_avg_pool2d(mean.float().cpu(), 2)
    return {
        "channels": mean.shape[1],
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        **process,
        "encoder_means": [round(v, 4) for v in quarters.flatten().tolist()],
    }


def scale_and_shift(vae: AutoencoderKL) -> tuple[float, float]:
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled posterior mean and std (B, C, h, w), fp32, of pictures (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
    scale, shift = scale_and_shift(vae)
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def vae_fingerprint(vae: AutoencoderKL, process: Process) -> dict:
    return fingerprint(partial(encode_pictures, vae), *scale_and_shift(vae), process.describe())


def difference(a: dict, b: dict) -> str | None:
    """The first thing two fingerprints disagree on, in words, or None if they describe one latent space."""
    if a["channels"] != b["channels"]:
        return f"{a['channels']} against {b['channels']} latent channels"
    processes = [space.get("forward_process", "diffusion") for space in (a, b)]
    if processes[0] != processes[1]:
        return f"{processes[0]} against {processes[1]} as forward process"
    words = {
        "scaling_factor": "scale",
        "shift_factor": "shift",
        "alphas_cumprod": "noise schedule",
    }
    for key, word in ((key, word) for key, word in words.items() if key in a):
        left, right = torch.tensor(a[key]).reshape(-1), torch.tensor(b[key]).reshape(-1)
        if len(left) != len(right) or float((left - right).abs().max()) > _TOLERANCE[key]:
            return f"another {word}"
    left, right = torch.tensor(a["encoder_means"]), torch.tensor(b["encoder_means"])
    if len(left) != len(right):
        return "another VAE"
    size = max(float(left.square().mean().sqrt()), float(right.square().mean().sqrt()))
    if float((left - right).square().mean().sqrt()) > max(_NOTHING, _SAME_VAE * size):
        return "another VAE"
    return None


def require_same(lrm_space: dict, policy_space: dict, lrm_name: str, policy_name: str, allow_mismatch: bool) -> None:
    """Raises ConfigError with one sentence if the spaces differ, unless `allow_mismatch`."""
    require_same_space(difference(lrm_space, policy_space), lrm_name, policy_name, allow_mismatch)
