"""Compare: is the fine-tune better? A blind vote first, then the pictures, the judge and the reward curves.

The form of a new comparison, the list of all, and the one that is looked at (compare_panel.py).
"""

import gradio as gr
from gradio.blocks import BlockContext
from gradio.context import Context

from app import choices, comparisons, jobs
from app.lab import Lab
from app.tabs import compare_curves, compare_form, compare_list, compare_panel, search_form
from app.tabs.compare_form import Form
from app.tabs.compare_panel import Panel
from app.tabs.events import EVERY, LAST, QUIET, in_turn, kept
from app.words import warning
from lpo.export_card import plain
from storage import comparisons as stored

TURNS = in_turn("compare")


def build(lab: Lab) -> None:
    """The tab. Gradio state: the comparison that is looked at, and what of it was drawn last."""
    tab = Context.block
    with gr.Accordion("New comparison", open=True, elem_id="compare-new") as fold:
        form = compare_form.build()
    with gr.Accordion("All comparisons", open=False, elem_id="compare-past") as past:
        listing = compare_list.build()
    panel = compare_panel.build(listing)
    with panel.out:
        curves = compare_curves.build(lab)
    chosen = gr.State(None)

    def draw(comparison_id, before=None):
        return panel.values(compare_panel.face(lab, comparison_id, before))

    def pick(event: gr.EventData):
        return int(event.item)

    opened = _connect_form(lab, tab, form, panel, chosen, fold, draw)
    opened.then(lambda chosen: compare_curves.lrm_choices(lab, chosen), curves.lrms, curves.lrms, **QUIET, **LAST)
    picked = listing.select(pick, None, chosen, **TURNS, **EVERY)
    picked.then(draw, chosen, panel.shown, **TURNS, **LAST).then(
        lambda: [gr.Accordion(open=False)] * 2, None, [past, fold], **TURNS, **LAST
    )
    _connect_search(lab, form)
    _connect_panel(lab, form, panel, chosen, fold, draw)
    compare_curves.connect(lab, curves, chosen, panel.drawn)


def _connect_form(lab: Lab, tab: BlockContext, form: Form, panel: Panel, chosen: gr.State, fold, draw):
    """A new comparison, and fresh choices whenever the tab is opened; returns the event of that."""
    search = form.search

    def start(*values):
        try:
            comparison_id = compare_form.create(lab, *values)
        except ValueError as error:
            return {form.note: warning(error)}
        return {chosen: comparison_id, fold: gr.Accordion(open=False), **draw(comparison_id)}

    def enter(comparison_id, a, b, count, below, scorer):
        row = comparisons.latest(lab) if comparison_id is None else None
        comparison_id = row.id if row else comparison_id
        wanted = compare_form.asked(lab)
        values = {chosen: comparison_id, **draw(comparison_id)}
        values |= zip(form.fresh, compare_form.refresh(lab, a, b, count, wanted), strict=True)
        values |= zip(search.fresh, search_form.refresh(lab, below, scorer), strict=True)
        return values | ({fold: gr.Accordion(open=bool(wanted))} if wanted or row else {})

    form.go.click(start, form.inputs, [chosen, form.note, fold, *panel.shown], **TURNS)
    asked = [chosen, form.a, form.b, form.count, *search.fresh]
    return tab.select(enter, asked, [*form.fresh, *search.fresh, chosen, fold, *panel.shown], **TURNS)


def _connect_search(lab: Lab, form: Form) -> None:
    """The fold that makes a policy out of a policy and an LRM."""
    search = form.search

    def add(a, eta, *values):
        try:
            value = search_form.add(lab, *values)
        except ValueError as error:
            return {search.told: warning(error)}
        known = choices.sampling_policies(lab)
        words = f"Policy B is **{plain(search_form.name_of(lab, value))}** now."
        changed = {form.a: kept(known, a), form.b: gr.Dropdown(known, value=value), search.told: words}
        if eta or choices.split(value)[1]["method"] != "steps":
            return changed
        return changed | {
            form.eta: 1.0, search.told: f"{words} eta is 1 for both, because siblings differ by their noise."
        }  # fmt: skip

    def forget(a, b):
        choices.forget_searches(lab)
        known = choices.sampling_policies(lab)
        left = dict(map(reversed, known))
        sides = (gr.Dropdown(known, **{} if v in left else {"value": choices.split(v)[0]}) for v in (a, b))
        return *sides, "The searches are off the lists."

    changed = [form.a, form.b, form.eta, search.told]
    added = search.go.click(add, [form.a, form.eta, *search.inputs], changed, **TURNS)
    added.then(compare_form.estimate, form.asked, form.note, **TURNS, **LAST)
    search.forget.click(forget, [form.a, form.b], [form.a, form.b, search.told], **TURNS)


def _connect_panel(lab: Lab, form: Form, panel: Panel, chosen: gr.State, fold, draw) -> None:
    """The vote, the ways in which it ends, and what may come after it."""

    def end(comparison_id, close):
        try:
            close(lab.store, comparison_id)
        except ValueError as error:
            gr.Warning(str(error))
        return draw(comparison_id)

    def go_on(comparison_id):
        try:
            jobs.resume(lab, comparisons.compare_job(lab, comparison_id))
        except ValueError as error:
            gr.Warning(str(error))
        return draw(comparison_id)

    def look(comparison_id):
        votes = stored.comparison_progress(lab.store, comparison_id)["votes"]
        return f"After {votes} votes: {comparisons.peek(lab, stored.get_comparison(lab.store, comparison_id))}"

    def refill(comparison_id, step_back):
        row = stored.get_comparison(lab.store, comparison_id)
        a, strength_a, b, strength_b, words = compare_form.fill(lab, row, step_back)
        known = choices.sampling_policies(lab)  # a search that had been forgotten is back
        sides = gr.Dropdown(known, value=a), strength_a, gr.Dropdown(known, value=b), strength_b
        return gr.Accordion(open=True), *sides, words, row.plan["sampler"].get("eta", 0.0)

    followed = [chosen, panel.drawn]
    panel.picker.submit(draw, followed, panel.shown, **TURNS)
    panel.timer.tick(draw, followed, panel.shown, **TURNS)
    panel.peek.click(look, chosen, panel.told, **TURNS)
    panel.resume.click(go_on, chosen, panel.shown, **TURNS)
    panel.finish.click(lambda chosen: end(chosen, stored.complete), chosen, panel.shown, **TURNS)
    panel.give_up.click(lambda: gr.Row(visible=True), None, panel.sure, **TURNS)
    panel.no.click(lambda: gr.Row(visible=False), None, panel.sure, **TURNS)
    panel.yes.click(lambda chosen: end(chosen, stored.abandon), chosen, panel.shown, **TURNS)
    filled = [fold, *form.sides, form.eta]
    panel.again.click(lambda chosen: refill(chosen, False), chosen, filled, **TURNS)
    panel.earlier.click(lambda chosen: refill(chosen, True), chosen, filled, **TURNS)
