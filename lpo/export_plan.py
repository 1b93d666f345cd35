"""What an export reads and where it goes, as far as names, JSON files and the disk tell: asked first, so that
`python -m lpo export` refuses bad input before torch is imported. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lpo.config import Adapter, ConfigError
from lpo.export_card import read_about
from lpo.options import parse_json
from lpo.places import LORA_FILE, adapter_file, lrm_folder, official_base, unet_source
from lpo.preflight import require_base
from lpo.run_dir import require_writable


class Plan(NamedTuple):
    """An adapter's export: `files` are the weights and their card, `info` is adapter.json of the last adapter ({} for
    one of another tool), `about` what only the lab knows, `unet` the merged UNet that it was trained on or ''."""

    base: str
    unet: str
    stack: list[Adapter]
    title: str
    out: Path
    files: list[Path]
    info: dict
    about: dict


def plan_adapter(
    adapters: Sequence[Adapter], layout: str, out: str | Path, base: str, last_only: bool, title: str, about: str | None
) -> Plan:
    """The arguments are those of `export.export_adapter`, whose ConfigError this raises as far as it can be told."""
    told = read_about(about)
    for adapter in adapters:
        adapter_file(adapter.path)  # a missing file is the first thing to say
    info = adapter_info(adapters[-1].path)
    base = base or info.get("base", "")
    if not base:
        raise ConfigError(f"{adapters[-1].path} does not say what it was trained on: name its base model (--base).")
    unet = info.get("config", {}).get("policy", {}).get("unet", "")
    stack = whole_stack(adapters, last_only)
    title = title or told.get("name") or f"LPO on {Path(base).name}"
    out, files = _targets(out, layout, title)
    require_base(base)
    for adapter in stack:
        adapter_file(adapter.path)
    if unet and layout == "merged":
        unet_source(unet)
    return Plan(base, unet, stack, title, out, files, info, told)


def plan_lrm(lrm: str, base: str, out: str | Path) -> tuple[str, Path]:
    """(base that lends its up blocks, new folder) of an LRM's export. Raises ConfigError with one sentence."""
    out = _folder(out, "an official LRM")
    _refuse_existing(out)
    require_writable(out, folder=True)
    folder, own_base = lrm_folder(lrm)
    if not (folder / "lrm.json").exists():
        base = base or official_base(folder, own_base)
    elif not base:
        file = folder / "lrm.json"
        meta = parse_json(file.read_bytes(), dict, f"{file} is damaged: it is no JSON object.").get("meta")
        base = meta.get("base", "") if isinstance(meta, dict) else ""
    if not base:
        raise ConfigError(f"{lrm} does not say what it was trained on: name its base model (--base).")
    require_base(base)
    return base, out


def whole_stack(adapters: Sequence[Adapter], last_only: bool) -> list[Adapter]:
    """What is exported: one checkpoint of this program stands for what it was trained on top of and itself, unless
    `last_only`; several adapters are taken as the whole stack that they are."""
    if last_only:
        return list(adapters[-1:])
    if len(adapters) > 1:
        return list(adapters)
    below = adapter_info(adapters[0].path).get("adapters", [])
    return [*(Adapter(each["path"], each["strength"]) for each in below), adapters[0]]


def adapter_info(path: str) -> dict:
    """adapter.json of a checkpoint of this program; {} for adapters of other tools."""
    file = Path(path).expanduser() / "adapter.json"
    info = parse_json(file.read_bytes(), dict, f"{file} is damaged: it is no JSON object.") if file.is_file() else {}
    if info.get("format_version", 1) > 1:
        raise ConfigError(f"{path} was written by a newer version of this program: update the program.")
    return info


def _targets(out: str | Path, layout: str, title: str) -> tuple[Path, list[Path]]:
    """`out` and the files to write, weights first and card last. Raises ConfigError if one of them exists or cannot be
    written."""
    out = _folder(out, "a merged network") if layout == "merged" else Path(out).expanduser()
    if out.suffix == ".safetensors":
        files = [out, out.with_suffix(".md")]
    else:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[:60] or "lora"
        name = {"diffusers": LORA_FILE, "kohya": f"{slug}.safetensors", "merged": "unet"}[layout]
        files = [out / name, out / "README.md"]
        _refuse_existing(out)
    for file in files:
        _refuse_existing(file)
    require_writable(out, folder=files[0] != out)
    return out, files


def _folder(out: str | Path, what: str) -> Path:
    if Path(out).suffix == ".safetensors":
        raise ConfigError(f"{out} is a file, but {what} is a folder: give --out a new folder.")
    return Path(out).expanduser()


def _refuse_existing(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} exists already, and an export overwrites nothing: choose another --out.")
