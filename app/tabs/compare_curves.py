"""Reward curves of both policies of an ended comparison: one prompt, its seeds, any LRM; a trace job like in Curves."""

from dataclasses import dataclass

import gradio as gr

from app import choices, comparisons, jobs, traces
from app.components.choice import Choice
from app.components.reward_plot import RewardPlot
from app.figures import rewards
from app.lab import Lab
from app.tabs.events import in_turn
from app.words import warning
from lpo.config import TraceConfig, from_dict, to_dict
from storage import comparisons as stored

MOST_SEEDS = 4
PLOT_HEIGHT = 340
ENDED = ("done", "failed", "stopped", "cancelled")
HELLO = "How the reward grew while these pictures were made: choose a prompt of this comparison and press the button."


@dataclass(frozen=True)
class Curves:
    """Handles to the section's components."""

    prompt: gr.Dropdown
    lrms: gr.Dropdown
    go: gr.Button
    status: gr.Markdown
    plot: gr.HTML
    looking: gr.State
    timer: gr.Timer

    @property
    def shown(self) -> list:
        return [self.status, self.plot, self.timer]


def build(lab: Lab) -> Curves:
    """The section's components, below the pictures."""
    with gr.Accordion("Reward curves of both", open=False, elem_id="compare-curves"):
        with gr.Row(equal_height=True):
            prompt = Choice([], label="prompt", scale=4, elem_id="compare-curves-prompt")
            lrms = Choice([], multiselect=True, label="LRMs", scale=3)
            go = gr.Button("Trace both", scale=1, min_width=120, elem_id="compare-curves-go")
        status = gr.Markdown(HELLO, elem_id="compare-curves-status")
        plot = RewardPlot(traces.thumbnails(lab.store), PLOT_HEIGHT, "comparison-curves", elem_id="compare-curves-plot")
    return Curves(prompt, lrms, go, status, plot, gr.State(None), gr.Timer(0.5, active=False))


def connect(lab: Lab, curves: Curves, chosen: gr.State, drawn: gr.State) -> None:
    """Listeners: the section follows the chosen comparison, and polls only while something is being traced."""

    def trace(page: gr.Request, comparison_id, prompt, lrms):
        try:
            request = plan(lab, comparison_id, prompt, lrms, jobs.trace_line(lab, "compare", page))
        except ValueError as error:
            return gr.skip(), warning(error), gr.skip(), gr.skip()
        return request, *draw(lab, request)

    def follow(comparison_id, face):
        if not face or face[1] not in ("complete", "abandoned"):
            return gr.Dropdown([]), None, HELLO, gr.Timer(active=False)
        prompts = stored.get_comparison(lab.store, comparison_id).plan["prompts"]
        return gr.Dropdown(prompts, value=prompts[0]), None, HELLO, gr.Timer(active=False)

    quiet = in_turn("compare-curves")
    inputs = [chosen, curves.prompt, curves.lrms]
    curves.go.click(trace, inputs, [curves.looking, *curves.shown], **quiet)
    curves.timer.tick(lambda request: draw(lab, request), curves.looking, curves.shown, **quiet)
    drawn.change(follow, [chosen, drawn], [curves.prompt, curves.looking, curves.status, curves.timer], **quiet)


def lrm_choices(lab: Lab, chosen: list[str]) -> gr.Dropdown:
    """Fresh LRM choices; what was chosen stays if all of it still exists, else the newest one."""
    known = choices.lrms(lab)
    values = [value for _, value in known]
    return gr.Dropdown(known) if chosen and set(chosen) <= set(values) else gr.Dropdown(known, value=values[:1])


def plan(lab: Lab, comparison_id: int, prompt: str | None, lrms: list[str], line: str) -> dict:
    """The request for both policies' trajectories, submitted as a job unless all is stored; it supersedes those of the
    same `line`. ValueError: a sentence."""
    if not prompt:
        raise ValueError("No prompt is chosen; choose one of this comparison.")
    if not lrms:
        raise ValueError("No LRM is chosen; choose one, or train one in the Train tab.")
    row = stored.get_comparison(lab.store, comparison_id)
    if prompt not in row.plan["prompts"]:
        raise ValueError("That prompt is of another comparison; open the tab anew and choose one.")
    scorers = choices.named_lrms(lab, lrms)
    both = choices.short_names(list(zip(comparisons.names(lab, row), (row.policy_a, row.policy_b), strict=True)))
    paths = [path for _, path in scorers]
    settings = {"prompt": prompt, "seeds": row.plan["seeds"][:MOST_SEEDS], "lrm": paths, **row.plan["sampler"]}
    config = from_dict(TraceConfig, {"policy": row.policy_a, **settings})
    planned = traces.plan(both, config)
    policies = [policy for _, policy in both]
    request = {"traces": planned, "lrms": scorers, "total": config.steps, "policies": policies}
    request["guidance_scale"] = config.guidance_scale
    if traces.complete(lab.store, planned, paths):
        return {"job": None, **request}
    work = {"trace": to_dict(config), **request}
    return {"job": jobs.submit(lab, "trace", work, row.study_id, supersedes=line), **request}


def draw(lab: Lab, request: dict | None) -> tuple:
    """Status line, plot and whether to keep polling, from what is on disk now."""
    if request is None:
        return HELLO, gr.skip(), gr.Timer(active=False)
    curves = traces.curves(lab.store, request["traces"], request["lrms"], request["total"])
    value = rewards(curves, height=PLOT_HEIGHT)
    told = traces.costs(curves, request["policies"], request["traces"], request["guidance_scale"])
    value["note"] = f"{value['note']} {told}".strip()
    job = jobs.describe(lab, request["job"]) if request["job"] else {"state": "done", "error": None, "message": None}
    words = {
        "done": "",
        "failed": warning(job["error"]),
        "queued": jobs.waiting(lab).capitalize(),
        "running": f"{job['message'] or 'Starting'}…",
    }.get(job["state"], "Stopped before its end. Press the button to go on.")
    return words, value, gr.Timer(active=job["state"] not in ENDED)
