"""Where a base model comes from: the embedded one, a diffusers folder, a hub id, or one .safetensors file in the
original layout. Single files hold weights only; the small configuration files of their family come from a folder of the
same name beside the file, else from the hub or its cache (HF_HUB_OFFLINE is respected).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lpo.config import ConfigError
from lpo.options import parse_json
from lpo.places import single_file_family

transformers_logging.disable_progress_bar()  # its bars end up in every log.txt


def pipeline_class(source: str) -> str:
    """The pipeline's `_class_name` of a resolved base. Raises ConfigError if it cannot be told."""
    if os.path.isfile(source):
        return single_file_family(source).pipeline
    index = model_index(source)
    if "_class_name" not in index:
        raise ConfigError(f"{source}/model_index.json is damaged: get the model folder again.")
    return index["_class_name"]


def model_index(source: str) -> dict:
    """model_index.json of a resolved base. Raises ConfigError if it is not readable."""
    folder = Path(config_folder(source))
    if folder.is_dir():
        refused = f"{folder}/model_index.json is damaged: get the model folder again."
        try:
            return parse_json((folder / "model_index.json").read_bytes(), dict, refused)
        except OSError as error:
            raise ConfigError(refused) from error
    try:
        return json.loads(Path(hf_hub_download(source, "model_index.json")).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model {source} could not be fetched nor found on disk: check the name, the network and "
            "HF_HUB_OFFLINE, or give a local folder."
        ) from error


def config_folder(source: str) -> str:
    """Where the configuration files and tokenizers of a resolved base are: itself, but for single files."""
    if not os.path.isfile(source):
        return source
    beside = Path(source).with_suffix("")
    if (beside / "model_index.json").is_file():
        return str(beside)
    hub_id = single_file_family(source).configuration
    try:
        return snapshot_download(hub_id, allow_patterns=["*.json", "*.txt"])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source} holds weights only, and its configuration could not be fetched from {hub_id}: go online once, "
            f"or put that model's model_index.json and the .json and .txt files of its subfolders into {beside}."
        ) from error


def load_part(kind: type, source: str, name: str, dtype: torch.dtype = torch.float32):
    """One component (class `kind`, subfolder `name`) of a resolved base; of single files only diffusers' own models."""
    if os.path.isfile(source) and issubclass(kind, ModelMixin):
        return kind.from_single_file(source, config=config_folder(source), subfolder=name, torch_dtype=dtype)
    if issubclass(kind, ModelMixin):
        return kind.from_pretrained(source, subfolder=name, torch_dtype=dtype)
    if issubclass(kind, PreTrainedModel):
        return kind.from_pretrained(source, subfolder=name, dtype=dtype)
    return kind.from_pretrained(config_folder(source), subfolder=name)


def load_parts(kinds: dict[str, type], pipeline: str, source: str, base: str, dtype: torch.dtype) -> dict:
    """All components of a base, {name: object}. Raises ConfigError; `base` is the user's name of it."""
    try:
        if not os.path.isfile(source):
            return {name: load_part(kind, source, name, dtype) for name, kind in kinds.items()}
        config = config_folder(source)
        # The scheduler and the tokenizers are in the configuration; the text encoders need the pipeline's own loader.
        small = {name: kind for name, kind in kinds.items() if not issubclass(kind, torch.nn.Module)}
        own = {name: load_part(kind, source, name) for name, kind in small.items()} | _unwanted(config)
        whole = getattr(diffusers, pipeline).from_single_file(source, config=config, torch_dtype=dtype, **own)
        return {name: getattr(whole, name) for name in kinds}
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"The model {base} could not be loaded as {pipeline}: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """The first line of what a library says went wrong, for the end of a sentence."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0][:200].rstrip(".: ")


def plain_config(part: ModelMixin | PreTrainedModel) -> dict:
    """A part's configuration without the place that it was loaded from: files that go out name no folder of this
    machine."""
    config = part.config.to_dict() if isinstance(part, PreTrainedModel) else part.config
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def _unwanted(config: str) -> dict[str, None]:
    """Components of the pipeline that are never used here."""
    index = model_index(config)
    return {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
