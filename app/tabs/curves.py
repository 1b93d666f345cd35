"""Curves: what an LRM thinks of a picture while it is being made.

A person picks a prompt, seeds, policies and LRMs and presses Trace; the page then polls the files that the worker
writes. Nothing is held open, so leaving and coming back shows the same curves.
"""

import dataclasses
import re
from typing import NamedTuple

import gradio as gr
from gradio.context import Context

from app import choices, forms, jobs, reports, traces
from app.components.choice import Choice
from app.components.reward_plot import RewardPlot
from app.figures import rewards
from app.lab import Lab
from app.tabs import base_form, search_form
from app.tabs.events import LAST, in_turn
from app.words import warning
from lpo.config import PRESETS, ConfigError, TraceConfig, from_preset, to_dict
from lpo.export_card import plain
from lpo.preflight import family
from storage import checkpoints, studies

LAST_CHOICE = "curves_choice"
MOST_TRAJECTORIES = 24
MOST_CANDIDATES = 128  # of one policy's search, over all seeds
ENDED = ("done", "failed", "stopped", "cancelled")
PLOT_HEIGHT = 500
HELLO = (
    "Press **Trace** to see how the reward of these pictures grows while they are made: an LRM scores every step from "
    "noise to picture."
)
FALLBACK_PROMPT = "a red circle on a meadow"
SIBLINGS = 4  # of every step, so that they can be shown without tracing again
OTHER_BASE = (
    "Nothing was traced: meanwhile the study is on another base than these settings. Open this tab anew, and look at "
    "them before you press once more."
)


class Asked(NamedTuple):
    """What a person chooses, left of the plot."""

    prompt: gr.Textbox
    seeds: gr.Textbox
    policies: gr.Dropdown
    lrms: gr.Dropdown


class Shown(NamedTuple):
    """What `draw` answers with."""

    status: gr.Markdown
    plot: gr.HTML
    timer: gr.Timer


class Buttons(NamedTuple):
    other: gr.Button
    go: gr.Button
    siblings: gr.Checkbox


def _layout(lab: Lab) -> tuple[Asked, Buttons, Shown]:
    with gr.Row():
        with gr.Column(scale=0, min_width=270):
            prompt = gr.Textbox(label="prompt", lines=1, max_lines=4, elem_id="curves-prompt")
            other = gr.Button("Another prompt", size="sm")
            seeds = gr.Textbox("0 1 2", label="seeds", max_lines=1, elem_id="curves-seeds")
            policies = Choice([("base", choices.BASE)], value=[choices.BASE], multiselect=True, label="policies")
            lrms = Choice([], value=[], multiselect=True, label="LRMs")
            go = gr.Button("Trace", variant="primary", elem_id="curves-trace")
            siblings = gr.Checkbox(
                False, label="Show siblings", elem_id="curves-siblings",
                info="how far the scores of the candidates lie apart that LPO draws at every step. Solid: it would "
                "keep best and worst as a pair; dotted: what they lack for that. With more than three curves, those of "
                "the one pointed at",
            )  # fmt: skip
        with gr.Column(scale=1):
            status = gr.Markdown(HELLO, elem_id="curves-status")
            plot = RewardPlot(traces.thumbnails(lab.store), PLOT_HEIGHT, "reward-curves", elem_id="curves-plot")
    timer = gr.Timer(0.4, active=False)
    return Asked(prompt, seeds, policies, lrms), Buttons(other, go, siblings), Shown(status, plot, timer)


def build(lab: Lab) -> None:
    """The tab. Its Gradio state is only what is being looked at: job, trajectories and LRMs; and what the last press of
    Trace was refused with, so that nothing drawn later covers it."""
    tab = Context.block
    asked, buttons, shown = _layout(lab)
    search = search_form.build("curves")
    presets = {name: from_preset(TraceConfig, name, siblings=SIBLINGS) for name in PRESETS["trace"]}
    form = forms.build(presets[family(lab.current_study().base)], leave_out=("lrm", "prompt", "seeds"), first=())
    settings = base_form.Filled(
        gr.Textbox(base_form.base_of(lab), visible=False),
        list(form.inputs),
        {name: form.show(config) for name, config in presets.items()},
    )
    base = gr.Textbox(visible=False)
    looking, refused = gr.State(None), gr.State("")
    filled = gr.State(None)  # the study whose last choice the form was given; from then on it is the person's

    def trace(page: gr.Request, prompt, seeds, policies, lrms, show, filled, *values):
        try:
            if filled != base_form.base_of(lab):
                raise ConfigError(OTHER_BASE)
            request = plan(lab, form, prompt, seeds, policies, lrms, values, jobs.trace_line(lab, "curves", page))
        except (ConfigError, ValueError) as error:
            return gr.skip(), warning(error), gr.skip(), gr.skip(), warning(error)
        choice = {"prompt": prompt, "seeds": seeds, "policies": policies, "lrms": lrms, "request": request}
        remember(lab, choice)
        return request, *draw(lab, request, show), ""

    def tick(request, show, refused):
        text, *drawn = draw(lab, request, show)
        return refused or text, *drawn

    def enter(filled, seen, policies, lrms, below, scorer):
        """Fresh choices, and at the first visit or if the Train tab asks for it, the last choice."""
        last, study = last_choice(lab), lab.current_study().id
        fill = filled != study or last.get("go", False)
        if fill:
            policies, lrms = last.get("policies", []), last.get("lrms", [])
        known = choices.sampling_policies(lab), choices.lrms(lab)
        return (
            (last.get("prompt") or example_prompt(lab, "")) if fill else gr.skip(),
            (last.get("seeds") or "0 1 2") if fill else gr.skip(),
            *(_still(options, chosen, fill) for options, chosen in zip(known, (policies, lrms), strict=True)),
            *search_form.refresh(lab, below, scorer),
            study,
            seen,
            base_form.base_of(lab),
            "",
        )

    def add_search(policies, *values):
        try:
            value = search_form.add(lab, *values)
        except ValueError as error:
            return gr.skip(), warning(error)
        words = f"**{plain(search_form.name_of(lab, value))}** is among the policies now: press **Trace**."
        return gr.Dropdown(choices.sampling_policies(lab), value=list(dict.fromkeys([*policies, value]))), words

    def forget_searches(policies):
        choices.forget_searches(lab)
        left = [value for value in policies if choices.split(value)[1] is None]
        return gr.Dropdown(choices.sampling_policies(lab), value=left), "The searches are off the lists."

    def look(page: gr.Request, show, refused, *given):
        """The curves of the last request; "Look at its curves" of the Train tab asks for new ones."""
        last = last_choice(lab)
        if last.pop("go", False):
            remember(lab, last)
            return trace(page, *given[:4], show, *given[4:])
        request = last.get("request")
        return request, *tick(request, show, refused), refused

    turns = in_turn("curves")
    for event in (buttons.go.click, asked.prompt.submit, asked.seeds.submit):
        event(trace, [*asked, buttons.siblings, settings.base, *form.inputs], [looking, *shown, refused], **turns)
    for event in (shown.timer.tick, buttons.siblings.change):
        event(tick, [looking, buttons.siblings, refused], [*shown], **turns)
    buttons.other.click(lambda text: example_prompt(lab, text), asked.prompt, asked.prompt, **turns)
    search.go.click(add_search, [asked.policies, *search.inputs], [asked.policies, search.told], **turns)
    search.forget.click(forget_searches, asked.policies, [asked.policies, search.told], **turns)
    opened, seen = base_form.noted(tab.select, settings.inputs)
    entering = [filled, seen, asked.policies, asked.lrms, *search.fresh]
    entered = [*asked, *search.fresh, filled, seen, base, refused]
    opened = base_form.follow(opened.then(enter, entering, entered, **turns, **LAST), seen, base, settings)
    given = [buttons.siblings, refused, *asked, settings.base, *form.inputs]
    opened.then(look, given, [looking, *shown, refused], **turns, **LAST)


def _still(options: list[tuple[str, str]], chosen: list[str], fill: bool) -> gr.Dropdown:
    """Fresh choices for a list to choose several from. It is given a value, what is left of `chosen` or else the first,
    only if it is to be filled, or something chosen is gone, or nothing is chosen: there was no LRM yet, perhaps."""
    values = [value for _, value in options]
    left = [value for value in chosen if value in values]
    stands = left and left == chosen and not fill
    return gr.Dropdown(options) if stands else gr.Dropdown(options, value=left or values[:1])


def plan(
    lab: Lab, form: forms.Form, prompt: str, seeds: str, policies: list[str], lrms: list[str], values, line: str
) -> dict:
    """The request behind a press of Trace, submitted as a job unless everything is stored already. It supersedes those
    of the same `line`.

    Returns {"job" (id or None), "traces", "lrms": [(name, path)], "total", "policies", "guidance_scale"}. Raises
    ValueError with one sentence.
    """
    if not prompt.strip():
        raise ConfigError("The prompt is empty; write what the picture shows.")
    if not policies:
        raise ConfigError("No policy is chosen; choose the base or an adapter.")
    if not lrms:
        raise ConfigError("No LRM is chosen; choose one, or train one in the Train tab.")
    names = {value: name for name, value in choices.sampling_policies(lab)}
    scorers = [list(scorer) for scorer in choices.named_lrms(lab, lrms)]
    chosen = choices.short_names([(names.get(value, value), choices.policy(lab, value)) for value in policies])
    config = form.read(
        values,
        prompt=prompt.strip(),
        seeds=list(read_seeds(seeds)),
        lrm=[path for _, path in scorers],
        policy=chosen[0][1],
    )
    if config.device == "auto":
        config = dataclasses.replace(config, device=lab.settings.device)
    planned = traces.plan(chosen, config)
    if len(planned) > MOST_TRAJECTORIES:
        raise ConfigError(
            f"{len(chosen)} policies with {len(config.seeds)} seeds are {len(planned)} trajectories; "
            f"choose at most {MOST_TRAJECTORIES} in all."
        )
    for _, policy in chosen:
        candidates = (policy.get("search") or {}).get("candidates", 1) * len(config.seeds)
        if candidates > MOST_CANDIDATES:
            raise ConfigError(
                f"{len(config.seeds)} seeds with {policy['search']['candidates']} candidates are {candidates} at once; "
                f"choose fewer of either, at most {MOST_CANDIDATES} in all."
            )
    request = {
        "traces": planned,
        "lrms": scorers,
        "total": config.steps,
        "policies": [policy for _, policy in chosen],
        "guidance_scale": config.guidance_scale,
    }
    if traces.complete(lab.store, planned, [path for _, path in scorers]):
        return {"job": None, **request}
    work = {"trace": to_dict(config), **request}
    return {"job": jobs.submit(lab, "trace", work, lab.current_study().id, supersedes=line), **request}


def read_seeds(text: str) -> tuple[int, ...]:
    """ "0 1 2", "0,1,2" or "0-2, 7" as numbers, each once. Raises ConfigError."""
    seeds: list[int] = []
    for part in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if match is None:
            raise ConfigError(f"Seeds are {text!r}, but must be whole numbers from 0, such as 0 1 2 or 0-5.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_TRAJECTORIES:
            raise ConfigError(f"Seeds are {part}; a range rises and has at most {MOST_TRAJECTORIES} numbers.")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))


def draw(lab: Lab, request: dict | None, siblings: bool):
    """Status line, plot and whether to keep polling, from what is on disk now."""
    if request is None:
        return HELLO, gr.skip(), gr.Timer(active=False)
    curves = traces.curves(lab.store, request["traces"], request["lrms"], request["total"])
    accuracy = [a for name, path in request["lrms"] if (a := reports.accuracy(choices.lrm_folder(path), name))]
    value = rewards(curves, accuracy, siblings, PLOT_HEIGHT)
    if "policies" in request:  # a choice that was kept before there were searches has none
        told = traces.costs(curves, request["policies"], request["traces"], request["guidance_scale"])
        value["note"] = f"{value['note']} {told}".strip()
    text = "" if any(s["score"] is not None for c in curves for s in c["steps"]) else HELLO
    active = False
    if request["job"] is not None:
        job = jobs.describe(lab, request["job"])
        active = job["state"] not in ENDED
        text = job_line(lab, job) or text
    if not active and not text and curves and siblings and not any("gap" in s for c in curves for s in c["steps"]):
        text = "These trajectories were traced without siblings; set siblings to 4 below and trace again."
    return text, value, gr.Timer(active=active)


def job_line(lab: Lab, job: dict) -> str:
    """The state of a trace job as a person reads it; empty when it is done."""
    if job["state"] == "failed":
        return warning(job["error"] or "The trace failed; its log says why.")
    if job["state"] == "queued":
        return jobs.waiting(lab).capitalize()
    if job["state"] in ("stopped", "cancelled"):
        return "Stopped before its end. Press **Trace** to go on."
    return "" if job["state"] == "done" else f"{job['message'] or 'Starting'}…"


def example_prompt(lab: Lab, current: str) -> str:
    """The held-out prompt of the study after `current` (a text), or the first one."""
    texts = [p.text for p in studies.study_prompts(lab.store, lab.current_study().id, "heldout")][:200]
    if not texts:
        return FALLBACK_PROMPT
    return texts[(texts.index(current) + 1) % len(texts)] if current in texts else texts[0]


def remember(lab: Lab, choice: dict) -> None:
    """Keeps the last choice, so that a reload (or "Look at its curves" in the Train tab) finds it."""
    checkpoints.set_setting(lab.store, LAST_CHOICE, {**choice, "study": lab.current_study().id})


def last_choice(lab: Lab) -> dict:
    """What `remember` kept for the current study; empty if that was another one."""
    choice = checkpoints.get_setting(lab.store, LAST_CHOICE, {})
    return choice if choice.get("study") == lab.current_study().id else {}
