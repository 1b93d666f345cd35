"""Checkpoints of one .safetensors file in the original layout: the same as their folder, with the configuration files
beside them; and one sentence where those are missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from original_layout import write_single_file
from safetensors.torch import save_file

from lpo.backbones import base_fingerprint, load_policy
from lpo.backbones.source import pipeline_class
from lpo.config import ConfigError, Policy
from lpo.lrm_files import export_official
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal


def configuration_beside(base: str, file: Path) -> None:
    """The small files of a diffusers folder, without its weights, where a single file looks for them."""
    for found in Path(base).rglob("*"):
        if found.suffix in (".json", ".txt"):
            target = file.with_suffix("") / found.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, target)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: (diffusers folder, single file)}"""
    folder = tmp_path_factory.mktemp("single")
    bases = {"sd": str(tiny_models.GOLDEN / "tiny_sd15"), "sdxl": tiny_models.write_sdxl(folder / "tiny_sdxl")}
    found = {}
    for kind, base in bases.items():
        found[kind] = base, write_single_file(base, folder / f"{kind}.safetensors")
        configuration_beside(*found[kind])
    return found


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_is_its_folder(files, kind):
    base, file = files[kind]
    whole, single = (load_policy(Policy(str(path)), "cpu") for path in (base, file))
    assert pipeline_class(str(file)) == single.pipeline and single.timesteps(7) == whole.timesteps(7)
    for name in single.kinds:
        ours, theirs = getattr(single, name, None), getattr(whole, name, None)
        if isinstance(ours, torch.nn.Module):
            a, b = ours.state_dict(), theirs.state_dict()
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    conditioning = single.encode_prompts(["the cat"], "on")
    x = normal((1, 4, 16, 16), "x")
    with torch.no_grad():
        expected = whole.predict(x, 501, whole.encode_prompts(["the cat"], "on"), 5.0)
        # not to the last digit: that depends on where in memory a file's weights begin
        torch.testing.assert_close(single.predict(x, 501, conditioning, 5.0), expected, rtol=1e-5, atol=1e-5)
    assert base_fingerprint(str(file)) == whole.fingerprint()


def test_an_official_lrm_takes_a_single_file_as_its_base(files, tmp_path):
    base, file = files["sdxl"]
    tiny_models.write_official_sdxl_lrm(tmp_path / "lrm", base)
    x, prompts = normal((2, 4, 16, 16), "x"), ["the cat", ""]
    one, other = (LatentRewardModel.from_pretrained(tmp_path / "lrm", str(b), "cpu") for b in (base, file))
    with torch.no_grad():
        expected = one.score(x, 501, prompts)
        assert torch.equal(other.score(x, 501, prompts), expected)
    export_official(other, tmp_path / "export", str(file))  # up blocks from the single file
    again = LatentRewardModel.from_pretrained(tmp_path / "export", str(file), "cpu")
    with torch.no_grad():
        assert torch.equal(again.score(x, 501, prompts), expected)


def test_missing_configuration_is_one_sentence_offline(files, tmp_path):
    """In a process of its own: HF_HUB_OFFLINE is read when huggingface_hub is imported."""
    _, file = files["sdxl"]
    shutil.copy(file, tmp_path / "alone.safetensors")
    command = [sys.executable, "-m", "lpo", "sample", "--base", str(tmp_path / "alone.safetensors"), "--prompts", "x",
               "--device", "cpu", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "stabilityai/stable-diffusion-xl-base-1.0" in done.stderr and str(tmp_path / "alone") in done.stderr
    command[5], command[-1] = "someone/some-model", str(tmp_path / "run2")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "HF_HUB_OFFLINE" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_other_files_are_refused_in_one_sentence(files, tmp_path):
    save_file({"unet.x.lora.up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="LoRA files go into adapters"):
        load_policy(Policy(str(tmp_path / "lora.safetensors")), "cpu")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(ConfigError, match="not a readable"):
        load_policy(Policy(str(tmp_path / "broken.safetensors")), "cpu")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="other single-file checkpoints"):
        load_policy(Policy(str(tmp_path / "old.ckpt")), "cpu")
    shutil.copy(files["sdxl"][1], tmp_path / "mixed.safetensors")
    configuration_beside(files["sd"][0], tmp_path / "mixed.safetensors")  # another family's configuration
    with pytest.raises(ConfigError, match="could not be loaded as StableDiffusionXLPipeline"):
        load_policy(Policy(str(tmp_path / "mixed.safetensors")), "cpu")
