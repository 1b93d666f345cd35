"""The header of an exported LoRA: ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), and the few `ss_` entries by
which A1111 tells SD1, SD2 and SDXL apart. Everything is text, and nothing of it is needed to load the weights.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from lpo.export_base import Base

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base", "sd3": "stable-diffusion-3"}
SGM = "https://github.com/Stability-AI/generative-models"  # whose names kohya's SDXL layout has
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3"}


def architecture(base: Base) -> str:
    """ModelSpec's id of what a LoRA on this base runs on; other sizes of the same class get an id of their own."""
    named = ARCHITECTURES.get(base.kind)
    if base.kind == "sd2":
        named = "stable-diffusion-v2-768-v" if base.prediction_type == "v" else "stable-diffusion-v2-512"
    if base.name == "scenes":
        named = "preference-lab-scenes"
    elif not base.is_standard:
        named = f"{named}-of-other-size"
    return f"{named}/lora"


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of all that follows the header of the file, in hex."""
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[start:]).hexdigest()


def header(
    tensors: dict[str, Tensor], base: Base, layout: str, title: str, description: str, merged_from: Sequence[str] = ()
) -> dict[str, str]:
    """The `__metadata__` of a LoRA file in `layout` diffusers or kohya."""
    digest = tensor_hash(tensors)
    downs = (".lora_down.weight", ".lora_A.weight")
    ranks = sorted({len(value) for key, value in tensors.items() if key.endswith(downs)})
    told = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(base),
        "modelspec.implementation": SGM if layout == "kohya" and base.kind == "sdxl" else "diffusers",
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{base.side}x{base.side}",
        "modelspec.hash_sha256": f"0x{digest}",
        "format": "pt",
    }
    if base.prediction_type in ("epsilon", "v"):
        told["modelspec.prediction_type"] = base.prediction_type
    if merged_from:
        told["modelspec.merged_from"] = ", ".join(merged_from)
    if layout == "kohya":
        told |= {
            "ss_base_model_version": VERSIONS[base.kind],
            "ss_v2": str(base.kind == "sd2"),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks[-1]) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(float(ranks[-1])),
            "ss_output_name": title,
            "sshs_model_hash": digest,
        }
    return told
