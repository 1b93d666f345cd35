"""LRM folders: this project's format, the official one, and how an untrained LRM is made from a base model.

Own format:  lrm.json (format_version, architecture, fingerprint, temperature, meta), model.safetensors, tokenizer/
Official:    unet/, text_encoder/, state_dict.pt = {visual_projection, text_projection, logit_scale}; the tokenizer and
             the latent space come from the base model. SDXL: also text_encoder_2/, and no text_projection.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpo.backbones import Backbone, base_fingerprint, load_policy
from lpo.backbones.source import config_folder
from lpo.backbones.trunk import official_kind, trunk_class
from lpo.config import ConfigError, Policy
from lpo.places import lrm_folder, official_base, resolve_base
from lpo.reward_model import LatentRewardModel

FORMAT_VERSION = 1


def from_base(
    base: str,
    projection_dim: int | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    feature_layer: int = 18,
    t5: bool = False,
) -> LatentRewardModel:
    """An LRM with the base's early blocks, text encoder and tokenizer, and fresh heads. projection_dim: the text
    encoder's hidden size unless given; feature_layer and t5 are SD3's. Raises ConfigError if the base cannot be loaded
    or has no such layer."""
    policy = load_policy(Policy(base), str(device), str(dtype).removeprefix("torch."))
    return from_backbone(policy, projection_dim, seed, feature_layer, t5)


def from_backbone(
    backbone: Backbone, projection_dim: int | None, seed: int = 0, feature_layer: int = 18, t5: bool = False
) -> LatentRewardModel:
    """`from_base` on a backbone that is loaded already. It hands its network over: it still encodes, but samples no
    more."""
    base, space, trunk = backbone.policy.base, backbone.fingerprint(), backbone.trunk(feature_layer, t5)
    model = LatentRewardModel(trunk, projection_dim or trunk.text_width).to(backbone.device)
    model.init_heads(seed)
    model.fingerprint = space
    model.name, model.meta = base, {"base": base}
    return model.eval().requires_grad_(False)


def load(path: str, base: str | None, device: torch.device, dtype: torch.dtype) -> LatentRewardModel:
    """Load an LRM folder of either format. Raises ConfigError with one sentence if it is not one.

    An official folder needs a base model: `base`, or its own in FOLDER@BASE (an SD1.5 LRM that judges an SD2.1 policy).
    """
    folder, own_base = lrm_folder(path)
    if (folder / "lrm.json").exists():
        model = _load_own(folder, dtype)
    else:
        model = _load_official(folder, official_base(folder, own_base or base), dtype)
    model.name = path
    return model.to(device).eval().requires_grad_(False)


def _load_own(folder: Path, dtype: torch.dtype) -> LatentRewardModel:
    try:
        info = json.loads((folder / "lrm.json").read_text())
        if info["format_version"] > FORMAT_VERSION:
            raise ConfigError(f"{folder} was written by a newer version of this program: update the program.")
        with init_empty_weights():  # the weights are about to be read: drawing random ones takes minutes for SDXL
            trunk = trunk_class(info["architecture"]["kind"]).from_description(info["architecture"], folder)
            model = LatentRewardModel(trunk, info["projection_dim"], info["guidance_scale"])
        heads = ("visual_projection.", "text_projection.", "logit_scale")
        weights = load_file(folder / "model.safetensors")
        # Heads stay fp32: they are small and set the scale of the score.
        weights = {k: v.to(torch.float32 if k.startswith(heads) else dtype) for k, v in weights.items()}
        model.load_state_dict(weights, assign=True)
    except ConfigError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"The LRM folder {folder} is damaged or incomplete ({type(error).__name__}).") from error
    model.temperature, model.fingerprint, model.meta = info["temperature"], info["fingerprint"], info["meta"]
    return model.cast(dtype)


def _load_official(folder: Path, base: str, dtype: torch.dtype) -> LatentRewardModel:
    source = resolve_base(base)
    _require_own_base(folder, base, config_folder(source))
    try:
        heads = torch.load(folder / "state_dict.pt", map_location="cpu", weights_only=True)
        visual = heads["visual_projection"]["weight"]
        trunk = trunk_class(official_kind(folder)).from_official(folder, source, dtype)
        model = LatentRewardModel(trunk, visual.shape[0])
        with torch.no_grad():
            model.visual_projection.weight.copy_(visual)
            if model.text_projection is not None:
                model.text_projection.weight.copy_(heads["text_projection"]["weight"])
            model.logit_scale.copy_(torch.as_tensor(heads["logit_scale"]))
    except ConfigError:
        raise
    except (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"The official LRM folder {folder} is damaged, incomplete or of an unknown shape ({type(error).__name__})."
        ) from error
    model.meta = {"base": base, "format": "official"}
    return model.cast(dtype)


def _require_own_base(folder: Path, base: str, source: str) -> None:
    """ConfigError if the UNet of an official folder reads other text than the base's: it was trained from another."""
    try:
        ours = json.loads((folder / "unet" / "config.json").read_text())
        theirs = UNet2DConditionModel.load_config(source, subfolder="unet")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The UNet configuration of {folder} or of its base {base} cannot be read: get the folder again."
        ) from error
    if any(ours.get(k) != theirs.get(k) for k in ("cross_attention_dim", "addition_embed_type")):
        raise ConfigError(
            f"The official LRM {folder} was not trained from {base}, whose text encoder is another: name its own base "
            f"model (on the command line as {folder}@BASE or with --base)."
        )


def merged_state(model: LatentRewardModel) -> dict[str, Tensor]:
    """The weights as if LoRA had been merged into them, under the names of a model without LoRA. fp32, on the CPU."""
    deltas = {
        name: layer.get_delta_weight(layer.active_adapters[0]).detach().float().cpu()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        value = tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        owner = plain.removesuffix(".weight")
        state[plain] = value + deltas[owner] if plain.endswith(".weight") and owner in deltas else value
    return state


def save(model: LatentRewardModel, path: Path, meta: dict | None, dtype: torch.dtype) -> None:
    """Write the own format into `path`, by way of a neighbouring folder, so that a kill leaves no half LRM. `meta`
    takes the place of what the model says of itself: that may be true only of the LRM that it was trained from."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if meta is not None:
        model.meta = meta
    info = {"format_version": FORMAT_VERSION, "architecture": model.trunk.describe(), **model.describe()}
    (partial / "lrm.json").write_text(json.dumps(info, indent=2, default=str) + "\n")
    save_file({k: v.to(dtype) for k, v in merged_state(model).items()}, partial / "model.safetensors")
    model.trunk.save_tokenizers(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def export_official(model: LatentRewardModel, path: Path, base: str) -> None:
    """Write the official layout, up blocks copied from `base`, so that the official code can load it.

    The official format knows no temperature: it is folded into the logit scale, which leaves every score as it is.
    """
    state = merged_state(model)
    model.trunk.export_official(path, resolve_base(base), state)
    heads = {"visual_projection": {"weight": state["visual_projection.weight"]}}
    if model.text_projection is not None:
        heads["text_projection"] = {"weight": state["text_projection.weight"]}
    heads["logit_scale"] = state["logit_scale"] - torch.tensor(model.temperature).log()
    torch.save(heads, path / "state_dict.pt")


def latent_space(model: LatentRewardModel, base: str | None = None) -> dict:
    """The LRM's fingerprint; an official folder inherits its base model's. Raises ConfigError if neither is known."""
    if model.fingerprint is None:
        base = model.meta.get("base") or base
        if not base:
            raise ConfigError(f"The latent space of {model.name} is unknown: name its base model.")
        model.fingerprint = base_fingerprint(base)
    return model.fingerprint
