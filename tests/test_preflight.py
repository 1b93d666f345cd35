"""What the button refuses before a job is queued, without torch; what it cannot know is left to the training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file

from app import jobs, pairs
from lpo import preflight
from lpo.backbones.source import pipeline_class
from lpo.config import Adapter, ConfigError, LPOConfig, LRMConfig, Policy, from_preset, to_dict
from lpo.places import PROJECTION, tensor_shapes
from lpo.preflight import family, fits, require_startable

GOLDEN = Path(__file__).parent / "data" / "golden"
SD15, LRM15 = GOLDEN / "tiny_sd15", GOLDEN / "lrm_sd15"
SCENES_LRM = Path(preflight.__file__).parent / "scenes" / "weights" / "lrm"


def bare(**changes) -> LRMConfig:
    return LRMConfig(**{"base": str(SD15), "init": "base", **changes})


def clip(folder: Path, rows: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PROJECTION: torch.zeros(rows, 32)}, folder / "model.safetensors")
    return folder


def test_a_header_tells_what_the_library_tells():
    file = SD15 / "text_encoder" / "model.safetensors"
    with safe_open(str(file), "pt") as opened:
        assert tensor_shapes(file) == {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("header", ["[" * 10_000, '{"x": {"shape": [1], "data_offsets": [0]}}', '{"x": 1}', "[1]"])
def test_a_header_of_nonsense_is_one_sentence(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ConfigError, match="not a readable"):
        tensor_shapes(tmp_path / "x.safetensors")


def test_a_missing_text_projection_is_asked_for_at_the_button(lab, tmp_path):
    with pytest.raises(ConfigError, match=r"does not hold CLIP's text projection.*set text_projection to"):
        jobs.submit(lab, "train-lrm", to_dict(bare()), lab.current_study().id)
    assert jobs.list_jobs(lab) == []
    require_startable(bare(text_projection="identity"))
    require_startable(bare(text_projection=str(clip(tmp_path / "clip"))))
    require_startable(bare(text_projection=str(tmp_path / "clip" / "model.safetensors")))
    require_startable(bare(text_projection="openai/not-fetched-yet"))
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty").mkdir()
    for place, words in {
        "damaged.safetensors": "not a readable",
        "empty": "holds no safetensors file",
        "nowhere": "There is nothing at",
    }.items():
        with pytest.raises(ConfigError, match=words):
            require_startable(bare(text_projection=str(tmp_path / place)))
    with pytest.raises(ConfigError, match=r"is \(16, 32\), but \(32, 32\) is needed"):
        require_startable(bare(text_projection=str(clip(tmp_path / "narrow", 16))))
    require_startable(bare(text_projection=str(tmp_path / "narrow"), projection_dim=16))


def test_a_base_that_holds_it_or_needs_none_is_let_through(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(SD15, base)
    clip(base / "text_encoder")
    require_startable(bare(base=str(base)))
    (base / "text_encoder" / "model.safetensors").unlink()
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    require_startable(bare(base=str(base)))
    with pytest.raises(ConfigError, match="leave text_projection empty"):
        require_startable(bare(base=str(base), text_projection=str(clip(tmp_path / "clip"))))


# a tensor that the published files have, their family and pipeline
ORIGINAL = {
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": ("sd15", "StableDiffusionPipeline"),
    "cond_stage_model.model.ln_final.weight": ("sd21", "StableDiffusionPipeline"),
    "conditioner.embedders.1.model.ln_final.weight": ("sdxl", "StableDiffusionXLPipeline"),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": ("sd3", "StableDiffusion3Pipeline"),
}


@pytest.mark.parametrize(("tensor", "known"), ORIGINAL.items())
def test_one_file_in_the_original_layout(tensor, known, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"first_stage_model.encoder.conv_in.bias": torch.zeros(2), tensor: torch.zeros(3)}, file)
    assert (family(str(file)), pipeline_class(str(file))) == known  # the button and the training say the same
    if known[1] == "StableDiffusionPipeline":
        with pytest.raises(ConfigError, match="does not hold CLIP's"):
            require_startable(bare(base=str(file)))
        require_startable(bare(base=str(file), text_projection="identity"))
    else:
        require_startable(bare(base=str(file)))
    file.write_bytes(file.read_bytes()[:-1])  # a download that was cut short
    for ask in (pipeline_class, lambda base: require_startable(bare(base=base))):
        with pytest.raises(ConfigError, match="not a readable"):
            ask(str(file))


@pytest.mark.parametrize("tensor", ["unet.x.lora.up.weight", "conditioner.embedders.0.model.ln_final.weight"])
def test_one_file_that_is_no_whole_model_is_refused_at_the_button_too(tensor, tmp_path):
    """A LoRA, SDXL's refiner."""
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for ask in (pipeline_class, lambda base: require_startable(bare(base=base))):
        with pytest.raises(ConfigError, match="is no whole Stable Diffusion checkpoint"):
            ask(str(tmp_path / "other.safetensors"))


def test_a_base_of_the_hub_is_judged_by_what_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    require_startable(bare(base="owner/name"))
    require_startable(bare(base="not a/hub id"))
    (tmp_path / "models--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    shutil.copytree(SD15, tmp_path / "models--owner--name" / "snapshots" / "abc")
    with pytest.raises(ConfigError, match="owner/name does not hold"):
        require_startable(bare(base="owner/name"))
    with pytest.raises(ConfigError, match="another scale"):
        require_startable(LPOConfig(policy=Policy("owner/name"), lrm="scenes"))


def test_an_lrm_of_another_space_is_refused_unless_allowed(tmp_path):
    shutil.copytree(SCENES_LRM, tmp_path / "lrm")
    about = json.loads((tmp_path / "lrm" / "lrm.json").read_text())
    words = r"does not share the latent space of .* \(another scale\)"
    for config in (
        LRMConfig(base=str(SD15), init=str(tmp_path / "lrm")),
        LPOConfig(policy=Policy(str(SD15)), lrm="scenes"),
        LPOConfig(policy=Policy("scenes"), lrm=f"{LRM15}@{SD15}"),
    ):
        with pytest.raises(ConfigError, match=words):
            require_startable(config)
    require_startable(LPOConfig(policy=Policy(str(SD15)), lrm="scenes", allow_latent_mismatch=True))
    require_startable(LPOConfig(policy=Policy(str(SD15)), lrm=str(LRM15)))
    require_startable(LRMConfig())
    about["fingerprint"]["channels"] = 16
    (tmp_path / "lrm" / "lrm.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="16 against 4 latent channels"):
        require_startable(LRMConfig(init=str(tmp_path / "lrm")))
    for damaged in ("{", "[]", '{"fingerprint": 4}', '{"fingerprint": {"channels": "many"}}'):
        (tmp_path / "lrm" / "lrm.json").write_text(damaged)
        require_startable(LRMConfig(init=str(tmp_path / "lrm")))  # the training says that it is damaged


def test_what_is_not_there_is_said_at_once(lab, tmp_path):
    for config, words in (
        (LRMConfig(base="/nowhere"), "There is no model at /nowhere"),
        (LRMConfig(init="/nowhere"), "/nowhere is not an LRM folder"),
        (LPOConfig(lrm=f"{tmp_path}@scenes"), "is not an LRM folder"),
        (LPOConfig(policy=Policy(adapters=(Adapter("/nowhere"),))), "There is no adapter at /nowhere"),
        (LPOConfig(policy=Policy(unet="/nowhere")), "There is no UNet at /nowhere"),
    ):
        with pytest.raises(ConfigError, match=words):
            require_startable(config)
    with pytest.raises(ConfigError, match="is not a diffusers model folder"):
        pairs.new_study(lab, "A", str(tmp_path), "Which?", "a cat", None)


def test_a_window_without_a_timestep_never_becomes_a_job():
    with pytest.raises(ConfigError, match="No timestep of the grid of 2 lies between"):
        LRMConfig(timesteps=2, t_min=10, t_max=400)
    assert LRMConfig(timesteps=2, t_min=10, t_max=501).grid() == [501]


def test_a_base_is_of_the_family_that_its_files_say(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base, index = tmp_path / "sd3-of-my-own", {"_class_name": "StableDiffusionXLPipeline"}
    shutil.copytree(SD15, base)
    assert (family("scenes"), family(str(SD15)), family(str(base))) == ("scenes", "sd15", "sd15")
    text = base / "text_encoder" / "config.json"
    text.write_text(text.read_text().replace('"hidden_size": 32', '"hidden_size": 1024'))
    assert family(str(base)) == "sd21"
    (base / "model_index.json").write_text(json.dumps(index))
    assert family(str(base)) == "sdxl"
    shutil.move(base, tmp_path / "hub" / "models--owner--sd15" / "snapshots" / "abc")
    (tmp_path / "hub" / "models--owner--sd15" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--sd15" / "refs" / "main").write_text("abc")
    assert family("owner/sd15") == "sdxl"


@pytest.mark.parametrize("command", [LRMConfig, LPOConfig])
def test_a_base_that_is_not_here_is_judged_by_its_name(command, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for preset in ("scenes", "sd15", "sd21", "sdxl", "sd3"):
        config = from_preset(command, preset)
        assert family(config.base if command is LRMConfig else config.policy.base) == preset
    assert family("/models/sd3.5-medium") == "sd3" and family("/gone") == "sd15"


def test_an_lrm_is_offered_where_its_latent_space_is_the_same(tmp_path):
    assert fits("scenes", "scenes") and fits(str(LRM15), str(SD15)) and not fits("scenes", str(SD15))
    assert fits(str(tmp_path / "gone"), "scenes")  # and refused when it is chosen
