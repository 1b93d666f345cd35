"""What a training step at full size needs is counted right, and the presets fit the cards that they are said to fit."""

import torch

from benchmarks import activations
from lpo.config import LPOConfig, LRMConfig, from_preset

GIB = 2**30


def test_what_is_alive_is_counted_to_the_byte():
    """Five layers relu(x w) with frozen weights: the backward pass needs every layer's output and nothing else."""
    with torch.device("meta"):
        weights = [torch.empty(1000, 1000) for _ in range(5)]
        x = torch.empty(100, 1000, requires_grad=True)
    one = 100 * 1000 * 4
    with activations.Alive(weights) as alive:
        assert alive.now == 5 * 1000 * 1000 * 4
        before, y = alive.now, x
        for weight in weights:
            y = torch.relu(y @ weight)
        assert alive.now - before == 5 * one
        assert alive.peak - before == 6 * one  # the last layer's product, before its relu
        y.sum().backward()
        del y
        assert alive.now - before == one  # x.grad


def test_attention_keeps_no_table_of_queries_by_keys():
    with torch.device("meta"):
        query = torch.empty(1, 2, 512, 8, requires_grad=True)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.0)

    table = 2 * 512 * 512 * 4 / GIB
    assert activations.peak([], attend) < table / 4


def test_every_pair_costs_the_same_and_checkpointing_less():
    found = activations.measure_size("tiny-sdxl")
    for name in ("LPO", "LRM, everything trained"):
        plain, checkpointed = found["steps"][name], found["steps"][name + ", checkpointing"]
        assert plain["stays"] == checkpointed["stays"] > 0
        assert 0 < checkpointed["pair"] < plain["pair"] / 2
    minibatch = found["minibatch"]
    assert minibatch["preset"] < minibatch["whole"] < minibatch["naive"]
    assert "naive" in activations.report({"tiny-sdxl": found})


def test_presets_of_sd15_fit_the_cards_that_they_name():
    lpo, lrm = activations.lpo_step("sd15", False), activations.lrm_step("sd15", False)
    assert from_preset(LPOConfig, "sd15", lrm="x", prompts="x").micro_batch_size <= activations.fits(lpo, 16)
    assert from_preset(LRMConfig, "sd15", pairs="x").micro_batch_size <= activations.fits(lrm, 24)
    assert activations.fits(lrm, 80) < 128  # so the published batch needs its micro-batches
    assert activations.fits(lpo, 1) == 0
