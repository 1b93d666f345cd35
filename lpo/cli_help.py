"""What `python -m lpo COMMAND --help` says of the settings: every field with its range, the value that a bare call uses
(the preset `scenes`), the field's own default where that is another, and the sources of both. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lpo.config import PRESETS, SOURCES
from lpo.options import plain_number

BARE = "scenes"  # the preset of a call without --preset and --config


def field_help(field: dataclasses.Field, command: str = "") -> str:
    """The help text, for argparse, of the flag of a config field; without `command` of one that no preset sets."""
    meta, told = field.metadata, _written(field.default)
    text = meta["help"]
    if meta["choices"]:
        text += f" ({', '.join(meta['choices'])})"
    if meta["min"] is not None:
        text += f"; {plain_number(meta['min'])} to {plain_number(meta['max'])}"
    own = told + (f" ({meta['source']})" if meta["source"] else "")
    if field.name in PRESETS.get(command, {}).get(BARE, {}):
        bare = _written(PRESETS[command][BARE][field.name])
        other = "" if bare == told else f"; with --config and no --preset: {own}"
        own = f"{bare} ({SOURCES[command][BARE][field.name]}){other}"
    return f"{text} [default: {own}]".replace("%", "%%")


def preset_help(command: str) -> str:
    """All presets of a command, each value with its source."""
    lines = ["presets, each value with its source:"]
    for name, values in PRESETS[command].items():
        lines.append(f"  {name}")
        lines += [f"    {key} = {json.dumps(value)}   ({SOURCES[command][name][key]})" for key, value in values.items()]
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return {"": "empty", "None": "none", "True": "true", "False": "false"}.get(str(value), str(value))
