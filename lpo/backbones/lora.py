"""LoRA on a network through peft: frozen adapters with strengths, at most one trainable one, and switching between the
policy (all of them) and its reference (all but the trainable one) without a second copy of the weights.

Frozen adapters may come from other tools (lpo/backbones/lora_files.py) and may change the text encoders too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lpo.backbones.lora_files import read_lora
from lpo.config import Adapter, ConfigError
from lpo.places import LORA_FILE, adapter_file
from lpo.rng import normal

TRAINABLE = "trainable"
# peft asks whether several adapters on one network are meant: that is what a stack is
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")


class AdapterStack:
    """The adapters on one denoiser (`net`, a diffusers model) and, if given, on the text encoders beside it
    ({"text_encoder": ...}): which are loaded, which are active, which one trains (on the denoiser only).
    """

    def __init__(self, net: nn.Module, prefix: str, text_encoders: Mapping[str, nn.Module] = MappingProxyType({})):
        self.net, self.prefix = net, prefix
        self.parts = {prefix: net, **text_encoders}
        self.loaded: dict[tuple[str, int], str] = {}  # (weights file, its mtime) -> adapter name
        self.attempts = 0
        self.frozen: list[tuple[str, float]] = []
        self.has_trainable = False

    def _layers(self) -> Iterator[LoraLayer]:
        return (layer for part in self.parts.values() for _, layer in lora_layers(part))

    def set_frozen(self, adapters: Sequence[Adapter]) -> None:
        """Make `adapters` the frozen ones. Loads those not seen before; raises ConfigError for an unsuitable file."""
        chosen = []
        for adapter in adapters:
            file = adapter_file(adapter.path).resolve()
            key = (str(file), file.stat().st_mtime_ns)
            if key not in self.loaded:
                self.loaded[key] = self._load(str(file))
            if any(name == self.loaded[key] for name, _ in chosen):
                raise ConfigError(
                    f"The adapter {adapter.path} is listed twice: list it once, with the summed strength."
                )
            chosen.append((self.loaded[key], adapter.strength))
        self.frozen = chosen
        self._activate(with_trainable=True)

    def _load(self, file: str) -> str:
        """Add the adapter of a file, not yet active, and return the name it got."""
        name = f"frozen{self.attempts}"
        self.attempts += 1  # a name is never used again, also if loading fails
        weights, scaling = read_lora(file, self.net)
        strange = sorted({key.partition(".")[0] for key in weights} - set(self.parts))
        if any(part.startswith("text_encoder") for part in strange):
            raise ConfigError(f"The adapter {file} changes the {strange[0]}, which adapters of this model cannot.")
        if strange:
            raise ConfigError(f"{file} holds no LoRA for a {self.prefix} in diffusers layout.")
        try:
            for prefix, part in self.parts.items():
                own = {key: value for key, value in weights.items() if key.startswith(f"{prefix}.")}
                if own:
                    self._load_part(prefix, part, own, scaling, name)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            for layer in self._layers():
                layer.delete_adapter(name)
            self._activate(with_trainable=True)
            raise ConfigError(
                f"The adapter {file} does not fit this model: it was made for another architecture."
            ) from error
        return name

    def _load_part(
        self, prefix: str, part: nn.Module, weights: dict[str, Tensor], scaling: dict | None, name: str
    ) -> None:
        """Give one network its share of an adapter. Raises ValueError unless every layer of it found its place."""
        if part is self.net:
            _require_shapes(part, prefix, weights)  # the libraries print a line for every layer that differs
            part.load_lora_adapter(weights, prefix=prefix, adapter_name=name, metadata=scaling)
        else:
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                weights, network_alphas=None, text_encoder=part, prefix=prefix, adapter_name=name, metadata=scaling
            )
        placed = sum(name in layer.lora_A for _, layer in lora_layers(part))
        if placed * 2 != len(weights):
            raise ValueError(f"{len(weights)} matrices, but {placed} layers")

    def add_trainable(self, rank: int, targets: Sequence[str], seed: int) -> None:
        """A fresh LoRA of `rank` (alpha = rank): A gaussian with std 1/rank, keyed by seed and layer; B zero; fp32.
        Raises ConfigError unless every target names layers that can have one."""
        require_layers(self.net, self.prefix, targets)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
        self.net.add_adapter(config, adapter_name=TRAINABLE)
        self.has_trainable = True
        with torch.no_grad():
            for name, parameter in self.trainable_parameters().items():
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    parameter.copy_(normal(tuple(parameter.shape), seed, "lora", name) / rank)
        self._activate(with_trainable=True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if f".{TRAINABLE}." in name}

    def _activate(self, with_trainable: bool) -> None:
        names = [name for name, _ in self.frozen]
        if self.has_trainable and with_trainable:
            names.append(TRAINABLE)
        for layer in self._layers():
            layer.set_adapter(names, inference_mode=True)
            for name, strength in self.frozen:
                if name in layer.lora_A:
                    layer.set_scale(name, strength)
        for parameter in self.trainable_parameters().values():
            parameter.requires_grad_(True)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self._activate(with_trainable=False)
        try:
            yield
        finally:
            self._activate(with_trainable=True)

    def save(self, path: Path) -> None:
        """The trainable adapter in diffusers' LoRA layout, which stock pipelines load."""
        state = get_peft_model_state_dict(self.net, adapter_name=TRAINABLE)
        layers = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        if self.prefix == "unet":  # stock files of UNets say lora.down, lora.up; those of transformers lora_A, lora_B
            layers = convert_state_dict_to_diffusers(layers)
        path.mkdir(parents=True, exist_ok=True)
        named = {f"{self.prefix}.{key}": value for key, value in layers.items()}
        save_file(named, path / LORA_FILE, metadata={"format": "pt"})


def require_layers(net: nn.Module, prefix: str, targets: Sequence[str]) -> None:
    """Raises ConfigError unless every target is the end of the paths of linear layers or convolutions of `net`."""
    if not targets:
        raise ConfigError("lora_targets is empty: name the layers that get a LoRA, such as to_q.")
    for target in targets:
        found = [layer for path, layer in net.named_modules() if f".{path}".endswith(f".{target}")]
        if not target or not found or not all(isinstance(each, (nn.Linear, nn.Conv2d, LoraLayer)) for each in found):
            raise ConfigError(
                f"lora_targets names {target!r}, but the {prefix} has no such linear layers or convolutions: "
                "choose among to_q, to_k, to_v, to_out.0 and the like."
            )


def _require_shapes(net: nn.Module, prefix: str, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if `net` lacks a layer of a LoRA, or has it in another shape."""
    layers = dict(net.named_modules())
    for key, matrix in convert_unet_state_dict_to_peft(weights).items():
        path, _, side = key.removeprefix(f"{prefix}.").partition(".lora_")
        layer = layers[path].get_base_layer() if isinstance(layers.get(path), LoraLayer) else layers.get(path)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"{key}: no such linear layer or convolution")
        weight = layer.weight
        fits = matrix.shape[1:] == weight.shape[1:] if side.startswith("A") else len(matrix) == len(weight)
        if not fits:
            raise ValueError(f"{key}: {tuple(matrix.shape)} for {tuple(weight.shape)}")


def lora_layers(net: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of every layer that carries a LoRA, active or not."""
    return ((path, layer) for path, layer in net.named_modules() if isinstance(layer, LoraLayer))
