"""What the names in a config lead to on this machine: bases, adapters, merged UNets, LRMs, CLIP's text projection,
pairs; and the sentences when it is not there or does not fit. Imports no torch, so that a page may ask, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from lpo.options import ConfigError, DataError

SCENES = Path(__file__).parent / "scenes" / "weights"
LORA_FILE = "pytorch_lora_weights.safetensors"
PROJECTION = "text_projection.weight"
IDENTITY = "identity"  # a text projection to start from that changes nothing


class Family(NamedTuple):
    """What a single file of a family is: the family's name, its pipeline, and the hub id that has its configuration."""

    name: str
    pipeline: str
    configuration: str


SINGLE_FILES = {  # a tensor that every whole single-file checkpoint of the family has, and no other
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": Family(
        "sd3", "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "conditioner.embedders.1.model.ln_final.weight": Family(
        "sdxl", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    "cond_stage_model.model.ln_final.weight": Family(
        "sd21", "StableDiffusionPipeline", "stabilityai/stable-diffusion-2-1"),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": Family(
        "sd15", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}  # fmt: skip


def resolve_base(base: str) -> str:
    """The folder, file or hub id that a base name means. Raises ConfigError if it is plainly not there."""
    if base == "scenes":
        if not (SCENES / "model" / "model_index.json").exists():
            raise ConfigError("The embedded Scenes model (lpo/scenes/weights/model) is missing: get a whole checkout.")
        return str(SCENES / "model")
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise ConfigError(f"{base} is not a diffusers model folder (it has no model_index.json).")
        return str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(f"{base} is not a .safetensors file; other single-file checkpoints are not loaded.")
        return str(path)
    if base.count("/") != 1 or base[0] in "./~" or base.endswith((".safetensors", ".ckpt")):
        raise ConfigError(
            f"There is no model at {base}: give a diffusers folder, a .safetensors file, a hub id or 'scenes'."
        )
    return base


def adapter_file(path: str) -> Path:
    """The .safetensors file of an adapter given as a folder or file. Raises ConfigError if there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / LORA_FILE
    if not file.is_file():
        raise ConfigError(f"There is no adapter at {path}: give a folder with {LORA_FILE} or a .safetensors file.")
    return file


def unet_source(unet: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder): a folder is the UNet's own or holds `unet/`; owner/name[/folder] is on a hub."""
    folder = Path(unet).expanduser()
    if folder.is_dir():
        inner = folder / "unet" if (folder / "unet").is_dir() else folder
        if not (inner / "config.json").exists():
            raise ConfigError(f"{unet} is not a UNet folder of diffusers layout (it has no config.json).")
        return str(inner), None
    owner, _, rest = unet.partition("/")
    name, _, subfolder = rest.partition("/")
    if not owner or not name or unet[0] in "./~":
        raise ConfigError(f"There is no UNet at {unet}: give a folder of diffusers layout or a hub id.")
    return f"{owner}/{name}", subfolder or "unet"


def unet_files(unet: str) -> list[Path]:
    """The weights of a merged UNet in a folder of this machine. Raises ConfigError if there are none."""
    source, subfolder = unet_source(unet)
    if subfolder is not None:
        raise ConfigError(f"There is no folder at {unet}: only local folders can be checked.")
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{unet} has no .safetensors weights: other files are not loaded.")
    return files


def lrm_folder(name: str) -> tuple[Path, str | None]:
    """(folder, base or None) of an LRM's name: FOLDER, FOLDER@BASE, or 'scenes'. Raises ConfigError if it is no LRM."""
    path, at, base = name.rpartition("@")
    if not (at and path and base) or Path(name).expanduser().is_dir():
        path, base = name, None
    folder = SCENES / "lrm" if path == "scenes" else Path(path).expanduser()
    if not (folder / "lrm.json").exists() and not (folder / "state_dict.pt").exists():
        what = "The shipped Scenes LRM" if path == "scenes" else path
        raise ConfigError(
            f"{what} is not an LRM folder: it has neither lrm.json (own format) nor state_dict.pt (official)."
        )
    return folder, base


def official_base(folder: Path, base: str | None) -> str:
    """The base model that an official LRM folder is read with. Raises ConfigError if none is named."""
    if not base:
        raise ConfigError(
            f"{folder} is an official LRM folder: name its base model too, for the tokenizer (on the command line with "
            "--base)."
        )
    return base


def pairs_file(path: str | Path) -> Path:
    """The file of preference pairs. Raises DataError if it is not there."""
    if not Path(path).is_file():
        raise DataError(f"The pairs file {path} does not exist; give the path of a JSON Lines file of labelled pairs.")
    return Path(path)


def projection_files(place: str) -> list[Path] | None:
    """The safetensors files of a CLIP folder, or the file itself; None for a hub id. Raises ConfigError."""
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    if place.count("/") == 1 and place[0] not in "./~":
        return None
    raise ConfigError(f"There is nothing at {place}: text_projection names a CLIP folder, hub id or file.")


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """{tensor's name: shape} of a .safetensors file, from its header alone. Raises ConfigError, also for a file that
    was cut short."""
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > 100 * 2**20:  # the format's own limit
                raise ValueError(size)
            header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            end = max((about["data_offsets"][1] for about in header.values()), default=0)
            if 8 + size + end != os.path.getsize(file):
                raise ValueError(end)
        return {name: tuple(about["shape"]) for name, about in header.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a readable .safetensors file.") from error


def single_file_family(file: str | Path) -> Family:
    """The family of a checkpoint of one file in the original layout. Raises ConfigError if it is not a whole one."""
    names = tensor_shapes(Path(file))
    found = next((family for tensor, family in SINGLE_FILES.items() if tensor in names), None)
    if found is None:
        raise ConfigError(
            f"{file} is no whole Stable Diffusion checkpoint in the original layout (UNet, VAE and text encoder in one "
            "file): give one, or a diffusers folder; LoRA files go into adapters."
        )
    return found


def require_projection(
    base: str, text_projection: str, needed: tuple[int, ...] | None, found: tuple[int, ...] | None
) -> None:
    """Raises ConfigError unless CLIP's text projection is there where an LRM's start from `base` needs it. `needed` is
    None where pooled text is compared as it is, `found` the shape of what `text_projection`, or the base, holds."""
    if needed is None:
        if text_projection:
            raise ConfigError(f"{base} compares with its pooled text as it is: leave text_projection empty.")
        return
    if found is None and text_projection:
        raise ConfigError(
            f"{text_projection} holds no safetensors file with {PROJECTION}: give CLIP's, or '{IDENTITY}' to do "
            "without."
        )
    if found is None:
        raise ConfigError(
            f"{base} does not hold CLIP's text projection, which its LRM starts from: set text_projection to a "
            "CLIP folder, hub id or .safetensors file that has it (SD1.x: openai/clip-vit-large-patch14), or to "
            f"'{IDENTITY}' to do without, or set init to an LRM."
        )
    if found != needed:
        raise ConfigError(
            f"The text projection of {text_projection or base} is {found}, but {needed} is needed: "
            "give that of the base's own CLIP, and set projection_dim to its first number or leave it empty."
        )


def require_same_space(difference: str | None, lrm: str, policy: str, allow_mismatch: bool) -> None:
    """Raises ConfigError with one sentence if there is a difference of latent spaces, unless `allow_mismatch`."""
    if difference and not allow_mismatch:
        raise ConfigError(
            f"The LRM {lrm} does not share the latent space of {policy} ({difference}): take an LRM trained on "
            "that model's latents, or set allow_latent_mismatch."
        )
