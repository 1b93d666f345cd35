"""Train: from labels to an LRM, from an LRM to an adapter.

The left half asks what to train and says what it will take; the right half (train_queue.py) shows what is training.
A button only writes a job row; everything shown is read from the storage and the run folders, so that a person can
leave and come back, and the training does not care.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import gradio as gr
from gradio.context import Context
from gradio.events import Dependency

from app import choices, forms, jobs, training
from app.components.choice import Choice
from app.lab import Lab
from app.tabs import base_form, train_models, train_queue
from app.tabs.events import LAST, ONCE, QUIET, in_turn, kept
from app.words import warning
from lpo.config import CONFIGS, PRESETS, ConfigError, LPOConfig, LRMConfig, from_preset, to_dict
from lpo.preflight import family
from storage import numbers, studies

LRM_MAIN = ("train", "lr", "steps", "batch_size")
LPO_MAIN = ("iterations", "lr", "beta", "t_min")
FRESH = ("the base model: knows no reward yet", "base")
CHANGED = (
    "Nothing was started: the study is on another base than the one that this form was filled for. Now it has the "
    "settings of the new base; look at them and press once more."
)

OTHER = (
    "Nothing was started: meanwhile the study “{}” was chosen, on this page or another. The labels told above are "
    "its own now; press once more to train on them."
)


class Counted(NamedTuple):
    """What the tab tells of labels."""

    study: gr.State  # whose they are; None before the tab is opened
    usable: gr.State  # how many can train, counted when the tab is opened


class Half(NamedTuple):
    """One of the two forms, for what is done to both."""

    start: Dependency  # the button's event
    told: Callable  # tells time and command line anew after another event
    devices: Choice
    pickers: list  # what is chosen beside the settings
    filled: base_form.Filled


def build(lab: Lab) -> None:
    """The tab: two forms at the left, the queue at the right."""
    tab = Context.block
    chosen = gr.State(None)  # the id of the job that the right half shows; None for the newest
    counted = Counted(gr.State(None), gr.State(0))
    with gr.Row():
        with gr.Column(scale=6, min_width=420, elem_classes="dense"):
            with gr.Tabs(elem_id="train-kinds"):
                with gr.Tab("1 · Reward model (LRM)", id="lrm", elem_id="train-lrm", elem_classes="dense") as first:
                    enough = gr.Markdown()
                    lrm = _lrm_form(lab, chosen, counted)
                with gr.Tab("2 · Adapter (LPO)", id="lpo", elem_id="train-lpo", elem_classes="dense") as second:
                    gr.Markdown("Trains a LoRA that raises the reward of an LRM, on the study's training prompts.")
                    lpo = _lpo_form(lab, chosen, counted)
            imported = train_models.import_form(lab)
        with gr.Column(scale=8, min_width=520, elem_classes="dense"):
            refresh = train_queue.build(lab, chosen)

    def enter(seen, init, policy, judge, newest, lrm_count, lpo_count):
        """What changes while the tab is not looked at: the study, labels, checkpoints, and how many devices a worker
        has counted. A new LRM becomes the judge."""
        lrms, policies = choices.lrms(lab), choices.policies(lab)
        latest = lrms[0][1] if lrms else None
        counts = numbers.counts(lab.store, lab.current_study().id)
        return (
            training.sufficiency(counts, bool(lrms)),
            counts["train"],
            seen,
            base_form.base_of(lab),
            kept([*lrms, FRESH], init, lrm.filled.values[family(lab.current_study().base)][1]),
            kept(policies, policy),
            kept(lrms, judge if latest == newest else None),
            latest,
            _devices(lab, lrm_count),
            _devices(lab, lpo_count),
            lab.current_study().id,
        )

    # From the page, as the chosen LRM is: a gr.State would be ahead of a choice that is still on its way.
    newest, base = gr.Textbox(visible=False), gr.Textbox(visible=False)
    pickers = [*lrm.pickers, *lpo.pickers, newest, lrm.devices, lpo.devices]

    def offer(event):
        """Fresh choices after an event; and if the study is on another base, the settings of that base's family, but
        for what has been typed since the event."""
        event, seen = base_form.noted(event, [*lrm.filled.inputs, *lpo.filled.inputs])
        turns = in_turn("train-offered") | LAST
        entered = [enough, counted.usable, seen, base, *pickers, counted.study]
        event = event.then(enter, [seen, *pickers], entered, **turns)
        for half, start in ((lrm, 0), (lpo, len(lrm.filled.inputs))):
            half.told(base_form.follow(event, seen, base, half.filled, start))
        return event

    entered = offer(tab.select)
    for form in (first, second):  # an LRM may have been finished while its own form was looked at
        offer(form.select)
    for half in (lrm, lpo):
        refresh(half.start)
        offer(half.start.then)
    refresh(entered)
    imported(entered)


def _devices(lab: Lab, value: int) -> gr.Dropdown:
    """What the dropdown of devices offers. It is shown only where there is a choice."""
    count = jobs.devices(lab)
    offered = {"choices": list(range(1, count + 1)), "visible": count > 1}
    return gr.Dropdown(**offered) if value <= count else gr.Dropdown(value=count, **offered)


def _device_picker(lab: Lab, kind: str) -> Choice:
    count = jobs.devices(lab)
    return Choice(
        list(range(1, count + 1)), value=1, visible=count > 1, label="GPUs", scale=7, min_width=110,
        info="that train together; batches stay as large", elem_id=f"{kind}-devices",
    )  # fmt: skip


def _lrm_form(lab: Lab, chosen: gr.State, counted: Counted) -> Half:
    start = from_preset(LRMConfig, family(lab.current_study().base))
    with gr.Row(equal_height=True):
        preset = _preset_picker(lab, "train-lrm")
        options = [*choices.lrms(lab), FRESH]
        init = Choice(options, value=start.init, label="start from", scale=12, elem_id="train-lrm-init")
        devices = _device_picker(lab, "train-lrm")
    form = forms.build(start, leave_out=("base", "init", "pairs", "latent_cache"), first=LRM_MAIN)

    def fixed(init):
        folder = init if init == FRESH[1] else choices.lrm(lab, _needed(init, "LRM to start from"))
        return {"base": lab.current_study().base, "init": folder, "pairs": "pairs.jsonl"}

    half = _finish(lab, "train-lrm", "Train the LRM", preset, devices, form, [init], fixed, chosen, counted)
    # what to start from is the preset's, too
    values = {
        name: [name, from_preset(LRMConfig, name).init, *settings]
        for name, (_, *settings) in half.filled.values.items()
    }
    return half._replace(filled=half.filled._replace(inputs=[preset, init, *form.inputs], values=values))


def _lpo_form(lab: Lab, chosen: gr.State, counted: Counted) -> Half:
    start = from_preset(LPOConfig, family(lab.current_study().base))
    lrms, policies = choices.lrms(lab), choices.policies(lab)
    with gr.Row(equal_height=True):
        preset = _preset_picker(lab, "train-lpo")
        policy = Choice(policies, value=choices.BASE, label="start from", scale=12, elem_id="train-lpo-policy")
        newest = lrms[0][1] if lrms else None
        lrm = Choice(lrms, value=newest, label="LRM that judges", scale=12, elem_id="train-lpo-judge")
        devices = _device_picker(lab, "train-lpo")
    form = forms.build(start, leave_out=("lrm", "prompts", "eval_prompts"), first=LPO_MAIN)

    def fixed(policy, lrm):
        return {
            "policy": choices.policy(lab, _needed(policy, "policy to start from")),
            "lrm": choices.lrm(lab, _needed(lrm, "LRM")),
        }

    return _finish(lab, "train-lpo", "Train the adapter", preset, devices, form, [policy, lrm], fixed, chosen, counted)


def _preset_picker(lab: Lab, kind: str) -> gr.Dropdown:
    default = family(lab.current_study().base)
    names = list(PRESETS[kind])
    return gr.Dropdown(names, value=default, label="preset", scale=7, elem_id=f"{kind}-preset", min_width=110)


def _needed(value: str | None, what: str) -> str:
    if not value:
        raise ConfigError(f"No {what} is chosen; choose one from the list.")
    return value


def _finish(
    lab: Lab, kind: str, label: str, preset, devices, form: forms.Form, pickers: list, fixed, chosen: gr.State,
    counted: Counted,
) -> Half:  # fmt: skip
    """The lower half of both forms: time, the button and what came of it, command line.

    `fixed(*pickers' values)` gives the fields that are not in the form.
    """
    with gr.Row():
        cost = gr.Markdown(elem_id=f"{kind}-cost", elem_classes="beside-button")
        start = gr.Button(label, variant="primary", scale=0, min_width=190, elem_id=f"{kind}-start", elem_classes=ONCE)
    told = gr.Markdown(elem_id=f"{kind}-told")  # of the button alone: an estimate that comes late must not cover it
    with gr.Accordion("The same on the command line", open=False):
        line = gr.Textbox(
            show_label=False, lines=2, max_lines=8, interactive=False, buttons=["copy"], elem_id=f"{kind}-command"
        )

    def config_of(*values):
        return form.read(values[len(pickers) :], **fixed(*values[: len(pickers)]))

    def tell(usable, preset, devices, *values):
        try:
            config = config_of(*values)
            heldout = studies.has_prompts(lab.store, lab.current_study().id, "heldout")
            same = training.command(kind, preset, config, devices, heldout)
            return training.estimate(lab, kind, config, devices, usable), same
        except ValueError as error:
            return warning(error), ""

    def begin(filled, study, devices, *values):
        """Returns the sentence for the form and the new job's id, which the queue then shows."""
        if filled != base_form.base_of(lab):
            return warning(CHANGED), gr.skip()
        if study not in (None, (current := lab.current_study()).id):
            return warning(OTHER.format(current.name)), gr.skip()
        try:
            config = config_of(*values)
        except ValueError:  # beside the button stands which one, and why
            return warning("Nothing was started: a setting has to be corrected first."), gr.skip()
        try:
            if kind == "train-lrm" and not numbers.counts(lab.store, lab.current_study().id)["train"]:
                raise ConfigError("There is no label to train on yet; give some answers in the Label tab first.")
            job = jobs.submit(lab, kind, {**to_dict(config), jobs.PROCESSES: devices}, lab.current_study().id)
        except ValueError as error:
            return warning(error), gr.skip()
        return "It is in the queue, and goes on if you close this page.", job

    base = gr.Textbox(base_form.base_of(lab), visible=False)
    inputs = [devices, *pickers, *form.inputs]
    changed = [component.change for component in [preset, *inputs]]
    telling = {"fn": tell, "inputs": [counted.usable, preset, *inputs], "outputs": [cost, line], **LAST}
    telling |= in_turn(f"{kind}-tell")
    gr.on(changed, **telling)
    # In the browser, at once, however busy the server is: the button starts the preset that was just chosen, no answer
    # comes over what is typed meanwhile, and a warning about a setting goes when the setting changes.
    shown = {name: form.show(from_preset(CONFIGS[kind], name)) for name in PRESETS[kind]}
    preset.input(None, preset, list(form.inputs), js=f"name => ({json.dumps(shown)})[name]", **QUIET)
    gr.on([each.input for each in [preset, *inputs]], None, None, told, js="() => ''", **QUIET)
    started = start.click(begin, [base, counted.study, *inputs], [told, chosen], **in_turn(train_queue.TURN))
    values = {name: [name, *settings] for name, settings in shown.items()}
    filled = base_form.Filled(base, [preset, *form.inputs], values, by_preset=True)
    return Half(started, lambda event: event.then(**telling), devices, pickers, filled)
