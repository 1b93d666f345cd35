"""Preference pairs and their cached latents: everything an LRM trains on, read once, checked line by line.

A pairs file is JSON Lines, the frozen snapshot of what was trained on. One line is one pair:
    {"id": "17", "prompt": "a red star", "first": "a.png", "second": "b.png",
     "target": 1.0, "weight": 1.0, "split": "train"}
`target` is P(first is chosen): 1 first, 0 second, 0.5 a tie, anything between a soft label of disagreeing annotators.
`split` is "train" or "heldout"; held-out lines never train. Paths are absolute or relative to the file.

Latents are cached as the *scaled* posterior mean and standard deviation, one safetensors file per (picture bytes,
encoder, size), so that no picture is encoded twice and both pictures of a pair take the same route.
"""

import difflib
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lpo.options import DataError, is_text
from lpo.places import pairs_file

REQUIRED = ("id", "prompt", "first", "second", "target")
KNOWN = (*REQUIRED, "weight", "split")


@dataclass(frozen=True)
class Pair:
    """One compared pair; `target` = P(first is chosen) in [0, 1], `weight` > 0, `split` is "train" or "heldout"."""

    id: str
    prompt: str
    first: Path
    second: Path
    target: float
    weight: float = 1.0
    split: str = "train"


def normalise_prompt(text: str) -> str:
    """NFKC, casefold, whitespace collapsed, one trailing '.' removed: two spellings of a prompt become one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").strip()


def prompt_hash(text: str) -> str:
    """16 hex digits of the normalised prompt; what an LRM remembers of the prompts that it was trained on."""
    return hashlib.blake2b(normalise_prompt(text).encode(), digest_size=8).hexdigest()


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a pairs file in file order.

    Raises DataError naming the file and the line: not JSON, a missing or ill-typed field, a picture that is not
    there, an id that comes twice, a prompt that is both train and held out, or no pair at all.
    """
    path = pairs_file(path)
    pairs: list[Pair] = []
    line_of_id: dict[str, int] = {}
    split_of_prompt: dict[str, tuple[str, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); a pairs file is JSON Lines.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        pair = _parse(line, path.parent, where)
        if pair.id in line_of_id:
            raise DataError(f"{where}: the id {pair.id!r} was already used in line {line_of_id[pair.id]}; "
                            "every pair needs an id of its own.")
        line_of_id[pair.id] = number
        split, first_seen = split_of_prompt.setdefault(normalise_prompt(pair.prompt), (pair.split, number))
        if split != pair.split:
            raise DataError(f"{where}: the prompt {pair.prompt!r} is {pair.split!r} here but {split!r} in line "
                            f"{first_seen}; one prompt belongs to one split.")
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path} has no pairs; label some pictures first.")
    return pairs


def _parse(line: str, folder: Path, where: str) -> Pair:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON; every line is one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__} where a JSON object is wanted.")
    for key in REQUIRED:
        if key not in row:
            raise DataError(f"{where}: {key!r} is missing; a pair needs {', '.join(REQUIRED)}.")
    for key in row:
        # other keys may ride along (votes, provenance), but a misspelt one must not silently become a default
        close = [] if key in KNOWN else difflib.get_close_matches(str(key), KNOWN, n=1, cutoff=0.8)
        if close:
            raise DataError(f"{where}: unknown key {key!r}; did you mean {close[0]!r}?")
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: 'prompt' is {prompt!r}; it must be a text that is not empty.")
    if not is_text(prompt) or not is_text(str(row["id"])):
        raise DataError(f"{where}: the prompt or id holds a lone surrogate, which is no character.")
    target = _number(row, "target", where, "a number from 0 (second chosen) to 1 (first chosen)")
    if not 0.0 <= target <= 1.0:
        raise DataError(f"{where}: 'target' is {target:g}; it must be from 0 (second chosen) to 1 (first chosen).")
    weight = _number({"weight": 1.0, **row}, "weight", where, "a number above 0")
    if weight <= 0.0:
        raise DataError(f"{where}: 'weight' is {weight:g}; it must be above 0, leave the line out to ignore a pair.")
    split = row.get("split", "train")
    if split not in ("train", "heldout"):
        raise DataError(f"{where}: 'split' is {split!r}; it must be 'train' or 'heldout'.")
    pictures = []
    for key in ("first", "second"):
        if not isinstance(row[key], str) or not row[key]:
            raise DataError(f"{where}: {key!r} is {row[key]!r}; it must be the path of a picture.")
        picture = folder / row[key]
        if not picture.is_file():
            raise DataError(f"{where}: the picture {row[key]!r} does not exist; "
                            "paths are absolute or relative to the file.")
        pictures.append(picture)
    return Pair(str(row["id"]), prompt, pictures[0], pictures[1], target, weight, split)


def _number(row: dict[str, Any], key: str, where: str, wanted: str) -> float:
    value = row[key]
    # compared, not converted: a whole number of 400 digits is no float; NaN is above nothing
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{where}: {key!r} is {repr(value)[:40]}; it must be {wanted}.")
    return float(value)


def load_picture(path: str | Path, size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) in [-1, 1]: RGB, shorter side resized to fit (Lanczos), then centre-cropped to `size` = (H, W)."""
    height, width = size
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"The picture {path} cannot be read ({error}); replace it or remove its pairs.") from error
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(resized, Image.Resampling.LANCZOS)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8, copy=True))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


# encodes pictures (B, 3, H, W) in [-1, 1] to the scaled posterior mean and std, both (B, C, h, w)
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LatentCache:
    """Scaled posterior mean and std of pictures, on disk under `folder`, encoded on first use.

    folder/<encoder>-<H>x<W>/<first two hex digits>/<hash of the picture's bytes>.safetensors, fp32, tensors `mean`
    and `std` of shape (C, h, w). Files are written under another name and moved, so a killed run leaves no half file.
    """

    def __init__(self, folder: str | Path, encode: Encode, encoder: str, size: tuple[int, int], batch_size: int = 16):
        """`encoder` identifies the VAE (a short text that is safe in a file name), `size` = (H, W) in pixels."""
        self.folder = Path(folder) / f"{encoder}-{size[0]}x{size[1]}"
        self.encode, self.size, self.batch_size = encode, size, batch_size

    def path(self, picture: str | Path) -> Path:
        """Where the latents of `picture` are or will be; raises DataError if the picture cannot be read."""
        try:
            digest = hashlib.blake2b(Path(picture).read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise DataError(f"The picture {picture} cannot be read ({error.strerror}); "
                            "replace it or remove its pairs.") from error
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def fill(self, pictures: dict[Path, str | Path]) -> None:
        """Encodes those of `pictures`, {path of the latents: path of the picture}, whose latents are missing."""
        todo = sorted(path for path in pictures if not path.is_file())
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start:start + self.batch_size]
            mean, std = self.encode(torch.stack([load_picture(pictures[path], self.size) for path in batch]))
            for path, one_mean, one_std in zip(batch, mean.float().cpu(), std.float().cpu(), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}.part")
                save_file({"mean": one_mean.contiguous(), "std": one_std.contiguous()}, part)
                part.replace(path)

    def load(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and stds (N, C, h, w) fp32 on the CPU, in the order of `paths`. Raises DataError for a damaged file."""
        loaded = [self._load(path) for path in paths]
        return torch.stack([one["mean"] for one in loaded]), torch.stack([one["std"] for one in loaded])

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"The cached latents {path} cannot be read ({error}); delete that file, "
                            "it is made again from the picture.") from error
