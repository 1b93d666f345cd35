"""Prompt files: a .json list of strings, or a .txt file with one prompt a line."""

from __future__ import annotations

from pathlib import Path

from lpo.options import ConfigError, is_text, parse_json


def read_prompts(path: str | Path, keep_empty: bool = False) -> list[str]:
    """The prompts of a file, at least one; empty ones only if they are kept. Raises ConfigError with one sentence."""
    file = Path(path).expanduser()
    if not str(path) or not file.is_file():
        raise ConfigError(f"There is no prompt file {str(path)!r}: give a .json list of strings or a .txt file.")
    refused = f"{path} is not a readable prompt file: give a .json list of strings or a .txt file, both in UTF-8."
    try:
        if file.suffix == ".json":
            prompts = parse_json(file.read_bytes(), list, refused)
        else:
            prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(refused) from error
    if not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"{path} must hold a JSON list of strings.")
    if broken := next((p for p in prompts if not is_text(p)), None):
        raise ConfigError(f"{path} holds a lone surrogate, which is no character: correct {ascii(broken)[:60]}.")
    prompts = prompts if keep_empty else [p.strip() for p in prompts if p.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts.")
    return prompts
