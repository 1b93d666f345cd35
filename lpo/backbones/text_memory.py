"""Encoded texts, remembered in main memory, so that a prompt that comes again costs neither its text encoders' work nor
their visit to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIMIT = 2**30  # bytes: in half precision about 9000 prompts of SD1.5, 3300 of SDXL, 400 of SD3


class TextMemory:
    """What each text was encoded to, the oldest forgotten first. Call `clear` when the encoders' weights change."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.bytes = limit, 0
        self.known: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        self.known, self.bytes = {}, 0

    def recall(
        self, texts: Sequence[str], encode: Callable[[list[str]], Sequence[Tensor]], device: torch.device
    ) -> list[Tensor]:
        """What `encode` gives, with one row a text, on `device`. It is called once, with the unknown texts, if any."""
        unique = list(dict.fromkeys(texts))
        fresh = [text for text in unique if text not in self.known]
        if fresh:
            columns = [column.cpu() for column in encode(fresh)]
            for i, text in enumerate(fresh):
                self.known[text] = [column[i].clone() for column in columns]
                self.bytes += _size(self.known[text])
        rows = torch.tensor([unique.index(text) for text in texts], device=device)
        found = [torch.stack(column).to(device)[rows] for column in zip(*map(self.known.get, unique), strict=True)]
        while self.bytes > self.limit:
            self.bytes -= _size(self.known.pop(next(iter(self.known))))
        return found


def _size(row: list[Tensor]) -> int:
    return sum(column.nbytes for column in row)
