"""The one door to every setting of every command: frozen classes whose field metadata feeds the command line, the forms
and the docs, and which refuse absurd values with one sentence. Imports no torch, so the web process may read it.

    lpo/sample_config.py   lpo/lrm_config.py   lpo/lpo_config.py   a room for each command
    lpo/policy.py          lpo/shared_settings.py                  what several of them have
    lpo/presets.py                                                 named values, each with its source
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lpo.lpo_config import LPOConfig
from lpo.lrm_config import LRMConfig
from lpo.options import ConfigError, from_dict, opt, to_dict, validate
from lpo.policy import Adapter, Policy, Search, search_args
from lpo.presets import PRESETS, SOURCES
from lpo.sample_config import SampleConfig, TraceConfig
from lpo.shared_settings import DTYPES

CONFIGS: dict[str, type] = {
    "sample": SampleConfig,
    "trace": TraceConfig,
    "train-lrm": LRMConfig,
    "train-lpo": LPOConfig,
}


def from_preset(cls: type, name: str, **overrides: Any) -> Any:
    """A config from a named preset; `overrides` are plain values that win over it."""
    command = next(c for c, k in CONFIGS.items() if k is cls)
    if name not in PRESETS[command]:
        raise ConfigError(f"There is no preset {name!r} for {command}; choose one of {', '.join(PRESETS[command])}.")
    return from_dict(cls, {**PRESETS[command][name], **overrides})


def to_args(cfg: Any, default: Any) -> list[str]:
    """The command-line flags that turn `default` into `cfg` (for showing the equivalent command)."""
    args: list[str] = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if value == getattr(default, f.name):
            continue
        if isinstance(value, Policy):
            args += ["--base", value.base]
            args += ["--unet", value.unet] if value.unet else []
            args += ["--adapters", *(f"{a.path}@{a.strength:g}" for a in value.adapters)] if value.adapters else []
            args += search_args(value.search) if value.search is not None else []
        elif isinstance(value, tuple):
            args += [f"--{f.name}", *map(str, value)]
        else:
            args += [
                f"--{f.name}",
                "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value),
            ]
    return args


__all__ = [
    "CONFIGS",
    "DTYPES",
    "PRESETS",
    "SOURCES",
    "Adapter",
    "ConfigError",
    "LPOConfig",
    "LRMConfig",
    "Policy",
    "SampleConfig",
    "Search",
    "TraceConfig",
    "from_dict",
    "from_preset",
    "opt",
    "to_args",
    "to_dict",
    "validate",
]
