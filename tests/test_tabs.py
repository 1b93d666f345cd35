"""How the handlers of the whole page are wired: late answers must not cover the answer to a later click, and no choice
may be dropped. (What that does behind a slow line is tried in test_tabs_browser.py.)"""

from collections import defaultdict

import gradio as gr

from app import ui
from app.components.choice import Choice

STAY = {"precision", "annotator", "origin", "study", "score gaps", "import that the CSV belongs to, row by row", None}


def test_handlers_that_write_the_same_component_take_turns(lab):
    blocks = ui.build_ui(lab)
    writers = defaultdict(set)
    for function in blocks.fns.values():
        if function.fn is None or function.targets[0][1] == "load":  # in the browser; before anybody can click
            continue
        turn = function.concurrency_id if function.concurrency_limit == 1 else id(function)
        for output in function.outputs:
            writers[output].add(turn)
    assert len(writers) > 100
    assert [(block, block.elem_id) for block, turns in writers.items() if len(turns) > 1] == []


def test_no_choice_is_dropped_while_another_is_under_way(lab):
    """Gradio's default, "once", drops them; it is right for buttons, polls and opened tabs."""
    blocks = ui.build_ui(lab)
    for function in blocks.fns.values():
        block, event = function.targets[0]
        choice = event in ("change", "input") or (event == "select" and type(blocks.blocks[block]).__name__ != "Tab")
        if function.fn is not None and (choice or event == "then"):
            assert function.trigger_mode != "once", (function.targets, [each.elem_id for each in function.outputs])


def test_a_choice_that_vanished_gets_our_own_sentence(lab):
    """Gradio refuses what is in none of the lists that it sent, in words of its own, before a handler is asked."""
    outputs = {output for function in ui.build_ui(lab).fns.values() if function.fn for output in function.outputs}
    lists = {each for each in outputs if isinstance(each, gr.Dropdown)}
    plain = {each.label for each in lists if not isinstance(each, Choice)}
    assert plain <= STAY  # nothing that they offer can vanish
    assert len(lists) > 20


def test_a_refusal_shows_every_character_of_names_and_paths(lab):
    """It is shown as Markdown, in which a study named <XL> was gone with all that followed, and _a_ had no lines."""
    create = next(each.fn for each in ui.build_ui(lab).fns.values() if each.name == "create")
    asked = "Tiny <XL>", "scenes", "Which?", "a ball", None
    assert not create(*asked)[-1].startswith("⚠️")
    assert "named 'Tiny &lt;XL&gt;'" in create(*asked)[-1]
    told = create("Other", "/my_*_models/[a]", *asked[2:])[-1]
    assert told.startswith(r"⚠️ There is no model at /my\_\*\_models/\[a\]: ")
