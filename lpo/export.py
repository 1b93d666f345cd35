"""Models for other tools: `python -m lpo export`. An adapter, or the stack it belongs to, as a diffusers LoRA, in
kohya's layout (ComfyUI, A1111) or merged into the denoiser; an LRM in the official layout. Nothing existing is
overwritten, and a kill leaves nothing half-written under its final name.
"""

from __future__ import annotations

import contextlib
import os
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
from lpo.export_card import card, short
from lpo.export_layers import diffusers_tensors, kohya_tensors, merge
from lpo.export_metadata import header
from lpo.export_plan import plan_adapter, plan_lrm
from lpo.lrm_files import export_official
from lpo.reward_model import LatentRewardModel

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
    title: str = "",
    about: str | None = None,
    dtype: str = "float32",
) -> list[Path]:
    """Write `adapters` (one, standing for all that it was trained on top of, or a whole stack) in `layout` diffusers,
    kohya or merged. `out` is a new folder, or a new .safetensors file whose card is FILE.md. `about` is a JSON file
    with what only the lab knows (lpo/export_card.py). Returns the files written. Raises ConfigError with one sentence.
    """
    plan = plan_adapter(adapters, layout, out, base, last_only, title, about)
    if layout == "merged":
        write = _merged_writer(Policy(plan.base, tuple(plan.stack), unet=plan.unet), dtype)
    else:
        write = _lora_writer(describe_base(plan.base), plan.stack, layout, dtype, plan.title)
    use = USE[layout].format(name=plan.files[0].name)
    text = card(plan.title, plan.base, plan.unet, plan.stack, plan.info, plan.about, use)
    return _write_all(plan.out, plan.files, write, text)


def export_lrm(lrm: str, base: str, out: str | Path) -> list[Path]:
    """Write an LRM in the official layout, its up blocks copied from `base`. Raises ConfigError with one sentence."""
    base, out = plan_lrm(lrm, base, out)
    model = LatentRewardModel.from_pretrained(lrm, base, "cpu", "float32")
    with _under_another_name(out) as partial:
        export_official(model, partial, base)
        os.replace(partial, out)
    return sorted(file for file in out.rglob("*") if file.is_file())


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
