"""Data: everything that was made and said, and the way in and out of the lab.

Browsing only reads. Nothing can be deleted here: a label that was taken back is shown as what it is, and pictures of
a blind vote stay out of sight until its verdict.
"""

import gradio as gr
from gradio.context import Context

from app import story
from app.components.browser import browser
from app.lab import Lab
from app.tabs import data_exchange, data_filter
from app.tabs.events import EVERY, LAST, in_turn, kept
from app.words import warning
from storage import browse, checkpoints, numbers, stories, studies

KINDS = ("Pictures", "Pairs", "Labels")
PAGE_SIZES = {"Pictures": 48, "Pairs": 18, "Labels": 30}
PAGES = {"Pictures": browse.pictures, "Pairs": browse.pairs, "Labels": browse.labels}
CHOICES = [("any", "any"), ("first", "first"), ("second", "second"), ("tie", "tie"), ("both bad", "both_bad"),
           ("skipped", "skip"), ("no label yet", "unlabelled")]  # fmt: skip
DAY = 24 * 3600
HINT = '<p class="st-sub">Choose a picture, a pair or a label to see where it came from and what was said about it.</p>'


def build(lab: Lab) -> None:
    """The tab. Its only Gradio state is the page that is being looked at."""
    tab = Context.block
    head = gr.HTML(css_template=story.STYLE, apply_default_css=False, elem_id="data-numbers")
    with gr.Row(equal_height=True):
        kind = gr.Radio(
            KINDS, value="Pairs", show_label=False, container=False, scale=2, min_width=260, elem_id="data-kind"
        )
        text = gr.Textbox(
            placeholder="Words of the prompt", show_label=False, container=False, scale=3, elem_id="data-text"
        )
        every = ("all studies", 0)
        study = gr.Dropdown([every], value=None, show_label=False, container=False, scale=2, min_width=150)
    splits = [("any", "any"), ("train", "train"), ("held-out", "heldout")]
    with gr.Accordion("More filters", open=False, elem_id="data-filters"):
        with gr.Row():
            annotator = gr.Dropdown([("anyone", 0)], value=0, label="annotator", min_width=130)
            who = gr.Dropdown(["any", "human", "simulated"], value="any", label="human or simulated", min_width=130)
            choice = gr.Dropdown(CHOICES, value="any", label="choice", min_width=130)
            split = gr.Dropdown(splits, value="any", label="split", min_width=130)
            origin = gr.Dropdown(["any"], value="any", label="origin", min_width=130)
        with gr.Row():
            since = gr.DateTime(label="from day", include_time=False, min_width=185)
            until = gr.DateTime(label="to day", include_time=False, min_width=185)
    page = gr.State(0)
    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            with gr.Row(equal_height=True):
                note = gr.Markdown(elem_id="data-note", elem_classes="beside-button")
                back = gr.Button("← newer", size="sm", scale=0, min_width=90, elem_id="data-back")
                on = gr.Button("older →", size="sm", scale=0, min_width=90, elem_id="data-on")
            items = browser("data-browser")
        with gr.Column(scale=2, min_width=320):
            detail = gr.HTML(HINT, css_template=story.STYLE, apply_default_css=False, elem_id="data-detail")
    exchange_opened, ended = data_exchange.build(lab)
    filter_opened, queued = data_filter.build(lab)

    filters = [kind, text, study, annotator, who, choice, split, origin, since, until]
    shown = [items, note, page, back, on]

    def look(number, *values):
        try:
            return listed(lab, number, *values)
        except ValueError as error:
            return {"kind": "pictures", "items": [], "empty": ""}, warning(error), 0, gr.skip(), gr.skip()

    def enter(study_id):
        people = [("anyone", 0), *((row.name, row.id) for row in studies.list_annotators(lab.store))]
        known = [every, *((row.name, row.id) for row in lab.studies())]
        current = lab.current_study().id
        stays = study_id in dict(map(reversed, known))
        return (
            overview(lab, (study_id if stays else current) or None),
            kept(known, study_id, current),
            gr.Dropdown(people),
            gr.Dropdown(["any", *sorted({*browse.ORIGINS, "generated"})]),
        )

    def tell(event: gr.EventData):
        return told(lab, event.kind, int(event.item))

    quiet = in_turn("data")
    gr.on([f.change for f in filters], lambda *values: look(0, *values), filters, shown, **quiet)
    study.change(lambda chosen: overview(lab, chosen or None), study, head, **quiet)
    back.click(lambda number, *values: look(number - 1, *values), [page, *filters], shown, **quiet)
    on.click(lambda number, *values: look(number + 1, *values), [page, *filters], shown, **quiet)
    items.select(tell, None, detail, **quiet, **EVERY)
    entering = {"fn": enter, "inputs": study, "outputs": [head, study, annotator, origin], **quiet}
    for event in (tab.select(**entering), ended.change(**entering, **LAST)):
        event.then(look, [page, *filters], shown, **quiet, **LAST)
        exchange_opened(event)
        filter_opened(event)
    for event in queued:
        exchange_opened(event)


def told(lab: Lab, kind: str, item: int) -> str:
    """The story of a "pair" or a "picture" as HTML, in which checkpoints have the names of the rest of the lab."""
    names = {row.path: row.name for row in checkpoints.list_checkpoints(lab.store, include_hidden=True)}
    if kind == "pair":
        found = stories.pair_story(lab.store, item)
        return story.pair_html(found, names) if found else HINT
    found = stories.picture_story(lab.store, item)
    return story.picture_html(found, names) if found else HINT


def listed(lab: Lab, number: int, kind, text, study, annotator, who, choice, split, origin, since, until):
    """The page `number` (from 0) of what matches: the browser's value, a sentence, the page, and both buttons."""
    if since is not None and until is not None and since > until:
        raise ValueError("The first day lies after the last one; choose a first day that is not later.")
    if kind == "Pictures" and origin not in ("any", "generated", "import"):
        origin = "generated"  # queue, form and comparison pictures were all generated here
    if kind != "Pictures" and origin == "generated":
        origin = "any"
    filters = browse.Filters(
        study_id=study or None,
        text=text or "",
        annotator_id=annotator or None,
        choice=choice,
        split=split,
        origin=origin,
        kind=who,
        since=since,
        until=None if until is None else until + DAY,
    )
    size = PAGE_SIZES[kind]
    total, rows = PAGES[kind](lab.store, filters, max(0, number), size)
    pages = max(1, -(-min(total, browse.MOST) // size))
    if number >= pages:
        number = pages - 1
        total, rows = PAGES[kind](lab.store, filters, number, size)
    number = max(0, number)
    files, pairs = browse.hidden(lab.store)
    many = total > browse.MOST
    words = f"{'The newest ' if many else ''}{min(total, browse.MOST):,} {kind.lower()}"
    words += f", page {number + 1} of {pages}" if pages > 1 else ""
    words += ". Filters find older ones" if many else ""
    if pairs:
        words += f". {pairs} pairs ({files} pictures) are in a blind vote and stay hidden until its verdict"
    return (
        {"kind": kind.lower(), "items": rows, "empty": "" if rows else _empty(lab, kind)},
        words + ".",
        number,
        gr.Button(interactive=number > 0),
        gr.Button(interactive=number < pages - 1),
    )


def _empty(lab: Lab, kind: str) -> str:
    """What to do when there is nothing to show."""
    total, _ = PAGES[kind](lab.store, browse.Filters(), 0, 1)
    if total:
        return (
            "Nothing matches these filters. Take words out, choose another study, or set those under “More filters” "
            "back to “any”."
        )
    if kind == "Labels":
        return "No label yet: give some answers in the Label tab, or import a data set below (Export and import)."
    return "No pictures yet: the Label tab makes the first pairs; or import a data set below (Export and import)."


def overview(lab: Lab, study_id: int | None) -> str:
    """The numbers at the head of the tab, as HTML."""
    total = stories.totals(lab.store, study_id)
    tiles = [
        (f"{total['pictures']:,}", "pictures", f"{total['pairs']:,} pairs, all studies"),
        (f"{total['prompts']:,}", "prompts", f"{total['heldout']:,} held out"),
    ]
    if study_id is not None:
        tiles += _label_tiles(lab, study_id)
    use = stories.disk_use(lab.store)
    parts = ", ".join(f"{name} {story.megabytes(size)}" for name, size in use.items() if size > 2**20)
    tiles.append((story.megabytes(sum(use.values())), "on disk", parts))
    return story.numbers(tiles)


def _label_tiles(lab: Lab, study_id: int) -> list[tuple[str, str, str]]:
    count = numbers.counts(lab.store, study_id)
    agree = numbers.agreement(lab.store, study_id)
    said = count["choices"]
    simulated = sum(a["labels"] for a in count["annotators"] if a["kind"] == "simulated")
    ties = said.get("tie", 0)
    neither = f"{ties} tie{'s' * (ties != 1)}, {said.get('both_bad', 0)} both bad, {said.get('skip', 0)} skipped"
    own, between = agree["self"], agree["between"]
    couples = f"{between['n']} shared answer{'s' * (between['n'] != 1)}"
    alpha = "" if between["alpha"] is None else f", alpha {between['alpha']:.2f}"
    return [
        (f"{count['labels']:,}", "labels", f"{neither}; {simulated:,} simulated"),
        (f"{count['train']:,} + {count['heldout']:,}", "usable pairs", "to train + to test on"),
        (_percent(own), "agreement with oneself", f"{own['n']} pair{'s' * (own['n'] != 1)} that came twice"),
        (_percent(between), "agreement between annotators", f"{couples}{alpha}"),
    ]


def _percent(rate: dict) -> str:
    return "–" if rate["percent"] is None else f"{rate['percent']:.0f} %"
