"""Adapters and LRMs for other tools: stock pipelines draw the same pictures from every layout as the backbone does."""

import hashlib
import json
import shutil

import pytest
import tiny_models
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from interchange_lab import BASE, GOLDEN, kohya_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sd3 import tiny_sd3
from torch import nn

from lpo.__main__ import main
from lpo.backbones import load_policy
from lpo.config import Adapter, ConfigError, Policy
from lpo.export import export_adapter, export_lrm
from lpo.export_base import describe_base, hollow
from lpo.export_card import plain
from lpo.export_names import kohya_name, original_name
from lpo.reward_model import LatentRewardModel
from lpo.rng import normal
from lpo.sampling import trajectory

PROMPTS = ["the cat on the hill", "one two"]
NOISE = normal((2, 4, 16, 16), "export")
LRM = str(GOLDEN / "lrm_sd15")
DAMAGE = "<script>alert(1)</script>\n# [x](javascript:1) | `a`"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_models.write_sdxl(folder / "sdxl")
    # As the real folder says; with "linspace" the stock DDIM steps past the next timestep.
    tiny_models.edit_json(folder / "sdxl" / "scheduler" / "scheduler_config.json", timestep_spacing="leading")
    return {"sd1": BASE, "sdxl": str(folder / "sdxl")}


def checkpoint(folder, base, seed, below=(), rank=3):
    """A checkpoint as training leaves it, with weights that change the picture, on top of the adapters `below`."""
    backbone = load_policy(Policy(base, tuple(below)), "cpu")
    backbone.add_trainable_adapter(rank, ["to_q", "to_k", "to_v", "to_out.0"], seed)
    with torch.no_grad():
        for name, weight in backbone.trainable_parameters().items():
            weight += 0.15 * normal(tuple(weight.shape), seed, "export", name)
    backbone.save_adapter(folder)
    info = {
        "format_version": 1, "base": base, "rank": rank, "metrics": {"step": 2, "gap": 0.5, "heldout_reward": 1.25},
        "adapters": [{"path": each.path, "strength": each.strength} for each in below],
        "config": {"policy": {"base": base, "unet": ""}, "beta": 31.0, "lr": 1e-4, "lrm": "my lrm"},
    }  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(info))
    return Adapter(str(folder))


def ours(base, adapters, unet=""):
    """Pictures after two steps of the backbone with these adapters."""
    backbone = load_policy(Policy(base, tuple(adapters), unet=unet), "cpu")
    *_, last = trajectory(backbone, backbone.encode_prompts(PROMPTS), NOISE, 2, 5.0, 0.0, lambda step: None)
    return backbone.decode(last.next)


def stock(base, lora=None, unet=None):
    """Pictures after two steps of the stock pipeline of the base."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    if unet is not None:
        pipe.unet = UNet2DConditionModel.from_pretrained(unet)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    side = describe_base(base).side
    return pipe(PROMPTS, latents=NOISE, num_inference_steps=2, guidance_scale=5.0, eta=0.0, height=side, width=side,
                output_type="pt").images  # fmt: skip


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_stock_pipelines_draw_the_same_pictures_from_every_layout(bases, tmp_path, kind):
    """Round two on round one with a strength: one file of each layout is the whole stack."""
    base = bases[kind]
    first = Adapter(checkpoint(tmp_path / "one", base, 1).path, 0.6)
    second = checkpoint(tmp_path / "two", base, 2, below=(first,), rank=2)
    expected = ours(base, [first, second])
    plain_base = ours(base, [])
    assert float((expected - plain_base).abs().max()) > 0.02
    torch.testing.assert_close(stock(base), plain_base, atol=2e-4, rtol=0)  # the comparison itself is sound
    for layout in ("diffusers", "kohya"):
        file = export_adapter([second], layout, tmp_path / layout, title="My taste")[1]
        assert file.suffix == ".safetensors"
        torch.testing.assert_close(stock(base, file), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(ours(base, [Adapter(str(file))]), expected, atol=5e-4, rtol=0)
    keys = set(load_file(file))
    start = "lora_unet_input_blocks_" if kind == "sdxl" else "lora_unet_down_blocks_"
    assert any(key.startswith(start) for key in keys) and all(key.startswith("lora_unet_") for key in keys)
    assert sum(key.endswith(".alpha") for key in keys) * 3 == len(keys)
    export_adapter([second], "merged", tmp_path / "merged")
    merged = tmp_path / "merged" / "unet"
    torch.testing.assert_close(stock(base, unet=merged), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(ours(base, [], unet=str(tmp_path / "merged")), expected, atol=5e-4, rtol=0)
    alone = export_adapter([second], "kohya", tmp_path / "alone.safetensors", last_only=True)[0]
    torch.testing.assert_close(stock(base, alone), ours(base, [second]), atol=5e-4, rtol=0)


def test_adapters_of_other_tools_can_be_merged_in_text_encoders_too(bases, tmp_path):
    for kind, names in (
        ("sd1", {"text_encoder": "lora_te_text_model_"}),
        ("sdxl", {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}),
    ):
        backbone, weights = load_policy(Policy(bases[kind]), "cpu"), {}
        for part, prefix in names.items():
            for path, layer in backbone.adapters.parts[part].named_modules():
                if path.endswith(("q_proj", "out_proj", "fc1")) and isinstance(layer, nn.Linear):
                    weights |= kohya_of(prefix, path.removeprefix("text_model."), layer)
        save_file(weights, tmp_path / f"{kind}.safetensors")
        wild, own = Adapter(str(tmp_path / f"{kind}.safetensors"), 0.5), checkpoint(tmp_path / kind, bases[kind], 3)
        expected = ours(bases[kind], [wild, own])
        for layout in ("diffusers", "kohya"):
            file, _ = export_adapter([wild, own], layout, tmp_path / f"{kind}-{layout}.safetensors")
            torch.testing.assert_close(stock(bases[kind], file), expected, atol=5e-4, rtol=0)
        with pytest.raises(ConfigError, match="text_encoder too"):
            export_adapter([wild, own], "merged", tmp_path / f"{kind}-merged")


@torch.no_grad()
def test_sd3_goes_out_as_diffusers_and_merged(tmp_path):
    base = str(tiny_sd3(tmp_path / "sd3"))
    first = checkpoint(tmp_path / "one", base, 1)
    second = checkpoint(tmp_path / "two", base, 2, below=(first,), rank=2)
    file = export_adapter([second], "diffusers", tmp_path / "x.safetensors")[0]
    with pytest.raises(ConfigError, match="export as diffusers"):
        export_adapter([second], "kohya", tmp_path / "y.safetensors")
    export_adapter([second], "merged", tmp_path / "merged")
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    x, states, pooled = (normal(shape, "sd3") for shape in ((1, 16, 8, 8), (1, 5, 32), (1, 28)))
    inputs = {"hidden_states": x, "encoder_hidden_states": states, "pooled_projections": pooled}
    inputs["timestep"] = torch.tensor([500.0])
    plain_base = pipe.transformer(**inputs).sample
    expected = load_policy(Policy(base, (first, second)), "cpu").adapters.net(**inputs).sample
    assert float((expected - plain_base).abs().max()) > 0.01
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(pipe.transformer(**inputs).sample, expected, atol=1e-4, rtol=1e-4)
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged" / "transformer")
    torch.testing.assert_close(merged(**inputs).sample, expected, atol=1e-4, rtol=1e-4)


def test_original_names_are_those_that_diffusers_converts_from(bases):
    """The single-file converter of diffusers, given every weight under our name, must find the very UNet again."""
    unet = UNet2DConditionModel.from_pretrained(bases["sdxl"], subfolder="unet")
    layers = unet.config.layers_per_block
    state, renamed = unet.state_dict(), {}
    for key, value in state.items():
        path, _, kind = key.rpartition(".")
        renamed[f"model.diffusion_model.{original_name(path, layers)}.{kind}"] = value
    found = convert_ldm_unet_checkpoint(renamed, dict(unet.config))
    assert set(found) == set(state) and all(torch.equal(found[key], state[key]) for key in state)


SDXL = {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip


def test_full_sdxl_has_the_key_names_of_kohyas_files():
    net = hollow(UNet2DConditionModel, SDXL)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    names = {kohya_name(f"unet.{path}", True, 2) for path, _ in net.named_modules() if path.endswith(targets)}
    assert len(names) == 560  # 70 transformer blocks of two attentions of four layers
    blocks = {tuple(map(int, n.split("_")[4:6])) for n in names if "input_blocks" in n}
    assert blocks == {(4, 1), (5, 1), (7, 1), (8, 1)}
    assert {n.split("_")[4] for n in names if "output_blocks" in n} == {"0", "1", "2", "3", "4", "5"}
    for known in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                  "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
                  "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_k"):  # fmt: skip
        assert known in names


def test_header_tells_what_the_file_is(tmp_path, bases):
    adapter = checkpoint(tmp_path / "a", bases["sd1"], 1)
    file, written = export_adapter([adapter], "kohya", tmp_path / "x.safetensors", title="My taste", dtype="float16")
    assert written == tmp_path / "x.md"
    with safe_open(str(file), "pt") as opened:
        told = opened.metadata()
    required = ("sai_model_spec", "architecture", "implementation", "title", "date", "resolution", "hash_sha256")
    assert all(told[f"modelspec.{name}"] for name in required)
    assert told["modelspec.title"] == "My taste" and told["modelspec.resolution"] == "128x128"
    assert told["modelspec.architecture"] == "stable-diffusion-v1-of-other-size/lora"
    assert (told["ss_base_model_version"], told["ss_v2"], told["ss_network_dim"]) == ("sd_v1", "False", "3")
    content = file.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert told["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}


def test_card_says_where_it_comes_from_and_escapes_what_people_wrote(tmp_path, bases):
    adapter = checkpoint(tmp_path / "a", bases["sd1"], 1)
    about = {"name": "LPO 1", "study": DAMAGE, "question": "Which is better?", "lrm": "LRM 2"}
    about |= {"labels": {"train": 180, "heldout": 45, "simulated": 12}, "verdicts": ["LPO 1 preferred (61%)"]}
    (tmp_path / "about.json").write_text(json.dumps(about))
    out = tmp_path / "out"
    files = export_adapter([adapter], "kohya", out, about=str(tmp_path / "about.json"))
    assert {file.name for file in files} == {"lpo-1.safetensors", "README.md"}
    text = (out / "README.md").read_text()
    assert "<script" not in text and "\n# [x]" not in text and plain(DAMAGE) in text
    for word in ("180 to train on, 45 held out; 12 simulated", "LRM 2", "61%", "| beta | 31 |", "models/loras",
                 "| At step 2 | Value |", "| Reward on held-out prompts | 1.25 |"):  # fmt: skip
        assert word in text.replace("\\", ""), word
    assert "| gap |" not in text  # of the metrics only results
    assert "base_model" not in text  # a local folder is no hub id
    (tmp_path / "about.json").write_text(json.dumps({"study": 3}))
    with pytest.raises(ConfigError, match="'study'"):
        export_adapter([adapter], "kohya", tmp_path / "other", about=str(tmp_path / "about.json"))
    assert not (tmp_path / "other").exists()


def test_lrm_export_keeps_every_score(tmp_path):
    lrm = LatentRewardModel.from_pretrained(LRM, base=BASE, device="cpu")
    lrm.temperature = 1.7
    lrm.save(tmp_path / "own", {"base": BASE})
    arguments = ["export", "--lrm", str(tmp_path / "own"), "--format", "official", "--out", str(tmp_path / "official")]
    assert main([*arguments, "--base", BASE]) == 0
    again = LatentRewardModel.from_pretrained(tmp_path / "official", base=BASE, device="cpu")
    x, t = normal((2, 4, 16, 16), "lrm"), torch.tensor([1, 701])
    with torch.no_grad():
        torch.testing.assert_close(again.score(x, t, PROMPTS), lrm.score(x, t, PROMPTS), atol=1e-4, rtol=1e-5)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--format", "kohya"], "--adapter --lrm is required"),
        (["--adapter", "{a}", "--lrm", "scenes", "--format", "kohya"], "not allowed with"),
        (["--adapter", "{a}", "--format", "ckpt"], "invalid choice"),
        (["--adapter", "{a}", "--format", "official"], "choose diffusers, kohya or merged"),
        (["--lrm", LRM, "--format", "kohya"], "choose official"),
        (["--adapter", "{tmp}/none", "--format", "kohya"], "no adapter at"),
        (["--adapter", "{a}@many", "--format", "kohya"], "no adapter at"),
        (["--adapter", "{a}@9", "--format", "kohya"], "strength is 9"),
        (["--adapter", "{bare}", "--format", "kohya"], "--base"),
        (["--adapter", "{bare}", "--format", "kohya", "--base", "{tmp}/none"], "no model at"),
        (["--adapter", "{a}", "--format", "merged", "--out", "{tmp}/m.safetensors"], "new folder"),
        (["--adapter", "{a}", "--format", "kohya", "--out", "{tmp}/full"], "overwrites nothing"),
        (["--adapter", "{a}", "--format", "kohya", "--base", "scenes"], "another architecture"),
        (["--adapter", "{a}", "--format", "kohya", "--about", "{tmp}/gone.json"], "cannot be read"),
        (["--lrm", LRM, "--format", "official"], "--base"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, argv, words):
    for name in ("a", "bare", "full"):
        shutil.copytree(GOLDEN / "lora_m1", tmp_path / name)
    (tmp_path / "a" / "adapter.json").write_text(json.dumps({"format_version": 1, "base": BASE, "adapters": []}))
    before = sorted(tmp_path.rglob("*"))
    filled = [a.format(a=tmp_path / "a", bare=tmp_path / "bare", tmp=tmp_path) for a in argv]
    assert main(["export", *([] if "--out" in argv else ["--out", str(tmp_path / "o")]), *filled]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(tmp_path.rglob("*")) == before


def test_export_lrm_overwrites_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        export_lrm(LRM, BASE, tmp_path / "there")


def test_check_says_what_a_file_is_or_why_it_does_not_fit(tmp_path, capsys, bases):
    checkpoint(tmp_path / "a", bases["sd1"], 1)
    export_adapter([Adapter(str(tmp_path / "a"))], "merged", tmp_path / "m")
    capsys.readouterr()

    def check(*argv) -> str:
        code, (out, err) = main(["check", *map(str, argv)]), capsys.readouterr()
        assert bool(code) == bool(err.strip()) and (code == 2) == err.startswith("error: "), err
        return out + err

    assert check("--adapter", tmp_path / "a", "--base", bases["sd1"]) == "a LoRA of 128 layers, rank 3\n"
    assert "another architecture" in check("--adapter", tmp_path / "a", "--base", bases["sdxl"])
    assert check("--unet", tmp_path / "m", "--base", bases["sd1"]).startswith("a UNet of ")
    assert "another architecture" in check("--unet", tmp_path / "m", "--base", bases["sdxl"])
    assert check("--lrm", LRM, "--base", bases["sd1"]) == "an LRM of the official code\n"
    assert "no LRM folder" in (said := check("--lrm", tmp_path, "--base", bases["sd1"])) or "not an LRM" in said
