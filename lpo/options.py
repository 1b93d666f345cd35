"""What a config field is and how a config travels: `opt` describes a field once, for the checks here, the command
line, the forms and the docs; `to_dict` and `from_dict` carry a config to JSON and back. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import field
from typing import Any

FORMAT_VERSION = 1


class ConfigError(ValueError):
    """A setting that cannot be used. Its text is one sentence: what was wrong, what is allowed, what to do."""


class DataError(ValueError):
    """Bad input data; the message is one sentence for a person: what is wrong, what is allowed, what to do."""


def opt(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple | None = None,
    main: bool = False,
    source: str = "",
) -> Any:
    """A config field. `main`: one of the few a form shows unfolded; `source`: where the default comes from."""
    metadata = {"help": help, "min": min, "max": max, "choices": choices, "main": main, "source": source}
    return field(default=default, metadata=metadata)


def ordered(cfg: Any, low: str, high: str) -> None:
    if getattr(cfg, low) > getattr(cfg, high):
        raise ConfigError(f"{low} ({getattr(cfg, low)}) must not be above {high} ({getattr(cfg, high)}).")


def validate(cfg: Any) -> None:
    """Check types, ranges and choices of every field. Raises ConfigError: the value and what is allowed."""
    hints = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        value, meta = getattr(cfg, f.name), f.metadata
        if not _is(value, hints[f.name]):
            raise ConfigError(f"{f.name} is {value!r}, but must be {_type_name(hints[f.name])}.")
        if value is None:
            continue
        if meta["choices"] and value not in meta["choices"]:
            raise ConfigError(f"{f.name} is {value!r}; choose one of {', '.join(map(str, meta['choices']))}.")
        for number in value if isinstance(value, tuple) else (value,):
            low, high = meta["min"], meta["max"]
            if isinstance(number, str) and not is_text(number):
                told = ascii(number)[:60]
                raise ConfigError(f"{f.name} holds a lone surrogate, which is no character: give {told} as UTF-8.")
            if isinstance(number, float) and number != number:
                raise ConfigError(f"{f.name} is not a number.")
            if (low is not None and number < low) or (high is not None and number > high):
                told = f"{f.name} is {_short(number)}"
                raise ConfigError(f"{told}, but must be between {plain_number(low)} and {plain_number(high)}.")
        if f.name in ("height", "width") and value % 8:
            raise ConfigError(f"{f.name} is {value}, but must be a multiple of 8.")


def is_text(value: str) -> bool:
    """Whether a text can be written down: JSON and command lines may also hold halves of characters (surrogates)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def parse_json(text: bytes, kind: type, refused: str) -> Any:
    """JSON from outside, a dict or list as `kind` says. Raises ConfigError with the sentence `refused`, also where
    brackets or digits have no end."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, not UTF-8, more than 4300 digits
        raise ConfigError(refused) from error
    if not isinstance(found, kind):
        raise ConfigError(refused)
    return found


def _short(number: float) -> str:
    """A refused number as it was given, but for those with more digits than a person reads."""
    told = str(number)
    return told if len(told) <= 20 else f"a number of {len(told)} digits"


def plain_number(bound: float) -> str:
    """A bound as a person writes it: 10,000,000 and not 1e+07, but 1e-08 as it is."""
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


def _is(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return any(_is(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    args = [a for a in typing.get_args(hint) if a is not Ellipsis]
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_type_name(args[0])}"
    if args:
        return " or ".join(_type_name(a) for a in args)
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}.get(
        hint, f"a {hint.__name__} object"
    )


def to_dict(cfg: Any) -> dict:
    """The config as plain JSON values, with its format_version."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return {"format_version": FORMAT_VERSION, **plain(cfg)}


def from_dict(cls: type, data: dict) -> Any:
    """A config of class `cls` from JSON values. Missing fields take their defaults; unknown ones are refused."""
    if not isinstance(data, dict):
        raise ConfigError(f"A {cls.__name__} must be a JSON object, not {type(data).__name__}.")
    data = dict(data)
    data.pop("command", None)  # a run's config.json names it
    version = data.pop("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"This config has format_version {version!r}, but this program reads {FORMAT_VERSION}: update the program."
        )
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            raise ConfigError(
                f"Unknown setting {name!r}{f'; did you mean {near[0]!r}' if near else ''}; "
                f"{cls.__name__} has: {', '.join(hints)}."
            )
    return cls(**{name: _from_plain(hints[name], value) for name, value in data.items()})


def _from_plain(hint: Any, value: Any) -> Any:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(args[0], v) for v in value)
    for kind in args or (hint,):  # an optional group of settings is `Group | None`
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return from_dict(kind, value)
    return value
