"""How the tabs' handlers run: without a spinner, one after another where they write the same components, and never over
what a person chose or typed meanwhile."""

import gradio as gr

QUIET = {"show_progress": "hidden", "api_visibility": "private"}

# Gradio drops an event while the answer to the one before is under way. That is right for a button, but not for a
# choice of something (EVERY one reaches the server), nor for what is shown after it (at LAST, what was chosen last).
EVERY, LAST = {"trigger_mode": "multiple"}, {"trigger_mode": "always_last"}

ONCE = "once"  # class of the buttons that start something: a double click on them is one click, see ui.JS


def in_turn(name: str) -> dict:
    """For all handlers that write the components of the group `name`, on whatever page: they run one at a time, in the
    order of the clicks, so that a slow answer never covers the answer to a later click."""
    return QUIET | {"concurrency_id": name, "concurrency_limit": 1}


def kept(options: list[tuple], value, instead=None) -> gr.Dropdown:
    """A dropdown's fresh (label, value) choices. It is given a value, `instead` or the first, only if `value` is none
    of them: what was chosen while this was on its way stands."""
    values = [each for _, each in options]
    if value in values:
        return gr.Dropdown(options)
    return gr.Dropdown(options, value=next(iter(values), None) if instead is None else instead)
