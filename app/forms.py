"""A settings class of lpo/config.py <-> Gradio inputs, made from the field metadata alone.

The few `main` fields are shown, the rest is folded. What a person typed goes through the class's own validation, so
the page, the command line and a JSON file refuse the same values with the same sentence.
"""

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any

import gradio as gr

from lpo.config import ConfigError, from_dict, to_dict

LABELS = {"lr": "learning rate", "lrm": "LRM"}


@dataclasses.dataclass(frozen=True)
class Form:
    """The inputs of one config class: `inputs` in the order of `names`, to be passed to a callback as they are."""

    config_class: type
    names: tuple[str, ...]
    inputs: tuple[gr.components.Component, ...]

    def read(self, values: Sequence[Any], **fixed: Any) -> Any:
        """The validated config; `fixed` are plain values of the fields that are not in the form.

        Raises ConfigError with one sentence.
        """
        hints = typing.get_type_hints(self.config_class)
        plain = {name: parse(label(name), hints[name], value) for name, value in zip(self.names, values, strict=True)}
        try:
            return from_dict(self.config_class, {**plain, **fixed})
        except ConfigError as error:  # a sentence that begins with a field's name begins with its label here
            name, space, rest = str(error).partition(" ")
            raise ConfigError(f"{label(name) if name in self.names else name}{space}{rest}") from error

    def show(self, config: Any) -> list[Any]:
        """What the inputs show for `config`, in their order."""
        plain = to_dict(config)
        return [shown(plain[name]) for name in self.names]


def build(
    config: Any,
    leave_out: Sequence[str] = (),
    choices: dict[str, list] | None = None,
    first: Sequence[str] | None = None,
) -> Form:
    """Inputs for every field of `config`'s class except `leave_out` and the policy, showing `config`'s values.

    `choices` offers more or other values for a field than its metadata, e.g. the LRMs of this lab. `first` names the
    fields to show unfolded and their order; without it those marked `main` are shown.
    """
    fields = {f.name: f for f in dataclasses.fields(config) if f.name not in leave_out and f.type != "Policy"}
    main = list(first) if first is not None else [name for name, f in fields.items() if f.metadata["main"]]
    made = {}
    for start in range(0, len(main), 2):
        with gr.Row(equal_height=True, elem_classes="form-row"):
            for name in main[start : start + 2]:
                made[name] = _input(config, fields[name], (choices or {}).get(name))
    with gr.Accordion("All other settings", open=False, elem_classes="form-rest"):
        rest = [name for name in fields if name not in main]
        for start in range(0, len(rest), 3):
            with gr.Row(equal_height=True, elem_classes="form-row"):
                for name in rest[start : start + 3]:
                    made[name] = _input(config, fields[name], (choices or {}).get(name))
    return Form(type(config), tuple(made), tuple(made.values()))


def label(name: str) -> str:
    """`max_grad_norm` -> "max grad norm"; the command line's name is told by the hint below the input."""
    return LABELS.get(name, name.replace("_", " "))


def shown(value: Any) -> Any:
    """A plain JSON value as its input shows it: lists as one item per line, 0.00006 as 6e-05, nothing as ""."""
    if isinstance(value, list):
        return "\n".join(str(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else value


def parse(name: str, hint: Any, value: Any) -> Any:
    """What an input holds as the plain value of a field of type `hint`. Raises ConfigError for what is no number."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        lines = value if isinstance(value, list) else [line.strip() for line in str(value or "").splitlines()]
        return [parse(name, args[0], line) for line in lines if line not in ("", None)]
    optional = type(None) in args
    kind = next(a for a in args if a is not type(None)) if optional else hint
    if value is None or (isinstance(value, str) and not value.strip() and kind is not str):
        if optional:
            return None
        if kind is not str:
            raise ConfigError(f"{name} is empty; enter a number.")
    if kind is str:
        return str(value or "").strip()
    if kind is int:
        return _number(name, value, whole=True)
    return _number(name, value) if kind is float else value


GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?")  # 10,000,000 as our own sentences write it


def _number(name: str, value: Any, whole: bool = False) -> float | int:
    """A comma parts thousands, or stands for the point of a fraction; 1,000 could be either, and is a thousand."""
    text = str(value).strip()
    text = text.replace(",", "") if GROUPED.fullmatch(text) else text.replace(",", ".")
    try:
        if whole and re.fullmatch(r"[+-]?\d+", text):
            return int(text)  # not by way of a float, which would round beyond 2^53
        number = float(text)
    except ValueError:
        example = "20" if whole else "0.0001 or 1e-4"
        raise ConfigError(f"{name} is {value!r}, but must be a number such as {example}.") from None
    if not whole:
        return number
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise ConfigError(f"{name} is {value}, but must be a whole number.")
    return int(number)


def _input(config: Any, field: dataclasses.Field, choices: list | None) -> gr.components.Component:
    """The fitting input. Numbers with a fraction are text boxes, because browsers' number boxes refuse 1e-4; and so are
    numbers that may be left out, because Gradio's number box sends 0 for an empty one as soon as it is rendered."""
    value = shown(to_dict(config)[field.name])
    hint = typing.get_type_hints(type(config))[field.name]
    options = {"label": label(field.name), "info": field.metadata["help"], "min_width": 150}
    choices = choices or (list(field.metadata["choices"]) if field.metadata["choices"] else None)
    if choices:
        return gr.Dropdown(choices, value=value, filterable=len(choices) > 8, **options)
    if hint is bool:
        return gr.Checkbox(value=value, **options)
    if hint is int:
        return gr.Number(value=value, precision=0, **options)
    if typing.get_origin(hint) is tuple:
        return gr.Textbox(value=value, lines=min(4, max(1, str(value).count("\n") + 1)), **options)
    return gr.Textbox(value=value, max_lines=1, **options)
