"""The text projection that an LRM from a bare base starts with: found where it is, asked for where it is not."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import text_encoder, write_sdxl
from transformers import CLIPTextModelWithProjection

from lpo.backbones import clip_projection, load_policy
from lpo.config import ConfigError, LRMConfig, Policy, from_preset
from lpo.lrm_init import start_lrm

BASE = Path(__file__).parent / "data" / "golden" / "tiny_sd15"


def started(**changes) -> torch.Tensor | None:
    """The text projection of the LRM that a training from the base would start with."""
    config = LRMConfig(**{"base": str(BASE), "init": "base", "device": "cpu", **changes})
    lrm = start_lrm(config, load_policy(Policy(config.base), "cpu"))
    return None if lrm.text_projection is None else lrm.text_projection.weight


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A CLIP folder as the base's own would be, and its projection."""
    folder = tmp_path_factory.mktemp("clip")
    model = text_encoder(CLIPTextModelWithProjection, 3, 32)
    model.save_pretrained(folder)
    return folder, model.text_projection.weight.detach()


def test_a_folder_a_file_and_a_hub_id_give_clips(clip, monkeypatch):
    folder, weight = clip
    for place in (folder, folder / "model.safetensors"):
        assert torch.equal(started(text_projection=str(place)), weight)
    asked = []

    def fetched(hub_id, name):
        asked.append((hub_id, name))
        return str(folder / name)

    monkeypatch.setattr(clip_projection, "hf_hub_download", fetched)
    assert torch.equal(started(text_projection="openai/clip"), weight)
    assert asked == [("openai/clip", "model.safetensors")]


def test_a_base_that_holds_one_needs_no_path(clip, tmp_path, monkeypatch):
    (tmp_path / "text_encoder").mkdir()
    save_file(load_file(clip[0] / "model.safetensors"), tmp_path / "text_encoder" / "model.fp16.safetensors")
    assert torch.equal(clip_projection.own_projection(str(tmp_path)), clip[1])
    monkeypatch.setattr(clip_projection, "hf_hub_download", lambda hub_id, name: str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="not a readable"):
        clip_projection.own_projection("owner/name")

    def missing(hub_id, name):
        raise EntryNotFoundError(name)

    monkeypatch.setattr(clip_projection, "hf_hub_download", missing)
    assert clip_projection.own_projection("owner/name") is None
    assert clip_projection.read_projection("owner/name") is None

    def offline(hub_id, name):
        raise LocalEntryNotFoundError(name)

    monkeypatch.setattr(clip_projection, "hf_hub_download", offline)
    with pytest.raises(ConfigError, match="could not be fetched nor found on disk"):
        clip_projection.read_projection("owner/name")


def test_without_one_a_path_is_asked_for(clip, tmp_path):
    with pytest.raises(
        ConfigError, match=r"does not hold CLIP's text projection.*set text_projection to"
    ):
        started()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused = {
        str(tmp_path / "empty"): "holds no safetensors file",
        str(tmp_path / "text.safetensors"): "not a readable",
        str(tmp_path / "nowhere"): "There is nothing at",
        str(BASE / "unet"): "holds no safetensors file",
    }
    for place, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            started(text_projection=place)
    with pytest.raises(ConfigError, match=r"is \(32, 32\), but \(16, 32\) is needed"):
        started(text_projection=str(clip[0]), projection_dim=16)


def test_identity_is_a_choice_and_warm_starts_and_other_architectures_need_none(tmp_path):
    assert torch.equal(started(text_projection="identity"), torch.eye(32))
    lrm = str(BASE.parent / "lrm_sd15")
    assert torch.equal(started(init=lrm), torch.load(f"{lrm}/state_dict.pt")["text_projection"]["weight"])
    scenes = start_lrm(from_preset(LRMConfig, "scenes", init="base", device="cpu"), load_policy(Policy(), "cpu"))
    assert torch.equal(scenes.text_projection.weight, torch.eye(128))
    sdxl = write_sdxl(tmp_path / "sdxl")
    assert started(base=sdxl) is None and started(base=sdxl, text_projection="identity") is None
    with pytest.raises(ConfigError, match="leave text_projection empty"):
        started(base=sdxl, text_projection=sdxl)
