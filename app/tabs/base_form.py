"""A form of settings that follows the base of the current study (Train, Curves): on another base it shows the preset of
that base's family, but for what a person has typed since the server was asked.

In the browser: `noted` keeps what the form holds when an event comes, a handler answers with `base_of`, and `follow`
fills the form from the three of them.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import gradio as gr
from gradio.events import Dependency

from app.lab import Lab
from app.tabs.events import QUIET
from lpo.preflight import family

# From what was there when the server was asked, what it answered, and what is there now.
FOLLOW = """(seen, base, filled, ...now) => {
  const before = JSON.parse(seen).slice(%d), own = (%s)[base.split(' ')[0]];
  if (base === filled) return [];
  if (%s && now[0] !== before[0]) return [base];
  return [base, ...now.map((value, i) => JSON.stringify(value) === JSON.stringify(before[i]) ? own[i] : undefined)];
}"""


class Filled(NamedTuple):
    """A form, as far as it follows."""

    base: gr.Textbox  # what `base_of` said when the form was filled
    inputs: list  # what depends on the base's family
    values: dict[str, list]  # and what it then is
    by_preset: bool = False  # the first of them is a preset, which fills the others: once chosen, all of it stays


def base_of(lab: Lab) -> str:
    """The family of the current study's base, and its name."""
    base = lab.current_study().base
    return f"{family(base)} {base}"


def noted(event: Callable, inputs: list) -> tuple[Dependency, gr.Textbox]:
    """The event's first step, and where it keeps what `inputs` hold; a handler that follows takes that and gives it
    back, since the same event may come again before its answer."""
    seen = gr.Textbox(visible=False)
    return event(None, inputs, seen, js="(...values) => JSON.stringify(values)", **QUIET), seen


def follow(event: Dependency, seen: gr.Textbox, base: gr.Textbox, form: Filled, start: int = 0) -> Dependency:
    """After `event`, which answered in `seen` and `base`: fills a form whose inputs begin at `start` of those noted."""
    js = FOLLOW % (start, json.dumps(form.values), json.dumps(form.by_preset))
    return event.then(None, [seen, base, form.base, *form.inputs], [form.base, *form.inputs], js=js, **QUIET)
