"""Models for other tools: `python -m lpo export`. An adapter, or the stack it belongs to, as a diffusers LoRA, in
kohya's layout (ComfyUI, A1111) or merged into the denoiser; an LRM in the official layout. Nothing existing is
overwritten, and a kill leaves nothing half-written under its final name.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from lpo.backbones import load_policy
from lpo.backbones.lora import lora_layers
from lpo.config import Adapter, ConfigError, Policy
from lpo.export_base import Base, describe_base
from lpo.export_card import card, read_about, short
from lpo.export_layers import adapter_info, diffusers_tensors, kohya_tensors, merge, whole_stack
from lpo.export_metadata import header
from lpo.lrm_files import export_official
from lpo.places import LORA_FILE, adapter_file
from lpo.reward_model import LatentRewardModel
from lpo.run_dir import require_writable

Write = Callable[[Path], None]  # writes the weights where it is told
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
USE = {
    "diffusers": "```python\npipeline.load_lora_weights(FOLDER, weight_name={name!r})\n```\n",
    "kohya": "Put `{name}` into `models/loras` of ComfyUI or `models/Lora` of A1111 and load it with strength 1.\n",
    "merged": "`unet/` (or `transformer/`) takes the place of the base's folder of that name; `python -m lpo` loads a "
    "UNet as `--unet`.\n",
}


def export_adapter(
    adapters: Sequence[Adapter],
    layout: str,
    out: str | Path,
    base: str = "",
    last_only: bool = False,
    dtype: str = "float32",
    title: str = "",
    about: str | None = None,
) -> list[Path]:
    """Write `adapters` (one, standing for all that it was trained on top of, or a whole stack) in `layout` diffusers,
    kohya or merged. `out` is a new folder, or a new .safetensors file whose card is FILE.md. `about` is a JSON file
    with what only the lab knows (lpo/export_card.py). Returns the files written. Raises ConfigError with one sentence.
    """
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
    if layout == "merged":
        write = _merged_writer(Policy(base, tuple(stack), unet=unet), dtype)
    else:
        write = _lora_writer(describe_base(base), stack, layout, dtype, title)
    text = card(title, base, unet, stack, info, told, USE[layout].format(name=files[0].name))
    return _write_all(out, files, write, text)


def export_lrm(lrm: str, base: str, out: str | Path) -> list[Path]:
    """Write an LRM in the official layout, its up blocks copied from `base`. Raises ConfigError with one sentence."""
    out = Path(out).expanduser()
    _refuse_existing(out)
    require_writable(out, folder=True)
    model = LatentRewardModel.from_pretrained(lrm, base or None, "cpu", "float32")
    base = base or model.meta.get("base", "")
    if not base:
        raise ConfigError(f"{lrm} does not say what it was trained on: name its base model (--base).")
    with _under_another_name(out) as partial:
        export_official(model, partial, base)
        os.replace(partial, out)
    return sorted(file for file in out.rglob("*") if file.is_file())


def _targets(out: str | Path, layout: str, title: str) -> tuple[Path, list[Path]]:
    """`out` and the files to write, weights first and card last. Raises ConfigError if one of them exists or cannot be
    written."""
    out = Path(out).expanduser()
    if out.suffix == ".safetensors" and layout == "merged":
        raise ConfigError(f"{out} is a file, but a merged network is a folder: give --out a new folder.")
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


def _refuse_existing(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} exists already, and an export overwrites nothing: choose another --out.")


@contextlib.contextmanager
def _under_another_name(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, gone at the end: what is whole by then has been moved to its place."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(out: Path, files: list[Path], write: Write, text: str) -> list[Path]:
    """The weights and the card. Returns the files written."""
    with _under_another_name(out) as partial:
        write(partial / files[0].name)
        (partial / files[-1].name).write_text(text, encoding="utf-8")
        if files[0] == out:
            for file in files:
                os.replace(partial / file.name, file)
            return files
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        os.replace(partial, out)
    return sorted(file for file in out.rglob("*") if file.is_file())


def _lora_writer(base: Base, stack: list[Adapter], layout: str, dtype: str, title: str) -> Write:
    """Writes the stack as one LoRA file in `layout` diffusers or kohya."""
    layers = merge(base, stack)
    if layout == "kohya":
        tensors = kohya_tensors(layers, base, DTYPES[dtype])
    else:
        tensors = diffusers_tensors(layers, DTYPES[dtype])
    names = [f"{short(each.path)} x {each.strength:g}" for each in stack] if len(stack) > 1 else []
    told = header(tensors, base, layout, title, "A LoRA of Latent Preference Optimization.", names)
    return lambda file: save_file(tensors, file, told)


def _merged_writer(policy: Policy, dtype: str) -> Write:
    """Writes the policy's denoiser as a diffusers folder, its adapters folded into the weights."""
    backbone = load_policy(policy, "cpu", "float32")
    net = backbone.adapters.net
    beside = [name for name, part in backbone.adapters.parts.items() if part is not net and any(lora_layers(part))]
    if beside:
        raise ConfigError(
            f"These adapters change the {beside[0]} too, which a merged network cannot hold: export diffusers or kohya."
        )
    state = merged_weights(net)
    with torch.device("meta"):
        plain = type(net).from_config(net.config)
    plain.load_state_dict({key: value.to(DTYPES[dtype]) for key, value in state.items()}, assign=True)

    def write(folder: Path) -> None:
        plain.save_pretrained(folder.with_name("unet" if backbone.adapters.prefix == "unet" else "transformer"))

    return write


@torch.no_grad()
def merged_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights with every active adapter added, strengths included, under the names of a network without LoRA."""
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, LoraLayer)}
    state = {}
    for name, value in net.state_dict().items():
        owner, _, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        value = value.contiguous()
        if rest == "weight" and owner in layers:
            active = [each for each in layers[owner].active_adapters if each in layers[owner].lora_A]
            value = sum((layers[owner].get_delta_weight(each).to(value) for each in active), value)
        state[name.replace(".base_layer.", ".")] = value
    return state
