"""SDXL latent reward models: files in both formats, what trains and what cannot, and bad input."""

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from lpo.backbones import load_policy
from lpo.config import ConfigError, Policy
from lpo.lrm_files import export_official
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal

PROMPTS = ["the cat", "", "on the hill", "one two"]
T = torch.tensor([1, 251, 501, 951])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lrm")
    base = tiny_models.write_sdxl(folder / "base")
    tiny_models.write_official_sdxl_lrm(folder / "official", base)
    return folder


def scores(lrm: LatentRewardModel) -> torch.Tensor:
    with torch.no_grad():
        return lrm.score(normal((4, 4, 16, 16), "latents"), T, PROMPTS)


def test_both_formats_read_back_with_identical_scores(folders, tmp_path):
    base = str(folders / "base")
    lrm = LatentRewardModel.from_pretrained(folders / "official", base=base, device="cpu")
    assert lrm.text_projection is None and lrm.visual_projection.weight.shape == (24, 8 + 16 + 24 + 24)
    assert lrm.logit_scale.item() == pytest.approx(2.9)  # stored as a float; the parity test has a tensor
    assert len(lrm.unet.up_blocks) == 0 and not any("vae" in name for name, _ in lrm.named_parameters())
    expected = scores(lrm)
    lrm.save(tmp_path / "own")
    assert "_name_or_path" not in (tmp_path / "own" / "lrm.json").read_text()
    own = LatentRewardModel.from_pretrained(tmp_path / "own", device="cpu")
    assert torch.equal(scores(own), expected)
    export_official(own, tmp_path / "official", base)
    again = LatentRewardModel.from_pretrained(tmp_path / "official", base=base, device="cpu")
    assert torch.equal(scores(again), expected)
    stock = load_file(tmp_path / "official" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(key.startswith("up_blocks.2.") for key in stock)  # so that the official code can load it
    for name in ("text_encoder", "text_encoder_2"):  # and its older transformers the text encoders
        keys = set(load_file(tmp_path / "official" / name / "model.safetensors"))
        assert "text_model.embeddings.token_embedding.weight" in keys
        assert all(key.startswith(("text_model.", "text_projection.")) for key in keys)
    tuned = CLIPTextModel.from_pretrained(folders / "official" / "text_encoder").state_dict()
    ours = CLIPTextModel.from_pretrained(tmp_path / "official" / "text_encoder").state_dict()
    assert all(torch.equal(tuned[key], ours[key]) for key in tuned)


def test_scores_do_not_depend_on_the_batch(folders):
    lrm = LatentRewardModel.from_pretrained(folders / "official", base=str(folders / "base"), device="cpu")
    together = scores(lrm)
    with torch.no_grad():
        alone = lrm.score(normal((4, 4, 16, 16), "latents"), T, PROMPTS, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_frozen_text_encoders_come_from_the_base(folders, tmp_path):
    shutil.copytree(folders / "official", tmp_path / "frozen")
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(tmp_path / "frozen" / name)
    lrm = LatentRewardModel.from_pretrained(tmp_path / "frozen", base=str(folders / "base"), device="cpu")
    policy = load_policy(Policy(str(folders / "base")), "cpu")
    assert torch.equal(lrm.encode_text(["the cat"]).pooled, policy.encode_prompts(["the cat"]).pooled)
    assert lrm.encode_text([""]).pooled.any()  # the encoded empty prompt, where the policy has zeros


def test_everything_that_matters_trains_and_the_rest_does_not(folders):
    lrm = LatentRewardModel.from_base(str(folders / "base"), device="cpu")
    lrm.set_trainable("full")
    before = {name: p.detach().clone() for name, p in lrm.named_parameters()}
    optimizer = torch.optim.AdamW(lrm.trainable_parameters().values(), lr=1e-3, weight_decay=0.0)
    lrm.score(normal((4, 4, 16, 16), "latents"), T, PROMPTS).sum().backward()
    optimizer.step()
    still = {name for name, p in lrm.named_parameters() if torch.equal(p, before[name])}
    frozen = {name for name, p in lrm.named_parameters() if not p.requires_grad}
    assert still == frozen
    assert {name.split(".")[0] for name in frozen} == {"text_encoder"}  # its last layer and final norm are never read
    assert all("layers.2." in name or "final_layer_norm" in name for name in frozen)
    lrm.set_trainable("full", train_text_encoder=False)
    assert {name.split(".")[0] for name in lrm.trainable_parameters()} == {"unet", "visual_projection", "logit_scale"}
    lrm.set_trainable("heads")
    assert set(lrm.trainable_parameters()) == {"visual_projection.weight", "logit_scale"}


def test_bad_lrms_are_refused_in_one_sentence(folders, tmp_path):
    base, official = str(folders / "base"), folders / "official"
    with pytest.raises(ConfigError, match="--base"):
        LatentRewardModel.from_pretrained(official, device="cpu")
    with pytest.raises(ConfigError, match="@BASE"):  # an SDXL LRM beside an SD1.5 model
        LatentRewardModel.from_pretrained(official, base=str(tiny_models.GOLDEN / "tiny_sd15"), device="cpu")
    with pytest.raises(ConfigError, match="leave projection_dim empty"):
        LatentRewardModel.from_base(base, projection_dim=32, device="cpu")
    shutil.copytree(official, tmp_path / "broken")
    (tmp_path / "broken" / "state_dict.pt").write_bytes(b"not one")
    with pytest.raises(ConfigError, match="damaged"):
        LatentRewardModel.from_pretrained(tmp_path / "broken", base=base, device="cpu")
    torch.save({"visual_projection": print}, tmp_path / "broken" / "state_dict.pt")  # code is never unpickled
    with pytest.raises(ConfigError, match="damaged"):
        LatentRewardModel.from_pretrained(tmp_path / "broken", base=base, device="cpu")
    lrm = LatentRewardModel.from_pretrained(official, base=base, device="cpu")
    with pytest.raises(ConfigError, match="another architecture"):
        export_official(lrm, tmp_path / "export", str(tiny_models.GOLDEN / "tiny_sd15"))
    lrm.save(tmp_path / "own")
    info = json.loads((tmp_path / "own" / "lrm.json").read_text())
    info["architecture"]["kind"] = "sd9"
    (tmp_path / "own" / "lrm.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="update the program"):
        LatentRewardModel.from_pretrained(tmp_path / "own", device="cpu")
