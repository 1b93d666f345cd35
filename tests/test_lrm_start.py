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


def spread(lrm: SimpleNamespace, features: torch.Tensor, text: torch.Tensor) -> float:
    cosine = (F.normalize(lrm.visual_projection(features), dim=-1) * F.normalize(text, dim=-1)[:, None, None]).sum(-1)
    return float((lrm.logit_scale.exp() * (cosine[:, :, 0] - cosine[:, :, 1])).std().detach())


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
    _, length, _ = fit_start(lrm, features, text, target, weight, [f"prompt {k // 3}" for k in range(P)], 0)
    assert length > 0 and accuracy(lrm, fresh, text, fresh_target) > max(0.85, before)


def test_labels_by_lot_only_make_it_less_sure() -> None:
    features, _, weight = planted(0)
    target = torch.randint(2, (P,), generator=torch.Generator().manual_seed(5)).float()
    text, lrm = torch.ones(P, D), model()
    before = spread(lrm, features, text)
    _, length, _ = fit_start(lrm, features, text, target, weight, [str(k) for k in range(P)], 0)
    assert length == 0 and spread(lrm, features, text) < 0.5 * before


def test_one_prompt_cannot_be_cross_validated_and_changes_nothing() -> None:
    features, target, weight = planted(0)
    lrm = model()
    start = lrm.visual_projection.weight.detach().clone()
    assert fit_start(lrm, features, torch.ones(P, D), target, weight, ["one"] * P, 0) == (1, 0, 1)
    assert torch.allclose(lrm.visual_projection.weight, start)


def test_an_opinion_that_the_labels_contradict_is_muted() -> None:
    """The model's scores follow feature 0 and the labels feature 3 alone."""
    features, target, weight = planted(0)
    text = torch.ones(P, D)
    lrm = model()
    with torch.no_grad():
        lrm.visual_projection.weight.zero_()
        lrm.visual_projection.weight[:, 5] = 1.0  # a constant part, as real embeddings have
        lrm.visual_projection.weight[: D // 2, 0] = 200.0
    keep, length, _ = fit_start(lrm, features, text, target, weight, [str(k) for k in range(P)], 0)
    assert keep < 1 and length > 0
    fresh, fresh_target, _ = planted(1)
    assert accuracy(lrm, fresh, text, fresh_target) > 0.85
