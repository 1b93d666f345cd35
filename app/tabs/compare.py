"""Compare: is the fine-tune better? A blind vote first, then the pictures, the judge and the reward curves.

The tab shows one comparison at a time, in one of three faces: it is being sampled, it is being voted on, or its verdict
is out. Only the third says who made a picture; the first two get nothing from the server that could tell.
"""

import gradio as gr
from gradio.context import Context

from app import choices, comparisons, devices, jobs, verdict
from app.components.before_after import before_after
from app.components.pair_picker import pair_picker
from app.lab import Lab
from app.tabs import compare_curves, compare_form, compare_list, search_form
from app.tabs.events import EVERY, LAST, ONCE, QUIET, in_turn, kept
from lpo.export_card import plain
from storage import comparisons as stored
from storage.models import Comparison

OPEN = ("preparing", "voting")
EMPTY = {"a": "", "b": "", "rows": []}


def build(lab: Lab) -> None:
    """The tab. Gradio state: the comparison that is looked at, and what of it was drawn last."""
    tab = Context.block
    with gr.Accordion("New comparison", open=True, elem_id="compare-new") as fold:
        form = compare_form.build()
    with gr.Accordion("All comparisons", open=False, elem_id="compare-past") as past:
        listing = compare_list.build()
    title = gr.Markdown(elem_id="compare-title")
    resume = gr.Button("Resume the sampling", size="sm", visible=False, elem_id="compare-resume", elem_classes=ONCE)
    with gr.Column(visible=False, elem_id="compare-vote") as voting:
        picker = pair_picker(None, "compare-picker")
        with gr.Row(equal_height=True):
            standing = gr.Markdown(elem_id="compare-standing")
            peek = gr.Button("How does it stand?", size="sm", scale=0, min_width=160, elem_id="compare-peek")
            finish = gr.Button(
                "Show the verdict", size="sm", scale=0, min_width=150, elem_id="compare-finish", elem_classes=ONCE
            )
            give_up = gr.Button("Give up blindness…", size="sm", scale=0, min_width=160, elem_id="compare-give-up")
        told = gr.Markdown(elem_id="compare-told")
        with gr.Row(visible=False, equal_height=True) as sure:
            gr.Markdown(
                "This ends the vote for good, without a verdict, and the list will say so. The votes stay labels."
            )
            yes = gr.Button(
                "Give up, show who made what", variant="stop", size="sm", scale=0, min_width=240,
                elem_id="compare-sure", elem_classes=ONCE,
            )  # fmt: skip
            no = gr.Button("Go on voting", size="sm", scale=0, min_width=120)
    with gr.Column(visible=False, elem_id="compare-verdict") as out:
        words = gr.HTML(css_template=verdict.STYLE, apply_default_css=False, elem_id="compare-words")
        with gr.Row():
            again = gr.Button("Vote again on new prompts", size="sm", scale=0, min_width=220, elem_id="compare-again")
            earlier = gr.Button(
                "Try an earlier checkpoint", size="sm", scale=0, min_width=220, elem_id="compare-earlier"
            )
        pictures = before_after("compare-pictures")
        curves = compare_curves.build(lab)
    search, chosen, drawn = form.search, gr.State(None), gr.State(None)
    timer = gr.Timer(1.0, active=False)
    panel = [
        listing,
        title,
        voting,
        picker,
        standing,
        peek,
        finish,
        sure,
        out,
        words,
        pictures,
        told,
        resume,
        timer,
        drawn,
    ]

    def start(*values):
        try:
            comparison_id = compare_form.create(lab, *values)
        except ValueError as error:
            return gr.skip(), f"⚠️ {error}", gr.skip(), *(gr.skip() for _ in panel)
        return comparison_id, gr.skip(), gr.Accordion(open=False), *draw(lab, comparison_id, None)

    def enter(comparison_id, a, b, count, below, scorer):
        row = comparisons.latest(lab) if comparison_id is None else None
        comparison_id = row.id if row else comparison_id
        wanted = compare_form.asked(lab)
        fresh = [*compare_form.refresh(lab, a, b, count, wanted), *search_form.refresh(lab, below, scorer)]
        unfold = gr.Accordion(open=True) if wanted else gr.Accordion(open=False) if row else gr.skip()
        return *fresh, comparison_id, unfold, *draw(lab, comparison_id, None)

    def add_search(a, eta, *values):
        try:
            value = search_form.add(lab, *values)
        except ValueError as error:
            return gr.skip(), gr.skip(), gr.skip(), f"⚠️ {error}"
        words, noise = f"Policy B is **{plain(search_form.name_of(lab, value))}** now.", gr.skip()
        if not eta and choices.split(value)[1]["method"] == "steps":
            noise, words = 1.0, f"{words} eta is 1 for both, because siblings differ by their noise."
        known = choices.sampling_policies(lab)
        return kept(known, a), gr.Dropdown(known, value=value), noise, words

    def forget_searches(a, b):
        choices.forget_searches(lab)
        known = choices.sampling_policies(lab)
        left = dict(map(reversed, known))
        sides = (gr.Dropdown(known, **{} if v in left else {"value": choices.split(v)[0]}) for v in (a, b))
        return *sides, "The searches are off the lists."

    def end(comparison_id, close):
        try:
            close(lab.store, comparison_id)
        except ValueError as error:
            gr.Warning(str(error))
        return draw(lab, comparison_id, None)

    def look(comparison_id):
        votes = stored.comparison_progress(lab.store, comparison_id)["votes"]
        return f"After {votes} votes: {comparisons.peek(lab, stored.get_comparison(lab.store, comparison_id))}"

    def go_on(comparison_id):
        try:
            jobs.resume(lab, comparisons.compare_job(lab, comparison_id))
        except ValueError as error:
            gr.Warning(str(error))
        return draw(lab, comparison_id, None)

    def pick(event: gr.EventData):
        return int(event.item)

    def refill(comparison_id, step_back):
        row = stored.get_comparison(lab.store, comparison_id)
        a, strength_a, b, strength_b, words = compare_form.fill(lab, row, step_back)
        known = choices.sampling_policies(lab)  # a search that had been forgotten is back
        sides = gr.Dropdown(known, value=a), strength_a, gr.Dropdown(known, value=b), strength_b
        return gr.Accordion(open=True), *sides, words, row.plan["sampler"].get("eta", 0.0)

    quiet = in_turn("compare")
    form.go.click(start, form.inputs, [chosen, form.note, fold, *panel], **quiet)
    fresh = [*form.fresh, *search.fresh]
    asked = [chosen, form.a, form.b, form.count, *search.fresh]
    opened = tab.select(enter, asked, [*fresh, chosen, fold, *panel], **quiet)
    added = search.go.click(
        add_search, [form.a, form.eta, *search.inputs], [form.a, form.b, form.eta, search.told], **quiet
    )
    added.then(compare_form.estimate, form.asked, form.note, **quiet, **LAST)
    search.forget.click(forget_searches, [form.a, form.b], [form.a, form.b, search.told], **quiet)
    opened.then(lambda chosen: compare_curves.lrm_choices(lab, chosen), curves.lrms, curves.lrms, **QUIET, **LAST)
    picker.submit(lambda chosen, drawn: draw(lab, chosen, drawn), [chosen, drawn], panel, **quiet)
    timer.tick(lambda chosen, drawn: draw(lab, chosen, drawn), [chosen, drawn], panel, **quiet)
    picked = listing.select(pick, None, chosen, **quiet, **EVERY)
    picked.then(lambda chosen: draw(lab, chosen, None), chosen, panel, **quiet, **LAST).then(
        lambda: [gr.Accordion(open=False)] * 2, None, [past, fold], **quiet, **LAST
    )
    peek.click(look, chosen, told, **quiet)
    resume.click(go_on, chosen, panel, **quiet)
    finish.click(lambda chosen: end(chosen, stored.complete), chosen, panel, **quiet)
    give_up.click(lambda: gr.Row(visible=True), None, sure, **quiet)
    no.click(lambda: gr.Row(visible=False), None, sure, **quiet)
    yes.click(lambda chosen: end(chosen, stored.abandon), chosen, panel, **quiet)
    again.click(lambda chosen: refill(chosen, False), chosen, [fold, *form.sides, form.eta], **quiet)
    earlier.click(lambda chosen: refill(chosen, True), chosen, [fold, *form.sides, form.eta], **quiet)
    compare_curves.connect(lab, curves, chosen, drawn)


def draw(lab: Lab, comparison_id: int | None, before: list | None) -> list:
    """Values for the panel; parts that have not changed since `before` (what `drawn` holds) are left alone.

    A fixed vote whose last planned answer is in is completed here: there is nothing left to decide.
    """
    if comparison_id is None:
        return [compare_list.table(lab, None), "", *_hidden(), gr.Button(visible=False), gr.Timer(active=False), None]
    row = stored.get_comparison(lab.store, comparison_id)
    progress = stored.comparison_progress(lab.store, comparison_id)
    if row.state == "voting" and progress["votes"] >= progress["planned"]:
        row = stored.complete(lab.store, comparison_id)
    face = [comparison_id, row.state]
    timer = gr.Timer(active=row.state in OPEN)
    a, b = comparisons.names(lab, row)
    head = f"**#{row.id} · {plain(a)} against {plain(b)}**"
    if row.state == "preparing":
        words, halted = _sampling(lab, row, progress)
        listed = gr.skip() if face == before else compare_list.table(lab, row.id)
        return [listed, f"{head} · {words}", *_hidden(), gr.Button(visible=halted), timer, face]
    if row.state == "voting":
        voting = f"{head} · in random order and on random sides, so nothing here says which is which."
        asked = {"study": row.study_id, "comparison": row.id}
        peeking, over = bool(row.plan.get("peeking")), progress["left"] == 0
        count, finish = _count(row, progress), gr.Button(visible=peeking or over)
        if face == before:  # only the count moves; a picker that is being used is never redrawn
            return [gr.skip()] * 4 + [count, gr.skip(), finish, *[gr.skip()] * 6, timer, face]
        return [compare_list.table(lab, row.id), voting, gr.Column(visible=True), asked, count,
                gr.Button(visible=peeking), finish, gr.Row(visible=False), gr.Column(visible=False), "", EMPTY,
                "", gr.Button(visible=False), timer, face]  # fmt: skip
    if face == before:
        return [gr.skip()] * 13 + [timer, face]
    shown = comparisons.rows(lab, row)
    said = _verdict(lab, row, shown)
    return [compare_list.table(lab, row.id), f"{head} · {_plan_words(row)}", gr.Column(visible=False), None, "",
            gr.skip(), gr.skip(), gr.Row(visible=False), gr.Column(visible=True), said, shown,
            "", gr.Button(visible=False), timer, face]  # fmt: skip


def _hidden() -> list:
    """The panel between title and timer when there is nothing to vote on or to show."""
    return [
        gr.Column(visible=False),
        None,
        "",
        gr.skip(),
        gr.skip(),
        gr.Row(visible=False),
        gr.Column(visible=False),
        "",
        EMPTY,
        "",
    ]


def _sampling(lab: Lab, row: Comparison, progress: dict) -> tuple[str, bool]:
    """How far the sampling is, and whether it has halted and could be resumed."""
    total = len(row.plan["prompts"]) * len(row.plan["seeds"])
    job_id = comparisons.compare_job(lab, row.id)
    job = jobs.describe(lab, job_id) if job_id else None
    if job is None or job["state"] in ("failed", "stopped", "cancelled"):
        gone = "The job that sampled this comparison was deleted; start a new one."
        why = (job["error"] or "The sampling was stopped.") if job else gone
        return f"⚠️ {why}", job is not None
    if job["state"] == "queued":
        return "waiting for the worker…", False
    if devices.waits(job["message"]):
        return f"{job['message']}.", False
    return f"sampling, {progress['pairs']} of {total} pairs…", False


def _count(row: Comparison, progress: dict) -> str:
    if row.plan.get("peeking"):
        return f"{progress['votes']} votes so far. Looking is free: the interval stays valid however often you look."
    if progress["left"] == 0:
        return (
            f"{progress['votes']} of {progress['planned']} votes, {progress['skipped']} pairs were skipped. "
            "Take a skip back with U, or have the verdict without them."
        )
    return f"{progress['votes']} of {progress['planned']} votes; the verdict comes by itself after the last one."


def _plan_words(row: Comparison) -> str:
    sampler = row.plan["sampler"]
    settings = ", ".join(f"{name} {sampler[name]:g}" for name in ("steps", "guidance_scale", "eta") if name in sampler)
    return f"prompts × seeds: {len(row.plan['prompts'])} × {len(row.plan['seeds'])}, {settings}"


def _verdict(lab: Lab, row: Comparison, shown: dict) -> str:
    """The picture and the words of an ended comparison."""
    result = comparisons.summary(row, stored.comparison_results(lab.store, row.id))
    words = comparisons.verdict_sentence(result, shown, row)
    method = (
        f"Interval valid at any look (betting on {result.counted} complete prompts)."
        if row.plan.get("peeking")
        else f"{row.plan['votes']} votes were fixed beforehand; interval by bootstrap over {result.counted} prompts."
    )
    extra = [
        f"Both bad among the ties: {result.both_bad}." if result.both_bad else "",
        comparisons.judge_words(shown),
        comparisons.takes_words(lab, row),
        comparisons.warning(lab, row, result),
        f"{method} The votes are labels now and count in the next training, except on held-out prompts.",
    ]
    return verdict.picture(result, shown["a"], shown["b"], words, extra)
