"""The early exit from a stock SD3 transformer: its first blocks, called by hand, and nothing after them."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpo.backbones import Conditioning, Features
from lpo.config import ConfigError

FEATURE_LAYER = 18  # paper: SD3's features come from layer 18 (of SD3-medium's 24)


def check_layer(layer: int, layers: int) -> None:
    """Raises ConfigError with one sentence if the transformer has no such layer."""
    if not 1 <= layer <= layers:
        raise ConfigError(f"feature_layer is {layer}, but this transformer has {layers} layers: choose 1 to {layers}.")


def strip(transformer: SD3Transformer2DModel, layer: int) -> SD3Transformer2DModel:
    """The same transformer without what comes after block `layer` (counted from 1)."""
    check_layer(layer, len(transformer.transformer_blocks))
    transformer.transformer_blocks = nn.ModuleList(transformer.transformer_blocks[:layer])
    transformer.norm_out, transformer.proj_out = None, None
    return transformer


def unread(transformer: SD3Transformer2DModel) -> list[nn.Parameter]:
    """Parameters of the last kept block that only make text tokens, which nothing reads any more."""
    block = transformer.transformer_blocks[-1]
    attention = block.attn
    parts = [attention.add_q_proj, attention.norm_added_q, attention.to_add_out, block.ff_context]
    return [parameter for part in parts if part is not None for parameter in part.parameters()]


def pooled_tokens(
    transformer: SD3Transformer2DModel, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, layer: int
) -> Tensor:
    """Mean of the image tokens after block `layer`, (B, D). x (B, C, H, W), t (B,), states (B, L, W), pooled (B, P)."""
    hidden = transformer.pos_embed(x).contiguous()
    embedding = transformer.time_text_embed(t, pooled)
    context = transformer.context_embedder(states)
    for block in transformer.transformer_blocks[:layer]:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            context, hidden = checkpoint(block, hidden, context, embedding, use_reentrant=False)
        else:
            context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=embedding)
    return hidden.mean(dim=1)


def guided_features(
    transformer: SD3Transformer2DModel, x_t: Tensor, t: float | Tensor, conditioning: Conditioning, layer: int
) -> Features:
    """`pooled_tokens` of both guidance branches in one batch, text rows first. One level only: it takes mid's place."""
    batch, dtype = len(x_t), transformer.dtype
    t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).reshape(-1).expand(batch)
    states = torch.cat([conditioning.text, conditioning.unconditional]).to(dtype)
    pooled = torch.cat([conditioning.pooled, conditioning.pooled_unconditional]).to(dtype)
    mid = pooled_tokens(transformer, torch.cat([x_t, x_t]).to(dtype), torch.cat([t, t]), states, pooled, layer).float()
    return Features([], mid[:batch], mid[batch:])
