"""What makes a long training resumable and its record honest: atomic states and an append-only JSONL log."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch


class Log:
    """Appends one JSON object a line to `path` and prints it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, stage: str, **values: float | str | dict | list) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"at": time.strftime("%H:%M:%S", time.gmtime()), "stage": stage, **rounded})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def save_state(path: Path, parts: dict, **values: float | bool) -> None:
    """Writes the state dicts of `parts` and plain `values`; a crash leaves the previous file."""
    part = path.with_suffix(".part")
    torch.save({"parts": {k: v.state_dict() for k, v in parts.items()}, "values": values}, part)
    part.rename(path)


def load_state(path: Path, parts: dict) -> dict:
    """Loads what save_state wrote into `parts` and returns the plain values; {} when there is no file yet."""
    if not path.exists():
        return {}
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(stored["parts"][name])
    return stored["values"]
