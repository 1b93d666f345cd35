"""The three text encoders of Stable Diffusion 3: two CLIPs, whose pooled outputs also steer the network, and a T5.

A folder may lack any of them (`[null, null]` in its model_index.json). What a missing one would have said is zeros, as
the network has seen in training, where each was left out now and then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lpo.backbones.source import load_part, plain_config

CLIP_LENGTH, T5_LENGTH = 77, 256  # tokens, as the stock pipeline
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_CLASSES = ((CLIPTextModelWithProjection, CLIPTokenizer),) * 2 + ((T5EncoderModel, T5Tokenizer),)


class TextTowers:
    """The encoders and tokenizers in the pipeline's order, None where missing.

    states_width, pooled_width: what the transformer reads of a token and of a prompt (its config says so).
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module | None],
        tokenizers: Sequence[CLIPTokenizer | T5Tokenizer | None],
        states_width: int,
        pooled_width: int,
    ):
        self.encoders, self.tokenizers = list(encoders), list(tokenizers)
        self.states_width, self.pooled_width = states_width, pooled_width

    @classmethod
    def from_pretrained(cls, source: str, dtype: torch.dtype, states_width: int, pooled_width: int) -> TextTowers:
        """Those that model_index.json names, from a folder or the hub."""
        index = DiffusionPipeline.load_config(source)
        encoders, tokenizers = [], []
        for encoder, tokenizer, (model, vocabulary) in zip(ENCODERS, TOKENIZERS, _CLASSES, strict=True):
            there = index.get(encoder, [None])[0] is not None
            encoders.append(load_part(model, source, encoder, dtype) if there else None)
            tokenizers.append(load_part(vocabulary, source, tokenizer) if there else None)
        return cls(encoders, tokenizers, states_width, pooled_width)

    @classmethod
    def from_description(cls, description: dict, folder: Path, states_width: int, pooled_width: int) -> TextTowers:
        """Untrained encoders of the architecture that `describe` gave; their tokenizers from `folder`."""
        encoders, tokenizers = [], []
        for encoder, tokenizer, (model, vocabulary) in zip(ENCODERS, TOKENIZERS, _CLASSES, strict=True):
            config = description.get(encoder)
            kind = T5Config if model is T5EncoderModel else CLIPTextConfig
            encoders.append(model(kind(**config)) if config else None)
            tokenizers.append(vocabulary.from_pretrained(folder / tokenizer) if config else None)
        return cls(encoders, tokenizers, states_width, pooled_width)

    def describe(self) -> dict:
        return {name: plain_config(encoder) for name, encoder in self.named()}

    def save_tokenizers(self, folder: Path) -> None:
        for name, tokenizer in zip(TOKENIZERS, self.tokenizers, strict=True):
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """The encoders that are there, under their folders' names."""
        return ((name, one) for name, one in zip(ENCODERS, self.encoders, strict=True) if one is not None)

    def encode(self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Token states (B, 77 + 256, states_width): both CLIPs side by side, then T5; and pooled (B, pooled_width)."""
        clips = [self._clip(i, prompts, device, dtype) for i in (0, 1)]
        clip_states = torch.cat([states for states, _ in clips], dim=-1)
        clip_states = F.pad(clip_states, (0, self.states_width - clip_states.shape[-1]))
        states = torch.cat([clip_states, self._t5(prompts, device, dtype)], dim=-2)
        return states, torch.cat([pooled for _, pooled in clips], dim=-1)

    def _clip(
        self, i: int, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        encoder, tokenizer = self.encoders[i], self.tokenizers[i]
        if encoder is None:
            # The two share the pooled vector. Both missing: the first takes all of it.
            other = self.encoders[1 - i]
            width = self.pooled_width * (1 - i) if other is None else self.pooled_width - other.config.projection_dim
            zeros = torch.zeros(len(prompts), CLIP_LENGTH, min(width, self.states_width), device=device, dtype=dtype)
            return zeros, torch.zeros(len(prompts), width, device=device, dtype=dtype)
        length = min(CLIP_LENGTH, encoder.config.max_position_embeddings)
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        out = encoder(batch.input_ids.to(device), output_hidden_states=True)
        return out.hidden_states[-2].to(dtype), out.text_embeds.to(dtype)

    def _t5(self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        encoder, tokenizer = self.encoders[2], self.tokenizers[2]
        if encoder is None:
            return torch.zeros(len(prompts), T5_LENGTH, self.states_width, device=device, dtype=dtype)
        batch = tokenizer(
            list(prompts), padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
        )
        return encoder(batch.input_ids.to(device))[0].to(dtype)
