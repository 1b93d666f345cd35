"""The comparison that is looked at, in one of three faces: it is being sampled, it is being voted on, or its verdict is
out. Only the third says who made a picture; the first two get nothing from the server that could tell.
"""

from dataclasses import dataclass

import gradio as gr

from app import comparisons, devices, jobs, verdict
from app.components.before_after import before_after
from app.components.pair_picker import pair_picker
from app.lab import Lab
from app.tabs import compare_list
from app.tabs.events import ONCE
from app.words import warning
from lpo.export_card import plain
from storage import comparisons as stored
from storage.models import Comparison

OPEN = ("preparing", "voting")
PRESSED_ONLY = ("give_up", "yes", "no", "again", "earlier")  # buttons that every face leaves as they are
NO_PICTURES = {"a": "", "b": "", "rows": []}


@dataclass(frozen=True)
class Panel:
    """The components; what `face` returns has their names. `drawn` is the state that says what was drawn last."""

    listing: gr.HTML
    title: gr.Markdown
    resume: gr.Button
    voting: gr.Column
    picker: gr.HTML
    standing: gr.Markdown
    peek: gr.Button
    finish: gr.Button
    give_up: gr.Button
    told: gr.Markdown
    sure: gr.Row
    yes: gr.Button
    no: gr.Button
    out: gr.Column
    words: gr.HTML
    again: gr.Button
    earlier: gr.Button
    pictures: gr.HTML
    timer: gr.Timer
    drawn: gr.State

    @property
    def shown(self) -> list:
        """All that a face may fill."""
        return [component for name, component in vars(self).items() if name not in PRESSED_ONLY]

    def values(self, face: dict) -> dict:
        """A face for the page: a handler whose outputs hold `shown` returns it, and the rest is left as it is."""
        return {getattr(self, name): value for name, value in face.items()}


def build(listing: gr.HTML) -> Panel:
    """The panel below the form and the list."""

    def button(text: str, name: str, width: int, **options) -> gr.Button:
        return gr.Button(text, size="sm", scale=0, min_width=width, elem_id=f"compare-{name}", **options)

    title = gr.Markdown(elem_id="compare-title")
    resume = gr.Button("Resume the sampling", size="sm", visible=False, elem_id="compare-resume", elem_classes=ONCE)
    with gr.Column(visible=False, elem_id="compare-vote") as voting:
        picker = pair_picker(None, "compare-picker")
        with gr.Row(equal_height=True):
            standing = gr.Markdown(elem_id="compare-standing")
            peek = button("How does it stand?", "peek", 160)
            finish = button("Show the verdict", "finish", 150, elem_classes=ONCE)
            give_up = button("Give up blindness…", "give-up", 160)
        told = gr.Markdown(elem_id="compare-told")
        with gr.Row(visible=False, equal_height=True) as sure:
            gr.Markdown(
                "This ends the vote for good, without a verdict, and the list will say so. The votes stay labels."
            )
            yes = button("Give up, show who made what", "sure", 240, variant="stop", elem_classes=ONCE)
            no = gr.Button("Go on voting", size="sm", scale=0, min_width=120)
    with gr.Column(visible=False, elem_id="compare-verdict") as out:
        words = gr.HTML(css_template=verdict.STYLE, apply_default_css=False, elem_id="compare-words")
        with gr.Row():
            again = button("Vote again on new prompts", "again", 220)
            earlier = button("Try an earlier checkpoint", "earlier", 220)
        pictures = before_after("compare-pictures")
    return Panel(
        listing, title, resume, voting, picker, standing, peek, finish, give_up, told, sure, yes, no, out, words, again,
        earlier, pictures, timer=gr.Timer(1.0, active=False), drawn=gr.State(None),
    )  # fmt: skip


def face(lab: Lab, comparison_id: int | None, before: list | None) -> dict:
    """Values by the names of `Panel`; parts that have not changed since `before` (what `drawn` holds) are left out.

    A fixed vote whose last planned answer is in is completed here: there is nothing left to decide.
    """
    if comparison_id is None:
        listed = compare_list.table(lab, None)
        return {"listing": listed, "title": "", **_bare(), "timer": gr.Timer(active=False), "drawn": None}
    row = stored.get_comparison(lab.store, comparison_id)
    progress = stored.comparison_progress(lab.store, comparison_id)
    if row.state == "voting" and progress["votes"] >= progress["planned"]:
        row = stored.complete(lab.store, comparison_id)
    drawn = [comparison_id, row.state]
    values = {"timer": gr.Timer(active=row.state in OPEN), "drawn": drawn}
    if drawn != before:
        values["listing"] = compare_list.table(lab, row.id)
    a, b = comparisons.names(lab, row)
    head = f"**#{row.id} · {plain(a)} against {plain(b)}**"
    if row.state == "preparing":
        words, halted = _sampling(lab, row, progress)
        return values | _bare() | {"title": f"{head} · {words}", "resume": gr.Button(visible=halted)}
    if row.state == "voting":
        values |= {"standing": _count(row, progress), "finish": gr.Button(visible=_may_finish(row, progress))}
        return values if drawn == before else _ballot(row, head) | values  # a picker in use is never redrawn
    return values if drawn == before else values | _verdict(lab, row, head)


def _bare() -> dict:
    """The panel below its title when there is nothing to vote on or to show."""
    nothing = {"picker": None, "standing": "", "words": "", "pictures": NO_PICTURES, "told": ""}
    hidden = {"voting": gr.Column(visible=False), "sure": gr.Row(visible=False), "out": gr.Column(visible=False)}
    return nothing | hidden | {"resume": gr.Button(visible=False)}


def _ballot(row: Comparison, head: str) -> dict:
    """The panel as voting begins."""
    return _bare() | {
        "title": f"{head} · in random order and on random sides, so nothing here says which is which.",
        "voting": gr.Column(visible=True),
        "picker": {"study": row.study_id, "comparison": row.id},
        "peek": gr.Button(visible=bool(row.plan.get("peeking"))),
    }


def _verdict(lab: Lab, row: Comparison, head: str) -> dict:
    """The panel of an ended comparison: who made what, and what the votes say."""
    shown = comparisons.rows(lab, row)
    return _bare() | {
        "title": f"{head} · {_plan_words(row)}",
        "out": gr.Column(visible=True),
        "words": _verdict_words(lab, row, shown),
        "pictures": shown,
    }


def _sampling(lab: Lab, row: Comparison, progress: dict) -> tuple[str, bool]:
    """How far the sampling is, and whether it has halted and could be resumed."""
    total = len(row.plan["prompts"]) * len(row.plan["seeds"])
    job_id = comparisons.compare_job(lab, row.id)
    job = jobs.describe(lab, job_id) if job_id else None
    if job is None or job["state"] in ("failed", "stopped", "cancelled"):
        gone = "The job that sampled this comparison was deleted; start a new one."
        why = (job["error"] or "The sampling was stopped.") if job else gone
        return warning(why), job is not None
    if job["state"] == "queued":
        return jobs.waiting(lab), False
    if devices.waits(job["message"]):
        return f"{job['message']}.", False
    return f"sampling, {progress['pairs']} of {total} pairs…", False


def _may_finish(row: Comparison, progress: dict) -> bool:
    return bool(row.plan.get("peeking")) or progress["left"] == 0


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


def _verdict_words(lab: Lab, row: Comparison, shown: dict) -> str:
    """The picture and the words of an ended comparison, as HTML."""
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
