"""The form of a new comparison: two policies, the prompts, the number of votes; and what it becomes when pressed."""

from dataclasses import dataclass

import gradio as gr

from app import choices, comparisons
from app.comparisons import Side
from app.components.choice import Choice
from app.lab import Lab
from app.pairs import lines
from app.tabs import search_form
from app.tabs.events import ONCE, QUIET, in_turn, kept
from storage import checkpoints, studies
from storage.models import Comparison

NONE = ("none", "")
HELD_OUT, OWN = "held-out prompts", "my own prompts"
FIXED, PEEK = "after a fixed number of votes", "whenever I like"
HELLO = (
    "Is a fine-tune better? The lab draws the same prompts and seeds with two policies; you vote without knowing which "
    "is which, and then see who won and whether that is evidence."
)
ASKED = "compare_policy"  # the setting by which the Train tab asks for a comparison
HELD_OUT_COUNT = 30
# As many votes as pairs, until somebody wants another number: the pairs of `estimate`, counted in the browser.
PAIRS = """(source, count, seeds, own) => {
  const lines = (own || '').split('\\n').map((line) => line.trim().replace(/\\s+/g, ' ')).filter(Boolean);
  const prompts = source === 'OWN' ? new Set(lines).size : Math.trunc(count || 0);
  return Math.max(0, prompts * Math.trunc(seeds || 0));
}""".replace("OWN", OWN)
SECONDS_A_PICTURE = 0.6  # 4 pictures x 20 steps in 2.5 s on two cores
STEP_SEARCH_COST = 0.35  # of a candidate at every step, in plain samplings: an LRM is the early part of a network


@dataclass(frozen=True)
class Form:
    """Handles to the inputs that others fill or read; `inputs` is the order in which `create` takes them."""

    a: gr.Dropdown
    strength_a: gr.Slider
    more_a: gr.Dropdown
    b: gr.Dropdown
    strength_b: gr.Slider
    more_b: gr.Dropdown
    count: gr.Number
    eta: gr.Number
    note: gr.Markdown
    go: gr.Button
    inputs: list
    asked: list  # what `estimate` takes
    search: search_form.SearchForm

    @property
    def fresh(self) -> list:
        """What changes as checkpoints and prompts come and go."""
        return [self.a, self.b, self.more_a, self.more_b, self.count]

    @property
    def sides(self) -> list:
        """What `fill` sets."""
        return [self.a, self.strength_a, self.b, self.strength_b, self.note]


def build() -> Form:
    """The inputs: A and B side by side, what is drawn and how the vote ends, and the rest folded away."""
    gr.Markdown(HELLO)
    with gr.Row():
        a, strength_a = _side("A")
        b, strength_b = _side("B")
    with gr.Row(equal_height=True):
        source = gr.Radio([HELD_OUT, OWN], value=HELD_OUT, label="pictures of", scale=3, elem_id="compare-source")
        count = gr.Number(HELD_OUT_COUNT, label="prompts", precision=0, min_width=90, elem_id="compare-count")
        seeds = gr.Number(1, label="seeds", precision=0, min_width=90, elem_id="compare-seeds")
        mode = gr.Radio([FIXED, PEEK], value=FIXED, label="the verdict comes", scale=3, elem_id="compare-mode")
        votes = gr.Number(30, label="votes", precision=0, min_width=90, elem_id="compare-votes")
    own = gr.Textbox(label="prompts, one a line", lines=4, visible=False, elem_id="compare-own")
    with gr.Accordion("Second adapters and sampler", open=False):
        with gr.Row():
            more_a, more_strength_a = _more("A")
            more_b, more_strength_b = _more("B")
        with gr.Row():
            steps = gr.Number(20, label="steps", precision=0, min_width=80)
            guidance = gr.Number(5.0, label="guidance_scale", min_width=80)
            eta = gr.Number(0.0, label="eta", min_width=80)
    search = search_form.build("compare")
    with gr.Row(equal_height=True):
        note = gr.Markdown(
            estimate(HELD_OUT, HELD_OUT_COUNT, 1, ""), elem_id="compare-note", elem_classes="beside-button"
        )
        go = gr.Button(
            "Sample and vote", variant="primary", scale=0, min_width=220, elem_id="compare-go", elem_classes=ONCE
        )
    asked = [source, count, seeds, own, a, b]
    drawn = [each.change for each in asked[:4]]
    gr.on(drawn, None, asked[:4], votes, js=PAIRS, **QUIET)  # here and now: no answer comes over a number typed since
    turns = in_turn("compare")
    gr.on([*drawn, a.input, b.input], estimate, asked, note, **turns)
    source.change(lambda s: (gr.Textbox(visible=s == OWN), gr.Number(visible=s != OWN)), source, [own, count], **turns)
    mode.change(lambda m: gr.Number(visible=m == FIXED), mode, votes, **QUIET)
    sides = [a, strength_a, more_a, more_strength_a, b, strength_b, more_b, more_strength_b]
    inputs = [*sides, source, count, own, seeds, mode, votes, steps, guidance, eta]
    return Form(a, strength_a, more_a, b, strength_b, more_b, count, eta, note, go, inputs, asked, search)


def _side(name: str) -> tuple[gr.Dropdown, gr.Slider]:
    """One policy: the base, or an adapter checkpoint with its strength."""
    label, elem_id = f"policy {name}", f"compare-{name.lower()}"
    with gr.Row(equal_height=True):
        policy = Choice([("base", choices.BASE)], value=choices.BASE, label=label, scale=3, elem_id=elem_id)
        strength = _strength("strength")
    return policy, strength


def _more(name: str) -> tuple[gr.Dropdown, gr.Slider]:
    """A second adapter, stacked on the first."""
    more = Choice([NONE], value="", label=f"on top of {name}", scale=2, min_width=140)
    return more, _strength("its strength")


def _strength(label: str) -> gr.Slider:
    """From 0 to 2; a number beyond that becomes the nearest one as it is typed."""
    slider = gr.Slider(0.0, 2.0, value=1.0, step=0.05, label=label, scale=2, min_width=140)
    slider.input(None, slider, slider, js="typed => typed > 2 ? 2 : typed < 0 ? 0 : typed", **QUIET)
    return slider


def estimate(source: str, count: float, seeds: float, own: str, a: str = "", b: str = "") -> str:
    """How many pairs this will be, and about how long the sampling takes where it was measured."""
    prompts = len(lines(own)) if source == OWN else int(count or 0)
    pairs = max(0, prompts * int(seeds or 0))
    seconds = pairs * SECONDS_A_PICTURE * (_times(a) + _times(b))
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    many = "1 pair" if pairs == 1 else f"{pairs} pairs"
    return f"{many} to vote on; with Scenes on two cores sampling takes about {time}."


def _times(value: str) -> float:
    """How many times as long as plain sampling a choice takes."""
    search = choices.split(value)[1]
    if search is None:
        return 1.0
    return search["candidates"] if search["method"] == "best-of-n" else 1 + STEP_SEARCH_COST * search["candidates"]


def create(
    lab: Lab, a, strength_a, more_a, more_strength_a, b, strength_b, more_b, more_strength_b, source, count, own, seeds,
    mode, votes, steps, guidance, eta,
) -> int:  # fmt: skip
    """The comparison that the form describes, queued; returns its id. ValueError with one sentence."""
    if source == OWN and not (own or "").strip():
        raise ValueError("There are no prompts of your own yet; write at least one, each on a line of its own.")
    if len(choices.sampling_policies(lab)) == 1:
        raise ValueError(
            "There is only the base so far: train an adapter in the Train tab, or make a search with an LRM above."
        )
    asked = {"prompts": count, "seeds": seeds, "steps": steps, "guidance_scale": guidance, "eta": eta}
    for name, value in asked.items():
        if value is None:
            raise ValueError(f"{name} is empty; give a number.")
    return comparisons.create(
        lab,
        Side(a, strength_a, more_a or "", more_strength_a),
        Side(b, strength_b, more_b or "", more_strength_b),
        own_prompts=own if source == OWN else "",
        count=int(count),
        seeds=int(seeds),
        votes=None if mode == PEEK or votes is None else int(votes),
        peeking=mode == PEEK,
        sampler={"steps": int(steps), "guidance_scale": float(guidance), "eta": float(eta)},
    )


def ask(lab: Lab, policy: str) -> None:
    """Lets the form begin with the base against this policy: the Train tab's "Compare with the base"."""
    checkpoints.set_setting(lab.store, ASKED, policy)


def asked(lab: Lab) -> str | None:
    """What `ask` was told since the last call, once."""
    policy = checkpoints.get_setting(lab.store, ASKED)
    if policy is not None:
        checkpoints.set_setting(lab.store, ASKED, None)
    return policy


def refresh(lab: Lab, a: str, b: str, count: int, wanted: str | None = None) -> list:
    """Values for `Form.fresh`: the base against `wanted`; else what was chosen stays if it still exists, else base and
    newest."""
    heldout = len(studies.study_prompts(lab.store, lab.current_study().id, "heldout"))
    known, adapters = choices.sampling_policies(lab), choices.adapters(lab)
    values = [value for _, value in known]
    newest = values[1] if len(values) > 1 else choices.BASE
    top = gr.Dropdown([NONE, *adapters])
    drawn = max(1, min(count or HELD_OUT_COUNT, heldout))
    wanted = wanted if wanted in values else None  # asked for in a study on another base
    if wanted:
        a, b = None, None
    return [
        kept(known, a),
        kept(known, None if b == choices.BASE else b, wanted or newest),
        top,
        top,
        gr.skip() if drawn == count else drawn,
    ]


def fill(lab: Lab, row: Comparison, step_back: bool) -> list:
    """Values for `Form.sides` that repeat `row`; with `step_back` the trained side goes one saved step back."""
    sides = []
    words = "Same policies, new prompts and seeds: press the button when ready."
    stepped = False
    for policy in (row.policy_b, row.policy_a):
        value, strength = _value(lab, policy)
        older = comparisons.earlier_checkpoints(lab, policy) if step_back and not stepped else []
        if older:
            stepped, value = True, str(older[0].id)
            if policy.get("search"):
                value = choices.search_value(lab, value, policy["search"])
            words = (
                f"{older[0].name} is an earlier checkpoint of the same run: less trained, perhaps less over-optimised."
            )
        sides.append((value, strength))
    if step_back and not stepped:
        words = "There is no earlier checkpoint of these runs; train with a smaller save_every to keep more of them."
    (b, strength_b), (a, strength_a) = sides
    return [a, strength_a, b, strength_b, words]


def _value(lab: Lab, policy: dict) -> tuple[str, float]:
    """The choice and strength behind a stored policy; the base if its checkpoint is gone."""
    if policy.get("search"):
        below, strength = _value(lab, {**policy, "search": None})
        return choices.search_value(lab, below, policy["search"]), strength
    if not policy.get("adapters"):
        return choices.BASE, 1.0
    last = policy["adapters"][-1]
    for row in choices.checkpoints(lab, "adapter"):
        if row.path == last["path"]:
            return str(row.id), last["strength"]
    return choices.BASE, 1.0
