"""LoRA on a network through peft: frozen adapters with strengths, at most one trainable one, and switching between the
policy (all of them) and its reference (all but the trainable one) without a second copy of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lpo.config import Adapter, ConfigError
from lpo.rng import normal

TRAINABLE = "trainable"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def weights_file(path: str) -> Path:
    """The .safetensors file of an adapter given as a folder or file. Raises ConfigError if there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / WEIGHTS_NAME
    if not file.is_file():
        raise ConfigError(f"There is no adapter at {path}: give a folder with {WEIGHTS_NAME} or a .safetensors file.")
    return file


class AdapterStack:
    """The adapters on one network (`net`, a diffusers model): which are loaded, which are active, which one trains."""

    def __init__(self, net: torch.nn.Module, prefix: str):
        self.net, self.prefix = net, prefix
        self.loaded: dict[tuple[str, int], str] = {}  # (weights file, its mtime) -> adapter name
        self.attempts = 0
        self.frozen: list[tuple[str, float]] = []
        self.has_trainable = False

    def _layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.net.modules() if isinstance(module, LoraLayer))

    def set_frozen(self, adapters: Sequence[Adapter]) -> None:
        """Make `adapters` the frozen ones. Loads those not seen before; raises ConfigError for an unsuitable file."""
        chosen = []
        for adapter in adapters:
            file = weights_file(adapter.path).resolve()
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
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ConfigError(f"{file} is not a readable .safetensors file.") from error
        ours = {key: value for key, value in weights.items() if key.startswith(f"{self.prefix}.")}
        if not ours:
            raise ConfigError(f"{file} holds no LoRA for a {self.prefix} in diffusers layout.")
        try:
            self.net.load_lora_adapter(ours, prefix=self.prefix, adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"The adapter {file} does not fit this model: it was made for another architecture."
            ) from error
        if not any(name in layer.lora_A for layer in self._layers()):
            raise ConfigError(
                f"The adapter {file} touches no layer of this model: it was made for another architecture."
            )
        return name

    def add_trainable(self, rank: int, targets: Sequence[str], seed: int) -> None:
        """A fresh LoRA of `rank` (alpha = rank): A gaussian with std 1/rank, keyed by seed and layer; B zero; fp32."""
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
        self.net.add_adapter(config, adapter_name=TRAINABLE)
        self.has_trainable = True
        with torch.no_grad():
            for name, parameter in self.trainable_parameters().items():
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    parameter.copy_(normal(tuple(parameter.shape), seed, "lora", name) / rank)
        self._activate(with_trainable=True)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
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
        layers = convert_state_dict_to_diffusers({k: v.detach().cpu().contiguous() for k, v in state.items()})
        path.mkdir(parents=True, exist_ok=True)
        named = {f"{self.prefix}.{key}": value for key, value in layers.items()}
        save_file(named, path / WEIGHTS_NAME, metadata={"format": "pt"})
