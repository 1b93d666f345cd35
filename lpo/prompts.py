"""Prompt files: a .json list of strings, or a .txt file with one prompt a line."""

from __future__ import annotations

import json
from pathlib import Path

from lpo.config import ConfigError


def read_prompts(path: str | Path, keep_empty: bool = False) -> list[str]:
    """The prompts of a file, at least one; empty ones only if they are kept. Raises ConfigError with one sentence."""
    file = Path(path).expanduser()
    if not str(path) or not file.is_file():
        raise ConfigError(f"There is no prompt file {str(path)!r}: give a .json list of strings or a .txt file.")
    try:
        text = file.read_text()
        prompts = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} is not a readable prompt file: give a .json list of strings or a .txt file."
        ) from error
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"{path} must hold a JSON list of strings.")
    prompts = list(prompts) if keep_empty else [p.strip() for p in prompts if p.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts.")
    return prompts
