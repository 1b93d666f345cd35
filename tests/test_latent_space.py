"""Which model's latents may an LRM judge? Fingerprints, another architecture of the same space, refusals, overrides."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from lpo.__main__ import main
from lpo.backbones import base_fingerprint, load_policy, use_adapters
from lpo.backbones.latent_space import difference
from lpo.config import Adapter, ConfigError, Policy
from lpo.lrm_files import latent_space
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal

GOLDEN = Path(__file__).parent / "data" / "golden"
SD15, LRM15 = str(GOLDEN / "tiny_sd15"), str(GOLDEN / "lrm_sd15")


def fp16_fix(seed: int = 4):
    """The same VAE with smaller numbers inside, as sdxl-vae-fp16-fix: outputs agree but for a small error."""
    own = tiny_models.vae(seed, scaling_factor=0.13025, force_upcast=False)
    with torch.no_grad():
        own.encoder.conv_out.weight /= 8
        own.encoder.conv_out.bias /= 8
        own.quant_conv.weight *= 8
        for name, parameter in sorted(own.encoder.named_parameters()):
            parameter += 0.01 * parameter.abs() * normal(tuple(parameter.shape), "finetuned", name)
    return own


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces")
    tiny_models.write_sdxl(folder / "sdxl")
    tiny_models.with_vae(str(folder / "sdxl"), folder / "fixed", fp16_fix())
    other = tiny_models.vae(40, scaling_factor=0.13025)
    tiny_models.with_vae(str(folder / "sdxl"), folder / "other", other)
    tiny_models.write_sd21(folder / "sd21")
    shutil.rmtree(folder / "sd21" / "vae")  # SD2.1 has SD1.5's latents
    shutil.copytree(GOLDEN / "tiny_sd15" / "vae", folder / "sd21" / "vae")
    LatentRewardModel.from_base(str(folder / "sdxl"), device="cpu").save(folder / "lrm")
    return folder


def test_a_fingerprint_needs_no_network(bases):
    for name in ("sdxl", "sd21"):
        policy = load_policy(Policy(str(bases / name)), "cpu")
        assert base_fingerprint(str(bases / name)) == policy.fingerprint()


def test_an_internally_rescaled_vae_is_the_same_and_another_is_not(bases):
    spaces = {name: base_fingerprint(str(bases / name)) for name in ("sdxl", "fixed", "other", "sd21")}
    means = torch.tensor([spaces[name]["encoder_means"] for name in ("sdxl", "fixed", "other")])
    assert float((means[0] - means[1]).square().mean().sqrt()) > 1e-4
    assert difference(spaces["sdxl"], spaces["fixed"]) is None
    assert difference(spaces["sdxl"], spaces["other"]) == "another VAE"
    assert difference(spaces["sdxl"], spaces["sd21"]) == "another scale"


def test_half_precision_gives_the_same_fingerprint_within_tolerance(bases):
    half = load_policy(Policy(str(bases / "sdxl")), "cpu", "bfloat16").fingerprint()
    assert difference(half, base_fingerprint(str(bases / "sdxl"))) is None


def train_lpo(folder, base, lrm, name, *extra) -> int:
    (folder / "p.json").write_text(json.dumps(["the cat", "on the hill"]))
    return main(["train-lpo", "--base", str(base), "--lrm", str(lrm), "--prompts", str(folder / "p.json"), "--device",
                 "cpu", "--iterations", "1", "--steps", "3", "--prompts_per_iteration", "1", "--siblings", "2",
                 "--threshold_min", "0", "--threshold_max", "0", "--run-dir", str(folder / name), *extra])  # fmt: skip


def test_an_sd21_policy_learns_from_an_sd15_lrm(bases, tmp_path, capsys):
    """As in the paper: another UNet, text encoder and prediction type, the same latents."""
    assert train_lpo(tmp_path, bases / "sd21", LRM15, "wrong") == 2
    assert f"{LRM15}@BASE" in capsys.readouterr().err  # its tokenizer would have been SD2.1's
    assert train_lpo(tmp_path, bases / "sd21", f"{LRM15}@{SD15}", "right") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "right" / "metrics.jsonl").read_text().splitlines()]
    assert row["pairs"] > 0
    info = json.loads((tmp_path / "right" / "checkpoints" / "final" / "adapter.json").read_text())
    assert difference(info["fingerprint"], base_fingerprint(SD15)) is None
    # and its rewards are the SD1.5 LRM's own, tokens and all
    named = LatentRewardModel.from_pretrained(f"{LRM15}@{SD15}", base=str(bases / "sd21"), device="cpu")
    plain = LatentRewardModel.from_pretrained(LRM15, base=SD15, device="cpu")
    x = normal((2, 4, 16, 16), "x")
    with torch.no_grad():
        assert torch.equal(named.score(x, 501, ["the cat", ""]), plain.score(x, 501, ["the cat", ""]))
    assert latent_space(named, str(bases / "sd21")) == base_fingerprint(SD15)


def test_a_mismatch_is_refused_unless_it_is_allowed(bases, tmp_path, capsys):
    """In train-lpo, trace, score, train-lrm and for adapters."""
    own = str(bases / "lrm")
    allow = ["--allow_latent_mismatch", "true"]
    assert train_lpo(tmp_path, bases / "fixed", own, "fixed") == 0  # the fp16 fix passes as SDXL's own
    assert train_lpo(tmp_path, bases / "other", own, "lpo") == 2
    error = capsys.readouterr().err
    assert "does not share the latent space" in error and "allow_latent_mismatch" in error and error.count("\n") == 1
    assert train_lpo(tmp_path, bases / "other", own, "lpo2", *allow) == 0
    trace = ["trace", "--base", str(bases / "other"), "--lrm", own, "--prompt", "the cat", "--steps", "2", "--device",
             "cpu", "--run-dir"]  # fmt: skip
    assert main([*trace, str(tmp_path / "trace")]) == 2
    assert main([*trace, str(tmp_path / "trace2"), *allow]) == 0

    save_file({"latents": normal((2, 4, 16, 16), "x"), "timesteps": torch.tensor([1, 501])}, tmp_path / "x.safetensors")
    (tmp_path / "two.json").write_text(json.dumps(["the cat", ""]))
    score = ["score", "--lrm", own, "--latents", str(tmp_path / "x.safetensors"), "--prompts",
             str(tmp_path / "two.json"), "--out", str(tmp_path / "out.json"), "--base"]  # fmt: skip
    assert main([*score, str(bases / "fixed")]) == 0
    assert main([*score, str(bases / "other")]) == 2
    assert main([*score, str(bases / "other"), "--allow_latent_mismatch"]) == 0

    adapter = Adapter(str(tmp_path / "fixed" / "checkpoints" / "final"))
    policy = load_policy(Policy(str(bases / "sdxl"), (adapter,)), "cpu")
    other = load_policy(Policy(str(bases / "other")), "cpu")
    with pytest.raises(ConfigError, match="was not trained in the latent space"):
        use_adapters(other, [adapter])
    use_adapters(other, [adapter], allow_latent_mismatch=True)
    assert policy.policy.adapters == other.policy.adapters
    sample = ["sample", "--base", str(bases / "other"), "--adapters", adapter.path, "--prompts", "the cat", "--steps",
              "1", "--device", "cpu", "--run-dir"]  # fmt: skip
    assert main([*sample, str(tmp_path / "sample")]) == 2
    assert main([*sample, str(tmp_path / "sample2"), *allow]) == 0


def test_an_lrm_of_another_space_trains_on_only_if_allowed(bases, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(write_pairs(tmp_path))
    command = ["train-lrm", "--base", str(bases / "other"), "--init", str(bases / "lrm"), "--pairs",
               str(tmp_path / "pairs.jsonl"), "--steps", "1", "--batch_size", "2", "--device", "cpu",
               "--fit_start", "false", "--run-dir"]  # fmt: skip
    assert main([*command, str(tmp_path / "a")]) == 2
    assert "does not share the latent space" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b"), "--allow_latent_mismatch", "true"]) == 0


def write_pairs(folder: Path, count: int = 4) -> str:
    """Labelled pairs of plain colours, as the lines of a pairs file; one prompt is held out."""
    from PIL import Image

    lines = []
    for i in range(count):
        for side in ("first", "second"):
            Image.new("RGB", (128, 128), (60 * i, 200 if side == "first" else 20, 90)).save(folder / f"{side}{i}.png")
        split = "heldout" if i == 3 else "train"
        lines.append({"id": str(i), "prompt": ["the", "cat", "on", "hill"][i % 4], "first": f"first{i}.png",
                      "second": f"second{i}.png", "target": 1.0, "split": split})  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)
