"""CLIP's text projection: an LRM on SD1.x or SD2.x starts from it, and their folders lack it. It is read out of a CLIP
model of its own, wherever that lies.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpo.config import ConfigError
from lpo.places import PROJECTION, projection_files


def read_projection(place: str) -> Tensor | None:
    """(projection size, hidden size), fp32, of a CLIP folder, hub id or .safetensors file; None if it holds none.
    Raises ConfigError."""
    files = projection_files(place)
    return _fetched(place) if files is None else _in_files(files)


def own_projection(source: str) -> Tensor | None:
    """That of a resolved base, if its text encoder was saved with one."""
    if os.path.isfile(source):
        return None
    if os.path.isdir(source):
        return _in_files(sorted(Path(source, "text_encoder").glob("*.safetensors")))
    try:
        return _in_files([Path(hf_hub_download(source, "text_encoder/model.safetensors"))])
    except EntryNotFoundError:
        return None


def _fetched(hub_id: str) -> Tensor | None:
    try:
        return _in_files([Path(hf_hub_download(hub_id, "model.safetensors"))])
    except (OSError, ValueError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"The CLIP model {hub_id} could not be fetched nor found on disk: check the name, the network and "
            "HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except EntryNotFoundError:
        return None


def _in_files(files: list[Path]) -> Tensor | None:
    for file in files:
        try:
            with safe_open(str(file), "pt") as opened:
                if PROJECTION in opened.keys():  # noqa: SIM118  (not a dict)
                    return opened.get_tensor(PROJECTION).float()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is not a readable .safetensors file.") from error
    return None
