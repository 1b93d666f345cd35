"""A whole Stable Diffusion 3 pipeline with random weights and fixed seeds, of the very classes of the real one, as a
diffusers folder of 2 MB. No tokenizer is fetched: CLIP's is that of the golden model, T5's is made from the alphabet.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_TOKENIZER = Path(__file__).parent / "data" / "golden" / "tiny_sd15" / "tokenizer"
LAYERS, SIDE = 4, 64  # transformer blocks; pixels


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)


def clip(width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=520, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=width, bos_token_id=518, eos_token_id=519, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def tiny_sd3(folder: Path, missing: tuple[int, ...] = (), scheduler: dict | None = None, **transformer) -> Path:
    """Write the pipeline into `folder`. missing: encoders (1, 2, 3) left out; the rest changes configs."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    t5 = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    shape = {
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": LAYERS, "attention_head_dim": 8,
        "num_attention_heads": 3, "joint_attention_dim": 32, "caption_projection_dim": 24, "pooled_projection_dim": 28,
        "out_channels": 16, "pos_embed_max_size": 12,
    }  # fmt: skip
    parts = {
        "transformer": SD3Transformer2DModel(**{**shape, **transformer}),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, norm_num_groups=8, layers_per_block=1,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, sample_size=64,
        ),
        "text_encoder": clip(12), "tokenizer": tokenizer,
        "text_encoder_2": clip(16), "tokenizer_2": tokenizer,
        "text_encoder_3": T5EncoderModel(t5), "tokenizer_3": t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})}),
    }  # fmt: skip
    for i in missing:
        suffix = "" if i == 1 else f"_{i}"
        parts[f"text_encoder{suffix}"] = parts[f"tokenizer{suffix}"] = None
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder
