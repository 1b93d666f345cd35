"""Randomness has keys: every draw is a pure function of its key, made on the CPU in fp32 and then moved by the caller.

So batch size, device, number of ranks and resuming never change a draw. A key is a sequence of plain values, by
convention (run seed, purpose, iteration, prompt, step, sibling): `normal((4, 16, 16), seed, "branch", 7, prompt, 3)`.
"""

from __future__ import annotations

import hashlib

import torch

Key = int | str


def key_seed(*key: Key) -> int:
    """A 63-bit seed from the key. Values are separated and typed, so ("a", 1) and ("a", "1") or ("a1",) differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: Key) -> torch.Generator:
    """A fresh CPU generator for the key."""
    return torch.Generator().manual_seed(key_seed(*key))


def normal(shape: tuple[int, ...], *key: Key) -> torch.Tensor:
    """Standard normal fp32 CPU tensor of `shape`."""
    return torch.randn(shape, generator=generator(*key), dtype=torch.float32)


def uniform(shape: tuple[int, ...], *key: Key) -> torch.Tensor:
    """Uniform in [0, 1), fp32 CPU tensor of `shape`."""
    return torch.rand(shape, generator=generator(*key), dtype=torch.float32)


def integers(high: int, shape: tuple[int, ...], *key: Key) -> torch.Tensor:
    """Uniform integers in [0, high), int64 CPU tensor of `shape`."""
    return torch.randint(high, shape, generator=generator(*key))


def permutation(n: int, *key: Key) -> list[int]:
    """A random order of range(n)."""
    return torch.randperm(n, generator=generator(*key)).tolist()
