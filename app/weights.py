"""What a policy's weights are, so that a file changed in place is never taken for the one before. Imports no torch."""

import hashlib
from pathlib import Path

from app.lab import ROOT

SCENES_MODEL = ROOT / "lpo" / "scenes" / "weights" / "model"
SCENES_LRM = ROOT / "lpo" / "scenes" / "weights" / "lrm"
WEIGHTS = {".safetensors", ".bin", ".pt", ".json"}

_hashes: dict[tuple[str, int, int], str] = {}


def content_hash(file: Path) -> str:
    """sha256 of a file; it is read again only when its size or time changed."""
    stat = file.stat()
    known = (str(file), stat.st_size, stat.st_mtime_ns)
    if known not in _hashes:
        with open(file, "rb") as source:
            _hashes[known] = hashlib.file_digest(source, "sha256").hexdigest()
    return _hashes[known]


def folder_hash(path: Path) -> str:
    """sha256 over the weights at `path`, a file or a folder with all below it; empty if there are none."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".pt"))
    hashes = [content_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else ""


def base_identity(base: str) -> str:
    """What tells one state of a base model from another: names, sizes and times of its files (reading gigabytes would
    keep the page waiting), or of a hub id the revision in the cache, empty while there is none."""
    path = SCENES_MODEL if base == "scenes" else Path(base).expanduser()
    if path.is_file():
        return _stamp(path, path.parent)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS and file.is_file())
        return hashlib.blake2b("\n".join(_stamp(f, path) for f in files).encode(), digest_size=16).hexdigest()
    if base.count("/") != 1:
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "model_index.json")
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def identity(policy: dict) -> list[str]:
    """Of a Policy (plain values): its base (and the network in the base's place), the content of its adapters, and of
    the LRM that searches with it."""
    search = policy.get("search")
    return [
        base_identity(policy["base"]),
        *([base_identity(policy["unet"])] if policy.get("unet") else []),
        *(folder_hash(Path(adapter["path"])) for adapter in policy.get("adapters", [])),
        *([lrm_hash(search["lrm"])] if search else []),
    ]


def lrm_hash(path: str) -> str:
    """sha256 over the weights of an LRM: a folder, FOLDER@BASE, or the shipped one by its alias."""
    if path == "scenes":
        return folder_hash(SCENES_LRM)
    folder = Path(path).expanduser()
    return folder_hash(folder if folder.exists() else Path(path.rpartition("@")[0]).expanduser())


def _stamp(file: Path, root: Path) -> str:
    stat = file.stat()
    return f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}"
