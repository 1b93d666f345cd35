"""Filter imported labels (MPCF): score gaps, a rule with editable gates, what it keeps and drops, then Apply.

Nothing is changed or deleted: a filter says which imported labels train, and can be removed. See storage/filters.py.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from html import escape

import gradio as gr
from gradio.events import Dependency
from sqlalchemy import text

from app import filter_figure, jobs, uploads
from app.components.reward_plot import RewardPlot
from app.filter_html import GATE_HEAD, START, STYLE, pairs_html, state_html
from app.filter_html import words as told_words
from app.lab import Lab
from app.tabs.events import EVERY, LAST, ONCE, QUIET, in_turn, kept
from app.words import warning
from storage import filters, gaps, mpcf
from storage.data_models import GAP_COLUMNS

MINE = "my own"
MINE_NAME = "my own rule"
EMPTY = {"figure": {"data": [], "layout": {}}, "curves": [], "rows": [], "note": ""}
FIELDS = [("clip", "CLIP model (a folder)"), ("aesthetic", "aesthetic head (.safetensors)"),
          ("aesthetic_clip", "its CLIP-L model, if it is another"), ("pick", "PickScore model (a folder)")]  # fmt: skip


def build(lab: Lab) -> tuple[Callable, list[Dependency]]:
    """The section; returns `opened(event)`, which refreshes it after an event of the tab, and the events that queue a
    job."""
    with gr.Accordion("Filter imported labels (MPCF)", open=False, elem_id="data-filter"):
        with gr.Row():
            with gr.Column(scale=4, min_width=340, elem_classes="dense"):
                with gr.Row():
                    study = gr.Dropdown([], label="study", min_width=120, elem_id="filter-study")
                    chosen = gr.Dropdown([], label="score gaps", min_width=160, elem_id="filter-gaps")
                sources_opened, queued = _sources(lab, study)
                preset = gr.Radio(
                    [*mpcf.PRESETS, MINE], value=mpcf.DEFAULT, label="rule", elem_id="filter-preset", min_width=100
                )
                gates = _gates()
                with gr.Row():
                    keep_ties = gr.Checkbox(True, label="keep ties", min_width=100)
                    distance = gr.Checkbox(
                        False, label="ties by |gap|", min_width=100,
                        info="off: signed, as in the official code",
                    )  # fmt: skip
                name = gr.Textbox(mpcf.DEFAULT, label="name of the filter", max_lines=1, elem_id="filter-name")
                with gr.Row():
                    apply = gr.Button("Apply", variant="primary", size="sm", min_width=90, elem_id="filter-apply")
                    remove = gr.Button("Remove the filter", size="sm", min_width=90, elem_id="filter-remove")
            with gr.Column(scale=7, min_width=480):
                state = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="filter-state")
                plot = RewardPlot(height=filter_figure.HEIGHT, name="filter", elem_id="filter-plot")
                pairs = gr.HTML(START, css_template=STYLE, apply_default_css=False, elem_id="filter-pairs")

    inputs = [*gates, keep_ties, distance, name]
    shown = [state, plot, pairs]
    turns = in_turn("data-filter")

    def look(study_id, gap_set, *values):
        try:
            return looked(lab, study_id, gap_set, rule_of(*values))
        except ValueError as error:
            return f"<p>⚠️ {escape(str(error))}</p>", gr.skip(), gr.skip()

    def switch(study_id, gap_set, on, *values):
        try:
            if on:
                filters.apply(lab.store, gap_set or 0, rule_of(*values))
            else:
                filters.remove(lab.store, study_id)
        except ValueError as error:
            return f"<p>⚠️ {escape(str(error))}</p>", gr.skip(), gr.skip()
        return look(study_id, gap_set, *values)

    def sets(study_id):
        listed = [(row.name, row.id) for row in gaps.list_sets(lab.store, study_id)]
        return gr.Dropdown(listed, value=listed[0][1] if listed else None)

    # The form follows its rule in the browser itself, so that Apply right after a click applies what was clicked.
    rules = {name: [*_values(rule), True, False, name] for name, rule in mpcf.PRESETS.items()}
    fill = f"(which, ...now) => ({json.dumps(rules)})[which] ?? now"
    own = f"name => [{json.dumps(MINE)}, name in {json.dumps(rules)} ? {json.dumps(MINE_NAME)} : name]"
    edited = [each.input for each in inputs[:-1]]
    looking = {"fn": look, "inputs": [study, chosen, *inputs], "outputs": shown, **turns, **LAST}
    preset.input(None, [preset, *inputs], inputs, js=fill, **QUIET).then(**looking)
    gr.on(edited, None, name, [preset, name], js=own, **QUIET)  # an edited rule is no published one any more
    gr.on(edited, **looking)
    chosen.change(**looking)
    study.input(sets, study, chosen, **turns, **EVERY).then(**looking)
    apply.click(lambda s, g, *v: switch(s, g, True, *v), [study, chosen, *inputs], shown, **turns)
    remove.click(lambda s, g, *v: switch(s, g, False, *v), [study, chosen, *inputs], shown, **turns)

    def refresh(study_id, gap_set):
        """Studies and gap sets, which other tabs and jobs change."""
        known = [(row.name, row.id) for row in lab.studies()]
        current = lab.current_study().id
        sets_of = study_id if study_id in dict(map(reversed, known)) else current
        listed = [(row.name, row.id) for row in gaps.list_sets(lab.store, sets_of)]
        return kept(known, study_id, current), kept(listed, gap_set)

    def opened(event):
        """After `event`: fresh choices, then the preview."""
        event = event.then(refresh, [study, chosen], [study, chosen], **turns, **LAST)
        sources_opened(event)
        return event.then(**looking)

    return opened, queued


def _gates() -> list:
    """Three inputs per score under one head: on, above, tie below."""
    out = []
    rule = mpcf.PRESETS[mpcf.DEFAULT]
    gr.HTML(GATE_HEAD, css_template=STYLE, apply_default_css=False)
    bare = {"show_label": False, "container": False, "min_width": 70, "step": 0.01}
    for column in GAP_COLUMNS:
        gate = rule.gates.get(column, mpcf.Gate(on=False))
        word = mpcf.WORDS[column]
        with gr.Row(equal_height=True):
            on = gr.Checkbox(gate.on, label=word, container=False, min_width=90, elem_id=f"filter-{column}-on")
            above = gr.Number(gate.above, label=f"{word} gate", elem_id=f"filter-{column}-above", **bare)
            below = gr.Number(gate.tie_below, label=f"{word} gate of ties", elem_id=f"filter-{column}-tie", **bare)
        out += [on, above, below]
    return out


def _values(rule: mpcf.Rule) -> list:
    gates = [rule.gates.get(column, mpcf.Gate(on=False)) for column in GAP_COLUMNS]
    return [value for gate in gates for value in (gate.on, gate.above, gate.tie_below)]


def rule_of(*values) -> mpcf.Rule:
    """The rule of the form's values: on, above, tie below of each score, then keep ties, by distance, name."""
    *gates, keep_ties, distance, name = values
    found = {}
    for place, column in enumerate(GAP_COLUMNS):
        on, above, below = gates[3 * place : 3 * place + 3]
        if on and (above is None or below is None):
            raise mpcf.RuleError(f"The gate of {mpcf.WORDS[column]} has no number; give one or switch it off.")
        found[column] = mpcf.Gate(bool(on), above or 0.0, below or 0.0)
    return mpcf.Rule(name or "", found, bool(keep_ties), bool(distance))


def looked(lab: Lab, study_id: int, gap_set: int | None, rule: mpcf.Rule) -> tuple:
    """State, figure and example pairs for the chosen gaps and rule."""
    now = state_html(lab.store, study_id)
    if not gap_set:
        return now, EMPTY, START
    row = filters.finished_set(lab.store, gap_set)
    missing = [column for column in rule.active if column not in row.config["columns"]]
    rule = mpcf.without(rule, missing)
    loaded = _loaded(lab, gap_set)
    told = filters.preview(loaded, rule)
    words = told_words(told, rule)
    if missing:
        names = ", ".join(mpcf.WORDS[column] for column in missing)
        words += f"<p>⚠️ These gaps have no {names}; that gate is left out here. Switch it off to apply the rule.</p>"
    if row.config.get("disagree"):
        words += f"<p>⚠️ {row.config['disagree']:,} rows of the CSV say tie where the label does not, or vice versa.</p>"
    return now + words, filter_figure.value(loaded, rule), pairs_html(filters.examples(lab.store, loaded, rule))


def _sources(lab: Lab, study: gr.Dropdown) -> tuple[Callable, list[Dependency]]:
    """Two ways to score gaps: a CSV joined to an import, and local scorers. Returns what `build` returns, for these."""
    with gr.Accordion("Get score gaps", open=False, elem_id="filter-sources"):
        imported = gr.Dropdown([], label="import that the CSV belongs to, row by row", elem_id="filter-import")
        file = gr.File(label="CSV of score gaps", file_types=[".csv"], height=130, elem_id="filter-csv")
        join = gr.Button("Join", size="sm", elem_id="filter-join", elem_classes=ONCE)
        boxes = [gr.Textbox(label=label, max_lines=1, elem_id=f"filter-{key}") for key, label in FIELDS]
        compute = gr.Button("Compute them here", size="sm", elem_id="filter-compute", elem_classes=ONCE)
        note = gr.Markdown(elem_id="filter-note")
    told = "Queued; its progress is in the list of *Export and import*. When it is done, the score gaps are above."
    turns = in_turn("filter-sources")

    def imports(study_id, import_id):
        rows = gaps.list_imports(lab.store, study_id) if study_id else []
        return kept([(f"{row.name}, {row.state['done']:,} rows", row.id) for row in rows], import_id)

    def joined(path, import_id, study_id):
        try:
            start_csv(lab, path, import_id, study_id)
        except ValueError as error:
            return warning(error)
        return told

    def computed(study_id, *paths):
        try:
            start_scorers(lab, study_id, dict(zip([key for key, _ in FIELDS], paths, strict=True)))
        except ValueError as error:
            return warning(error)
        return told

    listing = {"fn": imports, "inputs": [study, imported], "outputs": imported, **turns, **LAST}
    study.change(**listing)
    queued = [
        join.click(joined, [file, imported, study], note, **turns),
        compute.click(computed, [study, *boxes], note, **turns),
    ]
    return lambda event: event.then(**listing), queued


def start_csv(lab: Lab, path: str | None, import_id: int | None, study_id: int) -> str:
    """Queues the join of an uploaded CSV; returns the job's id."""
    wanted = "choose the CSV of score gaps"
    if not path:
        raise ValueError(f"No file is chosen; {wanted}.")
    if not import_id:
        raise ValueError("This study has no finished import; import the data set first, then join its CSV.")
    config = {"source": "csv", "import_id": import_id, **uploads.take_over(lab, [path], (".csv",), wanted)}
    return jobs.submit(lab, "gaps", config, study_id)


def start_scorers(lab: Lab, study_id: int, paths: dict[str, str]) -> str:
    """Queues the computation by local scorers; returns the job's id."""
    found = {key: str(uploads.local_path(lab, path)) if (path or "").strip() else "" for key, path in paths.items()}
    if not any(found[key] for key in ("clip", "pick", "aesthetic")):
        raise ValueError("No scorer is named; give the folder of a CLIP model, of PickScore, or an aesthetic head.")
    return jobs.submit(lab, "gaps", {"source": "scorers", "name": "scorers", **found}, study_id)


def _loaded(lab: Lab, gap_set: int) -> gaps.Gaps:
    """The gaps, read again only when a label was added or taken back since."""
    with lab.store.reader() as session:
        newest = session.execute(text("SELECT MAX(id) FROM preference")).scalar()
    return _read(lab, gap_set, newest)


@lru_cache(maxsize=2)
def _read(lab: Lab, gap_set: int, newest: int) -> gaps.Gaps:
    return gaps.load(lab.store, gap_set)
