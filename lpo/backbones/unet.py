"""The early exit from a stock diffusers UNet: its down blocks and mid block, called by hand, and nothing after them."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lpo.backbones import Conditioning, Features

Added = dict[str, Tensor] | None  # SDXL's text_embeds (B, P) and time_ids (B, 6)


def strip(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet without what comes after its mid block."""
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
    return unet.to(memory_format=torch.channels_last)


def pooled_width(unet: UNet2DConditionModel) -> int:
    """Columns of all pooled features: SD1.5 3520 + 1280 = 4800, SDXL 2240 + 1280 = 3520."""
    return sum(unet.config.block_out_channels) + unet.config.block_out_channels[-1]


def early_features(
    unet: UNet2DConditionModel, x: Tensor, t: Tensor, states: Tensor, added: Added = None
) -> tuple[list[Tensor], Tensor]:
    """The UNet up to its mid block, up blocks never run: spatial means of the last feature of every level and of mid.

    x (B, C, H, W), t (B,), states (B, L, D). Returns [(B, C_i)] per level (SD1.5: skips 2, 5, 8, 11; SDXL: 2, 5, 8)
    and (B, C_mid).
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t), None)
    if added is not None:
        emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added)
    hidden = unet.conv_in(x)
    levels = []
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, skips = block(hidden_states=hidden, temb=emb, encoder_hidden_states=states)
        else:
            hidden, skips = block(hidden_states=hidden, temb=emb)
        last = skips[-1] if block.downsamplers is None else skips[-2]  # before the downsampler
        levels.append(last.mean(dim=(2, 3)))
    mid = unet.mid_block(hidden, emb, encoder_hidden_states=states)
    return levels, mid.mean(dim=(2, 3))


def guided_features(
    unet: UNet2DConditionModel,
    x_t: Tensor,
    t: int | Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
) -> Features:
    """`early_features` of both guidance branches in one batch (text rows first, as the official code).

    time_ids (6,): SDXL's, the same for every row; the pooled text then belongs to the condition too.
    """
    batch = len(x_t)
    t = torch.as_tensor(t, device=x_t.device).reshape(-1).expand(batch)
    states = torch.cat([conditioning.text, conditioning.unconditional]).to(unet.dtype)
    added = None
    if time_ids is not None:
        pooled = torch.cat([conditioning.pooled, conditioning.pooled_unconditional]).to(unet.dtype)
        added = {"text_embeds": pooled, "time_ids": time_ids.to(pooled).expand(2 * batch, -1)}
    levels, mid = early_features(unet, torch.cat([x_t, x_t]).to(unet.dtype), torch.cat([t, t]), states, added)
    mid = mid.float()
    return Features([level[:batch].float() for level in levels], mid[:batch], mid[batch:])
