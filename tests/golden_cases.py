"""What a folder of golden vectors holds, told by what lies in it: models by their configuration, vectors by the names
of their tensors. Of several that fit, the one whose name is most alike is taken.

The shipped folder must hold every case; one named by the environment variable GOLDEN may lack some, which are skipped.
"""

import json
import os
from collections import ChainMap
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

SHIPPED = Path(__file__).parent / "data" / "golden"
GOLDEN = Path(os.environ.get("GOLDEN", SHIPPED))


def _folders(inside: str) -> list[Path]:
    return sorted(path.parent for path in GOLDEN.rglob(inside))


def _architecture(unet: Path) -> str:
    return "sdxl" if json.loads(unet.read_text()).get("addition_embed_type") == "text_time" else "sd"


BASES = _folders("model_index.json")
LRMS = _folders("state_dict.pt")
ADAPTERS = _folders("pytorch_lora_weights.safetensors")
if not BASES:
    raise FileNotFoundError(f"GOLDEN is {GOLDEN}, where no model lies.")
MODELS = (*BASES, *LRMS, *ADAPTERS)
TENSORS = {}
for _file in sorted(GOLDEN.rglob("*.safetensors")):
    if not any(_file.is_relative_to(folder) for folder in MODELS):
        with safe_open(_file, "pt") as _opened:
            TENSORS[_file] = set(_opened.keys())


def _missing(what: str):
    if GOLDEN != SHIPPED:
        pytest.skip(f"{GOLDEN} holds no {what}")
    raise AssertionError(f"{what} is missing in {GOLDEN}")


def _closest(found: list[Path], name: str) -> Path:
    return max(found, key=lambda path: SequenceMatcher(None, path.stem.lower(), name.lower()).ratio())


def of_kind(folders: list[Path], kind: str) -> list[Path]:
    """Those of `folders` (BASES or LRMS) whose UNet is of `kind`, sd or sdxl."""
    return [path for path in folders if _architecture(path / "unet" / "config.json") == kind]


def model(folders: list[Path], kind: str, like: str) -> Path:
    """The base or LRM folder of `kind` whose name is most like `like`."""
    return _closest(of_kind(folders, kind) or _missing(f"{kind} model like {like}"), like)


def adapter(like: str) -> Path:
    return _closest(ADAPTERS or _missing("adapter"), like)


def files(name: str, kind: str = "sd") -> list[Path]:
    """Vector files that hold a tensor `name`. SDXL's say so, have ids of a second tokenizer, or are beside no other."""

    def is_sdxl(file: Path) -> bool:
        return "xl" in file.stem.lower() or "input_ids_2" in TENSORS[file] or not of_kind(LRMS, "sd")

    return [file for file, names in TENSORS.items() if name in names and is_sdxl(file) == (kind == "sdxl")]


def vectors(name: str) -> ChainMap[str, Tensor]:
    """The tensors of the file that holds `name`, and, for what it lacks, of the others of its architecture."""
    own = (files(name) or _missing(f"tensor {name}"))[0]
    others = [file for file in TENSORS if file != own and file.parent == own.parent]
    return ChainMap(load_file(own), *(load_file(file) for file in others))
