"""Diffusers' layer names as kohya's LoRA files spell them. SD1.x and SD2.x keep diffusers' names; SDXL's are those of
the original UNet code: input_blocks_4_1_..., counted over all levels. Imports no torch.
"""

from __future__ import annotations

import re

TEXT = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection", "norm1": "in_layers.0", "norm2": "out_layers.0"}  # fmt: skip
OUTSIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
           "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def kohya_name(path: str, sdxl: bool, layers_per_block: int) -> str:
    """`unet.down_blocks.1.attentions.0...to_q` -> `lora_unet_down_blocks_1_attentions_0_..._to_q`, or for SDXL
    `lora_unet_input_blocks_4_1_..._to_q`."""
    prefix, _, rest = path.partition(".")
    if prefix in TEXT:
        start = "lora_te1" if sdxl and prefix == "text_encoder" else TEXT[prefix]
        if not rest.startswith(("text_model.", "text_projection")):
            rest = f"text_model.{rest}"  # transformers 5 dropped this level, the files keep it
        return f"{start}_{rest}".replace(".", "_")
    return f"lora_unet_{original_name(rest, layers_per_block) if sdxl else rest}".replace(".", "_")


def original_name(path: str, layers_per_block: int) -> str:
    """The layer's name in the original UNet code. Raises ValueError for a name that no diffusers UNet has."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{_inner(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if match is None:
        raise ValueError(f"{path} is no layer of a diffusers UNet")
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        number = 1 + block * (layers_per_block + 1) + (layers_per_block if kind == "downsamplers" else index)
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        rest = "op" if kind == "downsamplers" else _inner(kind, rest)
        return f"input_blocks.{number}.{inner}.{rest}"
    number = block * (layers_per_block + 1) + (layers_per_block if kind == "upsamplers" else index)
    # An upsampler comes third where its level has attention, as those of SDXL that can carry a LoRA by default do.
    inner = {"resnets": "0", "attentions": "1", "upsamplers": "2"}[kind]
    return f"output_blocks.{number}.{inner}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind == "resnets" else rest
