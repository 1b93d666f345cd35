"""The Scenes model's tokenizer and text encoder, and the encoder's pre-training without pictures.

A text encoder trained only through the UNet's loss learns slowly which colour belongs to which shape and who stands
left of whom; two thirds of the prototype's faults were swapped or shared colours. Here it first learns to say, at the
end-of-text token and at the padding behind it, what stands in each of the five places (centre, left, right, top,
bottom) of the scene that a caption describes. That needs no picture, costs minutes, and makes the layout readable for
cross-attention and for an LRM's pooled text features. Who is where is learned last and all at once, after some 300
steps of nothing: stopping earlier leaves an encoder that knows the words and not the sentence.
"""

from __future__ import annotations

import json
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lpo.scenes.progress import Log, load_state, save_state
from lpo.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    parse_caption,
    sample_scene,
    train_caption,
)

LENGTH, WIDTH = 32, 128
START, END = "<|startoftext|>", "<|endoftext|>"
PLACES = ("centre", "left", "right", "top", "bottom")
KINDS = (len(SHAPES), len(COLOURS), len(SIZES))  # of each place; one more class says 'nothing here'
IGNORE = -100
LEARNING_RATE, BATCH, PAIRS = 2e-3, 96, 0.8  # PAIRS: share of scenes with two objects, which are what is hard


@lru_cache(maxsize=1)  # five seconds, the same each time
def build_tokenizer(seed: int = 0) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from 20,000 captions of the train split; any text can be encoded."""
    rng = np.random.default_rng((seed, 77))
    captions = [train_caption(sample_scene(rng), rng) for _ in range(20_000)]
    learner = CLIPTokenizer(model_max_length=LENGTH).backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    learner.train_from_iterator(captions, trainer)
    merges = [line.split(" ") for line in _merges(learner)]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=LENGTH)


def _merges(tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [m if isinstance(m, str) else " ".join(m) for m in merges]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text transformer, 2 layers x 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def encode(tokenizer: CLIPTokenizer, captions: list[str], device: str) -> torch.Tensor:
    """Token ids (B, LENGTH), padded with the end token as SD1.5 does."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    return ids.to(device)


def layout_targets(scene: Scene, text: str) -> list[int]:
    """Class of (shape, colour, size) at each of the 5 places, then the background; IGNORE where `text` is silent."""
    claims = parse_caption(text)
    silent = len(scene.objects) == 2 and claims.relation is None
    nothing = list(KINDS)
    rows = {place: (nothing if not silent or place == "centre" else [IGNORE] * 3) for place in PLACES}
    if not silent:
        places = {
            None: ("centre",),
            "left of": ("left", "right"),
            "right of": ("right", "left"),
            "above": ("top", "bottom"),
            "below": ("bottom", "top"),
        }[scene.relation]
        for place, thing, claim in zip(places, scene.objects, claims.objects, strict=True):
            size = SIZES.index(thing.size) if claim.size else IGNORE
            rows[place] = [SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), size]
    background = BACKGROUNDS.index(scene.background) if claims.background else len(BACKGROUNDS)
    return [c for place in PLACES for c in rows[place]] + [background]


class LayoutHead(nn.Module):
    """Linear readers of one text embedding (B, WIDTH): 5 places x 3 attributes, and the background."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [kinds + 1 for _ in PLACES for kinds in KINDS] + [len(BACKGROUNDS) + 1]
        self.linear = nn.Linear(WIDTH, sum(self.sizes))

    def loss(self, embedding: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over all 16 questions, and whether every question of a caption is answered right (B,)."""
        losses, right = [], torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        for logits, target in zip(self.linear(embedding).split(self.sizes, -1), targets.unbind(-1), strict=True):
            asked = (target != IGNORE).sum().clamp(min=1)
            losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / asked)
            right &= (logits.argmax(-1) == target) | (target == IGNORE)
        return torch.stack(losses).mean(), right


def train_text(
    out: Path, tokenizer: CLIPTokenizer, minutes: float, device: str, log: Log, seed: int = 0
) -> tuple[CLIPTextModel, LayoutHead]:
    """Pre-trains the text encoder for `minutes`, resuming from `out`/text.pt."""
    torch.manual_seed(seed + 1)
    encoder, head = build_text_encoder(tokenizer).to(device), LayoutHead().to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    state = load_state(out / "text.pt", {"encoder": encoder, "head": head, "optimiser": optimiser})
    step, spent = state.get("step", 0), state.get("seconds", 0.0)
    started = time.monotonic()
    while spent < 60 * minutes:
        seconds = spent + time.monotonic() - started
        done = min(1.0, seconds / (60 * minutes))
        for group in optimiser.param_groups:
            rate = 0.02 + 0.49 * (1 + math.cos(math.pi * max(0.0, (done - 0.4) / 0.6)))
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * rate
        rng = np.random.default_rng((seed, 78, step))
        scenes = [sample_scene(rng, objects=2 if rng.random() < PAIRS else 1) for _ in range(BATCH)]
        captions = [train_caption(scene, rng) for scene in scenes]
        targets = torch.tensor([layout_targets(s, c) for s, c in zip(scenes, captions, strict=True)], device=device)
        output = encoder(encode(tokenizer, captions, device))
        pad = int(rng.integers(LENGTH - 6, LENGTH))
        loss, right = head.loss(output.pooler_output, targets)
        loss = (loss + head.loss(output.last_hidden_state[:, pad], targets)[0]) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0 or done == 1:
            log("text", step=step, seconds=seconds, loss=loss.item(), all_right=right.float().mean().item())
            parts = {"encoder": encoder, "head": head, "optimiser": optimiser}
            save_state(out / "text.pt", parts, step=step, seconds=seconds)
        if done == 1:
            break
    return encoder, head
