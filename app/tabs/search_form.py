"""A fold that makes a policy of its own out of a policy and an LRM that chooses while it samples (Curves, Compare)."""

from dataclasses import dataclass

import gradio as gr

from app import choices
from app.components.choice import Choice
from app.lab import Lab
from app.tabs.events import QUIET, kept
from lpo.config import ConfigError

METHODS = [("best of N pictures", "best-of-n"), ("best sibling at every step", "steps")]
ABOUT = (
    "An LRM can also be used without training: it chooses among candidates while a policy samples. *Best of N* draws N "
    "whole pictures at N times the cost; *best sibling* chooses xₜ₋₁ at every noisy step, and needs eta above 0."
)


@dataclass(frozen=True)
class SearchForm:
    """Handles to the inputs; `inputs` is the order in which `add` takes them."""

    below: gr.Dropdown
    lrm: gr.Dropdown
    inputs: list
    go: gr.Button
    forget: gr.Button
    told: gr.Markdown

    @property
    def fresh(self) -> list:
        """What changes as checkpoints come and go."""
        return [self.below, self.lrm]


def build(name: str) -> SearchForm:
    """The fold; `name` begins its elements' ids."""
    with gr.Accordion("Search with an LRM, without training", open=False, elem_id=f"{name}-search"):
        gr.Markdown(ABOUT)
        with gr.Row():
            below = Choice([("base", choices.BASE)], value=choices.BASE, label="policy", min_width=130)
            scorer = Choice([], label="LRM that chooses", min_width=130, elem_id=f"{name}-search-lrm")
            method = gr.Dropdown(
                METHODS, value=METHODS[0][1], label="chooses", min_width=130, elem_id=f"{name}-search-method"
            )
        with gr.Row():
            count = gr.Number(4, label="candidates", precision=0, min_width=90, elem_id=f"{name}-search-candidates")
            low = gr.Number(0, label="from t", precision=0, min_width=90, visible=False)
            high = gr.Number(1000, label="up to t", precision=0, min_width=90, visible=False)
        with gr.Row(equal_height=True):
            go = gr.Button("Add as a policy", size="sm", min_width=110, elem_id=f"{name}-search-add")
            forget = gr.Button("Forget all", size="sm", min_width=80, scale=0, elem_id=f"{name}-search-forget")
        told = gr.Markdown(elem_id=f"{name}-search-told")
    windowed = lambda m: [gr.Number(visible=m == "steps")] * 2  # noqa: E731
    method.change(windowed, method, [low, high], **QUIET)
    return SearchForm(below, scorer, [below, method, scorer, count, low, high], go, forget, told)


def refresh(lab: Lab, below: str, scorer: str | None) -> list:
    """Values for `SearchForm.fresh`; what was chosen stays if it still exists."""
    return [kept(choices.policies(lab), below), kept(choices.lrms(lab), scorer)]


def add(lab: Lab, below: str, method: str, scorer: str | None, count, low, high) -> str:
    """The new policy's choice value. Raises ValueError with one sentence."""
    if not scorer:
        raise ConfigError("No LRM is chosen; choose one, or train one in the Train tab.")
    choices.named_lrms(lab, [scorer])
    numbers = {"candidates": count, "from t": low, "up to t": high}
    for name, value in numbers.items():
        if value is None:
            raise ConfigError(f"{name} is empty; enter a whole number.")
    window = {"t_min": int(low), "t_max": int(high)} if method == "steps" else {}
    return choices.add_search(lab, below, {"method": method, "lrm": scorer, "candidates": int(count), **window})


def name_of(lab: Lab, value: str) -> str:
    """What the lists call a choice."""
    return dict(map(reversed, choices.sampling_policies(lab))).get(value, value)
