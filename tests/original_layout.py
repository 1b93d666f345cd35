"""Writes a diffusers folder of SD1.x or SDXL as one .safetensors file in the original (LDM) layout, for the tests of
single-file checkpoints. The names are those of the published checkpoints.
"""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "conv_out": "out.2",
        "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj"}  # fmt: skip


def write_single_file(folder: str, file: Path) -> Path:
    """`file`, with the weights of the diffusers folder."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    state = unet_state(pipe.unet) | vae_state(pipe.vae)
    if "text_encoder_2" in pipe.components:
        first = "conditioner.embedders.0.transformer.text_model."
        state |= open_clip_state(pipe.text_encoder_2)
    else:
        first = "cond_stage_model.transformer.text_model."
    state |= {first + key.removeprefix("text_model."): value for key, value in pipe.text_encoder.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


def unet_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    size = unet.config.layers_per_block + 1
    attended = [block.attentions is not None if "attentions" in dict(block.named_children()) else False
                for block in unet.up_blocks]  # fmt: skip
    state = {}
    for key, value in unet.state_dict().items():
        name = next((new + key.removeprefix(old) for old, new in UNET.items() if key.startswith(f"{old}.")), key)
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            side, level, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            first = 1 + level * size if side == "down" else level * size
            if kind == "downsamplers":
                name = f"input_blocks.{first + size - 1}.0.{rest.replace('conv', 'op')}"
            elif kind == "upsamplers":
                name = f"output_blocks.{first + size - 1}.{2 if attended[level] else 1}.{rest}"
            else:
                blocks = "input_blocks" if side == "down" else "output_blocks"
                name = f"{blocks}.{first + place}.{int(kind == 'attentions')}.{rest}"
        if ".resnets." in key:
            part = next(old for old in RESNET if f".{old}." in key)
            name = name.replace(f".{part}.", f".{RESNET[part]}.")
        state[f"model.diffusion_model.{name}"] = value
    return state


def vae_state(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    top = len(vae.config.block_out_channels) - 1
    state = {}
    for key, value in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{top - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", name)
        if "mid_block.attentions.0" in name:
            part = next(old for old in VAE_ATTENTION if f".{old}." in name)
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(part, VAE_ATTENTION[part])
            value = value[:, :, None, None] if value.ndim == 2 else value  # attention by 1 x 1 convolutions
        state[f"first_stage_model.{name}"] = value
    return state


def open_clip_state(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    prefix, own = "conditioner.embedders.1.model.", encoder.state_dict()
    state = {
        f"{prefix}token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        f"{prefix}text_projection": own["text_projection.weight"].T,
    }
    for key, value in own.items():
        if match := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key):
            layer = f"{prefix}transformer.resblocks.{match[1]}."
            if match[2] in CLIP:
                state[f"{layer}{CLIP[match[2]]}.{match[3]}"] = value
            elif match[2] == "self_attn.q_proj":
                parts = [own[key.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                state[f"{layer}attn.in_proj_{match[3]}"] = torch.cat(parts)
        elif key.startswith("text_model.final_layer_norm."):
            state[f"{prefix}ln_final.{key.rpartition('.')[2]}"] = value
    return state
