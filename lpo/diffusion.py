"""One Gaussian step p(x_{t-1} | x_t), and how probable a given x_{t-1} is under it. Pure tensor functions, fp32.

A `Process` bundles what follows from how a model was taught to see noise: `Diffusion` (Stable Diffusion 1 to XL) and
`Flow` (flow matching, Stable Diffusion 3). It is a few numbers, so it may outlive the model it came with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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


def gather(table: Tensor, t: float | Tensor, batch: int) -> Tensor:
    """table[t] as (batch,) on the table's device; `t` one whole number or (batch,) of them; -1 is the last entry."""
    index = torch.as_tensor(t, device=table.device).long().reshape(-1).expand(batch)
    return table[index]


def flow_step(
    x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_prev: Tensor, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of x_{t-1} for x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0.

    The coefficient-preserving SDE (arXiv 2509.05952): a' x0 + s' cos(eta pi/2) noise + s' sin(eta pi/2) z, a' = 1 - s'.
    eta 0 is Euler's step of the ODE, 1 draws all noise anew; each in between is valid at every step, the last included.
    Differs from the paper: its SDE needs the root of a negative number at the last steps (with eta 1).

    x_t, velocity (B, C, H, W); sigma, sigma_prev (B,) in [0, 1]. Returns x0, mean (B, C, H, W), std (B,).
    """
    s, s_prev = sigma.view(-1, 1, 1, 1), sigma_prev.view(-1, 1, 1, 1)
    x0 = x_t - s * velocity
    noise = x_t + (1 - s) * velocity
    angle = eta * math.pi / 2
    return x0, (1 - s_prev) * x0 + s_prev * math.cos(angle) * noise, sigma_prev * math.sin(angle)


class Process(Protocol):
    """Noise added to clean latents, and one step back. t, prev_t: a number or (B,); prev_t = -1 is the end."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor: ...  # x_t, (B, C, H, W)
    def step(
        self, x_t: Tensor, prediction: Tensor, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # x0, mean (B, C, H, W), std (B,)
    def step_std(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor: ...  # (B,)
    def step_sensitivity(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor: ...  # (B,)
    def describe(self) -> dict: ...  # plain JSON values for the fingerprint of a latent space


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise, undone by DDIM. alphas: cumulative, and one more entry for the end (-1)."""

    alphas: Tensor
    prediction_type: str

    def _alpha(self, t: float | Tensor, batch: int, device: torch.device | None = None) -> Tensor:
        return gather(self.alphas, t, batch).to(device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        return add_noise(x0, noise, self._alpha(t, len(x0), x0.device))

    def step(
        self, x_t: Tensor, prediction: Tensor, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha, alpha_prev = (self._alpha(each, len(x_t), x_t.device) for each in (t, prev_t))
        return ddim_step(x_t, prediction, alpha, alpha_prev, eta, self.prediction_type)

    def step_std(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        batch = torch.as_tensor(t).numel()
        return ddim_std(self._alpha(t, batch), self._alpha(prev_t, batch), eta)

    def step_sensitivity(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        batch = torch.as_tensor(t).numel()
        return sensitivity(self._alpha(t, batch), self._alpha(prev_t, batch), eta)

    def describe(self) -> dict:
        last = len(self.alphas) - 2
        return {"alphas_cumprod": [round(float(self.alphas[i]), 6) for i in (0, 250, 500, 750, last)]}


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - sigma) x0 + sigma noise with sigma = t / 1000, and the network's output is the velocity noise - x0.

    t counts 0 (clean) to 1000 (noise alone) in fractions: a shifted schedule has no whole numbers. How a schedule is
    shifted is not part of the process, so models of one latent space may differ in it.
    """

    def _sigma(self, t: float | Tensor, batch: int, device: torch.device | None = None) -> Tensor:
        number = torch.as_tensor(t, dtype=torch.float32, device=device)
        return number.reshape(-1).expand(batch).clamp(min=0) / 1000

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        sigma = self._sigma(t, len(x0), x0.device).view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise

    def step(
        self, x_t: Tensor, prediction: Tensor, t: float | Tensor, prev_t: float | Tensor, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sigma, sigma_prev = (self._sigma(each, len(x_t), x_t.device) for each in (t, prev_t))
        return flow_step(x_t, prediction, sigma, sigma_prev, eta)

    def step_std(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        return self._sigma(prev_t, torch.as_tensor(t).numel()) * math.sin(eta * math.pi / 2)

    def step_sensitivity(self, t: float | Tensor, prev_t: float | Tensor, eta: float) -> Tensor:
        """|d mean / d velocity| / std."""
        batch = torch.as_tensor(t).numel()
        sigma, sigma_prev = self._sigma(t, batch), self._sigma(prev_t, batch)
        slope = sigma_prev * math.cos(eta * math.pi / 2) * (1 - sigma) - (1 - sigma_prev) * sigma
        return slope.abs() / self.step_std(t, prev_t, eta)

    def describe(self) -> dict:
        return {"forward_process": "flow"}
