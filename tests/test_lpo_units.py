"""Losses, Gaussian steps, pair choice and roll-out against independent oracles."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from lpo import diffusion
from lpo.backbones import load_policy, transitions
from lpo.backbones.latent_space import difference
from lpo.config import Adapter, ConfigError, LPOConfig, Policy
from lpo.losses import lpo_loss, pair_loss
from lpo.reward_model import LatentRewardModel
from lpo.rng import integers, key_seed, normal, permutation
from lpo.rollout import plan, rollout, sibling_noise
from lpo.run_dir import Run
from lpo.selection import choose_pair, thresholds

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")


@pytest.fixture(scope="module")
def policy():
    return load_policy(Policy(BASE), "cpu")


@pytest.fixture(scope="module")
def lrm():
    return LatentRewardModel.from_pretrained(GOLDEN / "lrm_sd15", base=BASE, device="cpu")


def config(**changes) -> LPOConfig:
    return replace(LPOConfig(policy=Policy(BASE), prompts="unused", steps=4, device="cpu"), **changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_diffusers_own(prediction_type, eta):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    x, prediction, z = (normal((2, 4, 8, 8), "oracle", name) for name in ("x", "p", "z"))
    alphas = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.reshape(1)])
    for t, prev_t in transitions(scheduler.timesteps.tolist()):
        expected = scheduler.step(prediction, t, x, eta=eta, variance_noise=z if eta else None)
        a, a_prev = (diffusion.gather(alphas, i, 2) for i in (t, prev_t))
        x0, mean, std = diffusion.ddim_step(x, prediction, a, a_prev, eta, prediction_type)
        torch.testing.assert_close(mean + std.view(-1, 1, 1, 1) * z, expected.prev_sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x0, expected.pred_original_sample, atol=1e-4, rtol=1e-5)


def test_log_prob_is_the_normal_distribution():
    x, mean, std = normal((3, 4, 2, 2), "x"), normal((3, 4, 2, 2), "m"), torch.tensor([0.1, 1.0, 2.0])
    expected = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(diffusion.log_prob(x, mean, std), expected)


def test_sensitivity_is_the_slope_of_the_mean():
    alpha, alpha_prev = torch.tensor([0.5]), torch.tensor([0.7])
    x, e = normal((1, 1, 1, 1), "x"), normal((1, 1, 1, 1), "e").requires_grad_()
    _, mean, std = diffusion.ddim_step(x, e, alpha, alpha_prev, 1.0, "epsilon")
    (slope,) = torch.autograd.grad(mean.sum(), e)
    torch.testing.assert_close(diffusion.sensitivity(alpha, alpha_prev, 1.0), slope.abs().reshape(1) / std)


def test_pair_loss():
    first, second = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    p = torch.softmax(torch.stack([first, second]), 0)[0]
    hard = torch.tensor([1.0, 0.0, 1.0])
    expected = torch.nn.functional.binary_cross_entropy(p, hard)
    torch.testing.assert_close(pair_loss(first, second, hard), expected)
    tie = pair_loss(first[2:], second[2:], torch.tensor([0.5]))
    assert tie.item() == pytest.approx(0.0, abs=1e-6)  # equal scores on a tie: nothing to learn, log 2 subtracted
    weights = torch.tensor([1.0, 0.0, 0.0])
    assert pair_loss(first, second, hard, weights).item() == pytest.approx(-math.log(p[0]), rel=1e-5)


def test_lpo_loss_clamps_and_is_antisymmetric():
    w, lo = torch.tensor([0.01, 0.5, -0.5]), torch.tensor([-0.01, -0.5, 0.5])
    terms, swapped = lpo_loss(w, lo, 10.0, 0.1), lpo_loss(lo, w, 10.0, 0.1)
    torch.testing.assert_close(terms.margin, -swapped.margin)
    assert terms.margin[1].item() == pytest.approx(math.log(1.1) - math.log(0.9))
    assert terms.clamped_winner.tolist() == [False, True, True]
    assert lpo_loss(w, lo, 10.0, 0.0).margin[1].item() == pytest.approx(1.0)
    zero = torch.zeros(3, requires_grad=True)
    loss = lpo_loss(zero, torch.zeros(3), 500.0, 0.1).loss
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))


def test_large_margins_stay_finite():
    far = torch.tensor([50.0], requires_grad=True)
    loss = lpo_loss(-far, far, 1e4, 0.0).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad)


def test_thresholds_span_the_noisy_steps():
    t, std = torch.tensor([900, 500, 100, 1]), torch.tensor([0.6, 0.4, 0.2, 0.0])
    for kind in ("linear", "variance", "sigma"):
        limits = thresholds(kind, 0.3, 0.5, t, std).tolist()
        assert limits[0] == pytest.approx(0.5) and limits[2] == pytest.approx(0.3) and limits[3] == pytest.approx(0.3)
        assert limits[0] > limits[1] > limits[2]
    assert thresholds("none", 0.3, 0.5, t, std).tolist() == pytest.approx([0.3] * 4)


def test_choice_is_the_extremes_and_tanh_of_half_the_gap():
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.1], [2.0, 0.05]])
    choice = choose_pair(scores, torch.tensor([0.5, 0.5]))
    assert choice.winner.tolist() == [1, 1] and choice.loser.tolist() == [0, 0]
    assert choice.gap.tolist() == pytest.approx([math.tanh(1.0), math.tanh(0.05)], rel=1e-5)
    assert choice.kept.tolist() == [True, False]


def test_random_keys():
    assert torch.equal(normal((3,), 1, "a"), normal((3,), 1, "a"))
    assert key_seed("a", 1) != key_seed("a", "1") != key_seed("a1")
    assert not torch.equal(normal((3,), 1, "a"), normal((3,), 2, "a"))
    assert sorted(permutation(10, 0)) == list(range(10))
    assert set(integers(4, (200,), 3).tolist()) == {0, 1, 2, 3}


def test_antithetic_siblings_mirror():
    noise = sibling_noise(config(antithetic=True), 0, [0, 1], 2, (4, 2, 2))
    assert noise.shape == (4, 2, 4, 2, 2)
    assert torch.equal(noise[:2], -noise[2:])


def test_roll_out_ends_with_the_last_useful_step(policy):
    assert [t for t, *_ in plan(policy, config())] == [751, 501, 251, 1]
    window = plan(policy, config(t_min=400, t_max=600))
    assert [(t, branched) for t, _, branched, _ in window] == [(751, False), (501, True)]


def test_a_step_without_noise_is_never_branched():
    policy = load_policy(Policy(BASE), "cpu")
    policy.process.alphas[-1] = 1.0  # as with set_alpha_to_one: the last step then has std 0
    assert [t for t, *_ in plan(policy, config())] == [751, 501, 251]


@pytest.mark.parametrize("changes", [{}, {"antithetic": True}, {"t_min": 400}, {"score_timestep": "parent"}])
def test_roll_out_does_not_depend_on_the_batch(policy, lrm, changes):
    cfg = config(threshold_min=0.0, threshold_max=0.0, **changes)
    prompts = ["the cat", "and then", "on"]
    steps = plan(policy, cfg)

    def run(some, first):
        conditioning = policy.encode_prompts(some)
        return [b for b in rollout(policy, lrm, some, conditioning, cfg, 5, steps, first) if b is not None]

    together, apart = run(prompts, 0), [run([p], i) for i, p in enumerate(prompts)]
    for index, branching in enumerate(together):
        alone = torch.cat([a[index].scores for a in apart], dim=1)
        torch.testing.assert_close(branching.scores, alone, atol=2e-4, rtol=1e-4)
        assert branching.scores.shape == (4, 3)
        for pair in branching.pairs:
            assert pair.x_t.shape == pair.winner.shape == (4, 16, 16)


def test_fresh_adapter_is_the_reference_exactly():
    policy = load_policy(Policy(BASE), "cpu")
    conditioning = policy.encode_prompts(["the cat"])
    x = normal((1, 4, 16, 16), "x")
    with torch.no_grad():
        plain = policy.predict(x, 501, conditioning, 5.0)
        policy.add_trainable_adapter(4, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
        fresh = policy.predict(x, 501, conditioning, 5.0)
        for weight in policy.trainable_parameters().values():
            weight += 0.1
        moved = policy.predict(x, 501, conditioning, 5.0)
        with policy.reference():
            reference = policy.predict(x, 501, conditioning, 5.0)
        again = policy.predict(x, 501, conditioning, 5.0)
    assert torch.equal(plain, fresh) and torch.equal(plain, reference) and torch.equal(moved, again)
    assert not torch.allclose(moved, plain)


def test_features_are_the_full_forwards_own(policy):
    """Early exit: hooks on the stock forward see the same features."""
    seen = {}
    hooks = [
        policy.unet.mid_block.register_forward_hook(lambda m, a, out: seen.update(mid=out)),
        *(
            block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[1]}))
            for i, block in enumerate(policy.unet.down_blocks)
        ),
    ]
    conditioning, x = policy.encode_prompts(["the cat", "on"]), normal((2, 4, 16, 16), "x")
    with torch.no_grad():
        policy.unet(x, 501, conditioning.text)
        full = dict(seen)
        for hook in hooks:
            hook.remove()
        features = policy.features(x, 501, conditioning)
    torch.testing.assert_close(features.mid, full["mid"].mean(dim=(2, 3)), atol=1e-6, rtol=1e-5)
    for i, level in enumerate(features.down):
        skip = full[i][-1 if i == 3 else -2]
        torch.testing.assert_close(level, skip.mean(dim=(2, 3)), atol=1e-6, rtol=1e-5)


def test_an_unsuitable_adapter_is_refused_and_does_no_harm(tmp_path):
    good = load_file(GOLDEN / "lora_m1" / "pytorch_lora_weights.safetensors")
    save_file({k: torch.zeros(v.shape[0] + 3, v.shape[1] + 3) for k, v in good.items()}, tmp_path / "big.safetensors")
    save_file({"text_encoder.x.lora.up.weight": torch.zeros(2, 2)}, tmp_path / "text.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    policy = load_policy(Policy(BASE), "cpu")
    conditioning, x = policy.encode_prompts(["the cat"]), normal((1, 4, 16, 16), "x")
    with torch.no_grad():
        before = policy.predict(x, 501, conditioning, 1.0)
        for name in ("big", "text", "broken"):
            with pytest.raises(ConfigError):
                policy.set_adapters([Adapter(str(tmp_path / f"{name}.safetensors"))])
        policy.set_adapters([])
        assert torch.equal(policy.predict(x, 501, conditioning, 1.0), before)
        policy.set_adapters([Adapter(str(GOLDEN / "lora_m1"))])
        moved = policy.predict(x, 501, conditioning, 1.0)
        with pytest.raises(ConfigError, match="twice"):
            policy.set_adapters([Adapter(str(GOLDEN / "lora_m1"))] * 2)
    assert not torch.allclose(moved, before)


def test_latent_spaces_are_told_apart(policy):
    own = policy.fingerprint()
    slightly = {**own, "encoder_means": [v + 0.01 for v in own["encoder_means"]]}  # another precision, or an fp16 fix
    assert difference(own, slightly) is None
    assert "VAE" in difference(own, {**own, "encoder_means": [-v for v in own["encoder_means"]]})
    assert "scale" in difference(own, {**own, "scaling_factor": 0.13025})
    assert "channels" in difference(own, {**own, "channels": 16})
    assert "noise schedule" in difference(own, {**own, "alphas_cumprod": [0.9, 0.5, 0.2, 0.1, 0.0]})


def test_a_run_folder_survives_a_cut_line(tmp_path):
    run = Run.create(tmp_path / "run", {"a": 1})
    for step in (1, 2, 3):
        run.record({"step": step, "total": 4})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tot')
    with pytest.raises(ConfigError, match="--resume"):
        Run.create(tmp_path / "run", {})
    again, settings = Run.resume(tmp_path / "run")
    again.rewind(2)
    row = again.record({"step": 3, "total": 4})
    steps = [line.split(",")[0] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert settings == {"a": 1} and row["left_s"] >= 0 and steps == ['{"step": 1', '{"step": 2', '{"step": 3']
    again.finish({})
    with pytest.raises(ConfigError, match="finished"):
        Run.resume(tmp_path / "run")
