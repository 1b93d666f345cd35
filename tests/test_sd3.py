"""Stable Diffusion 3 behind the one protocol: flow step, policy, LRM, trainers and commands, all on a tiny model."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lpo import diffusion
from lpo.backbones import transitions
from lpo.rng import normal


def scheduler(**changes) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"num_train_timesteps": 1000, "shift": 3.0, **changes})


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_flow_step_is_diffusers_own(shift, eta, monkeypatch):
    stock = scheduler(shift=shift, stochastic_sampling=eta == 1)  # eta 1 is what diffusers calls stochastic sampling
    stock.set_timesteps(20)
    x, velocity, z = (normal((2, 16, 8, 8), "flow", name) for name in ("x", "v", "z"))
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda *_, **__: z)
    for t, prev_t in transitions(stock.timesteps.tolist()):
        expected = stock.step(velocity, torch.tensor(t), x, return_dict=False)[0]
        x0, mean, std = diffusion.Flow().step(x, velocity, t, prev_t, eta)
        torch.testing.assert_close(mean + std.view(-1, 1, 1, 1) * z, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x0, x - t / 1000 * velocity, atol=1e-5, rtol=1e-5)
    assert std.tolist() == [0.0, 0.0]  # sigma' = 0 at the last step, whatever eta


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_step_keeps_the_marginal(eta):
    """With a perfect network every x_{t-1} is (1 - s') x0 + s' noise again: mean and variance from many draws."""
    x0 = torch.full((20000, 1, 1, 1), 0.7)
    process = diffusion.Flow()
    noise = normal(tuple(x0.shape), "marginal noise")
    for t, prev_t in ((1000.0, 982.036), (500.0, 300.0), (60.0, 8.9)):
        x_t = process.add_noise(x0, noise, t)
        _, mean, std = process.step(x_t, noise - x0, t, prev_t, eta)
        drawn = mean + std.view(-1, 1, 1, 1) * normal(tuple(x0.shape), "marginal z", t)
        share = prev_t / 1000
        assert drawn.mean().item() == pytest.approx((1 - share) * 0.7, abs=0.03 * share + 1e-5)
        assert drawn.std().item() == pytest.approx(share, rel=0.02)
        assert std[0].item() == pytest.approx(share * math.sin(eta * math.pi / 2), rel=1e-5)


def test_flow_step_accepts_a_time_per_row():
    process, x, velocity = diffusion.Flow(), normal((3, 4, 2, 2), "x"), normal((3, 4, 2, 2), "v")
    t, prev_t = torch.tensor([1000.0, 500.0, 9.0]), torch.tensor([982.036, 300.0, -1.0])
    _, mean, std = process.step(x, velocity, t, prev_t, 0.5)
    for row in range(3):
        _, one, one_std = process.step(x[row:row + 1], velocity[row:row + 1], t[row].item(), prev_t[row].item(), 0.5)
        torch.testing.assert_close(mean[row:row + 1], one)
        torch.testing.assert_close(std[row:row + 1], one_std)
    assert torch.equal(process.step_std(t, prev_t, 0.5), std)


def test_flow_sensitivity_is_the_slope_of_the_mean():
    process, x = diffusion.Flow(), normal((1, 1, 1, 1), "x")
    velocity = normal((1, 1, 1, 1), "v").requires_grad_()
    for eta in (0.4, 1.0):
        _, mean, std = process.step(x, velocity, 600.0, 450.0, eta)
        (slope,) = torch.autograd.grad(mean.sum(), velocity)
        torch.testing.assert_close(process.step_sensitivity(600.0, 450.0, eta), slope.abs().reshape(1) / std)
