"""The closed-form start finds a planted direction, helps held-out pairs, and leaves alone what it cannot explain."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lpo.lrm_start import common_direction, fit_start

P, T, K, D = 120, 3, 12, 8


def planted(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features with a large mean and unequal spreads, the direction that decides, and the labels it gives."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 1, K)
    features = 5 * spread + spread * torch.randn(P, T, 2, K, generator=generator)
    features[:, :, :, 3] = 5 * spread[3] + spread[3] * torch.randn(P, 1, 2, generator=generator)  # the same at every t
    target = (features[:, 0, 0, 3] > features[:, 0, 1, 3]).float()
    return features, target, torch.ones(P)


def model() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(9)
    projection = nn.Linear(K, D, bias=False)
    projection.weight.data = torch.randn(D, K, generator=generator)
    return SimpleNamespace(visual_projection=projection, logit_scale=torch.tensor(2.66))


def accuracy(lrm: SimpleNamespace, features: torch.Tensor, text: torch.Tensor, target: torch.Tensor) -> float:
    scores = (F.normalize(lrm.visual_projection(features), dim=-1) * F.normalize(text, dim=-1)[:, None, None]).sum(-1)
    return ((scores[:, :, 0] > scores[:, :, 1]) == (target[:, None] > 0.5)).float().mean().item()


def test_the_direction_is_the_planted_one_and_blind_to_the_mean() -> None:
    features, target, weight = planted(0)
    direction = common_direction(features.double(), target.double(), weight.double(), 1.0)
    pulled = direction * features.flatten(0, 2).std(dim=0)  # in units of each feature's spread
    assert pulled[3] > 0.9 * pulled.norm()
    mean = features.flatten(0, 2).double().mean(dim=0)
    assert float(direction @ mean) == pytest.approx(0, abs=1e-6 * float(mean.norm()))
    assert float((features.double().flatten(0, 2) @ direction).std()) == pytest.approx(1)
    flipped = common_direction(features.flip(2).double(), target.double(), weight.double(), 1.0)
    assert torch.allclose(flipped, -direction)


def test_a_start_helps_pairs_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(3)
    text = 1 + 0.3 * torch.randn(P, D, generator=generator)
    features, target, weight = planted(0)
    fresh, fresh_target, _ = planted(1)
    lrm = model()
    before = accuracy(lrm, fresh, text, fresh_target)
    length = fit_start(lrm, features, text, target, weight, [f"prompt {k // 3}" for k in range(P)], 0)
    assert length > 0 and accuracy(lrm, fresh, text, fresh_target) > max(0.85, before)


def test_labels_by_lot_and_a_single_prompt_change_nothing() -> None:
    features, _, weight = planted(0)
    text = torch.ones(P, D)
    for target, prompts in ((torch.randint(2, (P,), generator=torch.Generator().manual_seed(5)).float(),
                             [str(k) for k in range(P)]), (planted(0)[1], ["one"] * P)):
        lrm = model()
        start = lrm.visual_projection.weight.detach().clone()
        assert fit_start(lrm, features, text, target, weight, prompts, 0) == 0
        assert torch.allclose(lrm.visual_projection.weight, start)
