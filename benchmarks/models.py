"""The models that the speed benchmarks run: real architectures, written out here, with random weights from a seed.

Nothing is downloaded. A model is made once, as a diffusers folder under the benchmark's folder, and then loaded through
the project's own loaders; `scenes` is the shipped model. What is random is only the numbers: shapes, layer kinds and so
the work are those of the named model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

TINY = {
    "unet": {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128},
    "vocabulary": 520,
}
SD15 = {
    "unet": {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "vocabulary": 49408,
}  # fmt: skip
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
SDXL = {
    "unet": {
        **SDXL_BLOCKS,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": SD15["text_encoder"],
    "text_encoder_2": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "hidden_act": "gelu", "projection_dim": 1280,
    },
    "vae": {**SD15["vae"], "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "vocabulary": 49408,
}  # fmt: skip
TINY_SDXL = {
    "unet": {
        **SDXL_BLOCKS,
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 64,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "text_encoder": TINY["text_encoder"],
    "text_encoder_2": {**TINY["text_encoder"], "projection_dim": 32, "hidden_act": "gelu"},
    "vae": {**TINY["vae"], "scaling_factor": 0.13025, "force_upcast": True},
    "vocabulary": 520,
}
MODELS = {"tiny": TINY, "tiny-sdxl": TINY_SDXL, "sd15": SD15, "sdxl": SDXL}
SIZES = ("scenes", *MODELS)
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def base_of(size: str, folder: Path, dtype: str, device: str) -> str:
    """What Policy(base=...) takes: 'scenes', or the folder of a random-weight model, made if it is not there yet."""
    if size == "scenes":
        return "scenes"
    path = folder / f"{size}-{dtype}"
    if not (path / "model_index.json").exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_model(MODELS[size], partial, getattr(torch, dtype), device)
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    return str(path)


def lrm_of(size: str, base: str, folder: Path, dtype: str, device: str) -> str:
    """The LRM of the size: 'scenes', or the base's early blocks with random heads, made if it is not there yet."""
    if size == "scenes":
        return "scenes"
    from lpo.reward_model import LatentRewardModel

    path = folder / f"{size}-{dtype}-lrm"
    if not (path / "lrm.json").exists():
        LatentRewardModel.from_base(base, device=device, dtype=dtype).save(path, dtype=dtype)
    return str(path)


@torch.no_grad()
def write_model(config: dict, path: Path, dtype: torch.dtype, device: str) -> None:
    """A whole diffusers folder of random weights in `dtype`, drawn on `device` from seed 0."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from lpo.backbones.trunk import cast

    torch.manual_seed(0)
    end = config["vocabulary"] - 1
    tokens = {"vocab_size": config["vocabulary"], "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    parts = {}
    with torch.device(device):
        parts["unet"] = UNet2DConditionModel(**config["unet"])
        parts["vae"] = AutoencoderKL(
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **config["vae"],
        )
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**config["text_encoder"], **tokens))
        if "text_encoder_2" in config:
            second = CLIPTextConfig(**config["text_encoder_2"], **tokens)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    for name, part in parts.items():
        cast(part, dtype)
        part.save_pretrained(path / name)
    DDIMScheduler(**SCHEDULER).save_pretrained(path / "scheduler")
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    for name in ("tokenizer", "tokenizer_2") if "text_encoder_2" in config else ("tokenizer",):
        write_tokenizer(path / name, config["vocabulary"])
        index[name] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    kind = "StableDiffusionXLPipeline" if "text_encoder_2" in config else "StableDiffusionPipeline"
    (path / "model_index.json").write_text(json.dumps({"_class_name": kind, **index}, indent=2))


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A CLIP tokenizer that knows single bytes only; prompts are padded to 77 tokens as with CLIP's own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    ids = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    ids |= {"<|startoftext|>": vocabulary - 2, "<|endoftext|>": vocabulary - 1}
    (path / "vocab.json").write_text(json.dumps(ids))
    (path / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (path / "tokenizer_config.json").write_text(
        json.dumps({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
    )
    (path / "special_tokens_map.json").write_text(json.dumps(special))
