"""One Gaussian step p(x_{t-1} | x_t), and how probable a given x_{t-1} is under it. Pure tensor functions, fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ddim_std(alpha: Tensor, alpha_prev: Tensor, eta: float) -> Tensor:
    """Standard deviation of the DDIM step, eq. 16 of arXiv 2010.02502; (B,) from cumulative alphas (B,)."""
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    return eta * variance.clamp(min=0).sqrt()


def ddim_step(
    x_t: Tensor, prediction: Tensor, alpha: Tensor, alpha_prev: Tensor, eta: float, prediction_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of x_{t-1}, eq. 12 of arXiv 2010.02502.

    x_t, prediction (B, C, H, W); alpha, alpha_prev (B,) cumulative alphas at t and at the previous timestep;
    prediction_type epsilon or v_prediction. Returns x0 (B, C, H, W), mean (B, C, H, W), std (B,).
    """
    a, a_prev = alpha.view(-1, 1, 1, 1), alpha_prev.view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        epsilon = prediction
        x0 = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()
    elif prediction_type == "v_prediction":
        x0 = a.sqrt() * x_t - (1 - a).sqrt() * prediction
        epsilon = a.sqrt() * prediction + (1 - a).sqrt() * x_t
    else:
        raise ValueError(f"prediction_type {prediction_type!r} is not supported; epsilon and v_prediction are.")
    std = ddim_std(alpha, alpha_prev, eta)
    towards_x_t = (1 - a_prev - std.view(-1, 1, 1, 1) ** 2).clamp(min=0).sqrt()
    return x0, a_prev.sqrt() * x0 + towards_x_t * epsilon, std


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(sample; mean, std^2), **averaged** over C, H, W as in the official code. std (B,) > 0. Returns (B,)."""
    s = std.view(-1, 1, 1, 1)
    density = -((sample - mean) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2, 3))


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """The forward process: x_t from clean latents (B, C, H, W) and cumulative alphas (B,)."""
    a = alpha.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def sensitivity(alpha: Tensor, alpha_prev: Tensor, eta: float) -> Tensor:
    """|d mean / d epsilon| / std of a DDIM step, (B,): how strongly a step's margin pulls on the network.

    Several times larger at the last step than elsewhere; its inverse is the weight that evens the steps out.
    """
    std = ddim_std(alpha, alpha_prev, eta)
    slope = (1 - alpha_prev - std**2).clamp(min=0).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt() / alpha.sqrt()
    return slope.abs() / std


def gather(table: Tensor, t: int | Tensor, batch: int) -> Tensor:
    """table[t] as (batch,) on the table's device; `t` one number or (batch,)."""
    index = torch.as_tensor(t, device=table.device).long().reshape(-1).expand(batch)
    return table[index]
