"""The way in and out of the lab: export and import as jobs of the data lane, each with its report.

Uploads are hostile: a file goes into a folder of our own naming, and `storage/exchange` checks every row.
"""

from collections.abc import Callable
from html import escape

import gradio as gr

from app import jobs, uploads
from app.components.choice import Choice
from app.lab import Lab
from app.story import megabytes
from app.tabs.events import EVERY, LAST, ONCE, in_turn, kept
from app.words import warning
from lpo.places import resolve_base
from storage.jobs import JobError

FORMATS = [("JSONL and pictures (zip)", "zip"), ("Pick-a-Pic parquet", "parquet")]
ENDINGS = (".zip", ".parquet")
NEW = ("a study of its own", 0)
ENDED = ("done", "failed", "stopped", "cancelled")
KINDS = ("import", "export", "gaps")
ACTIONS = {"stop": jobs.stop, "resume": jobs.resume}
WANTED = "choose a .zip exported by a lab, HPDv2 as a .zip, or one or more Pick-a-Pic .parquet files"
SELECT = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('select', { act: button.dataset.act, job: button.dataset.job });
});"""
STYLE = """
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { padding: 6px 10px 6px 0; border-top: 1px solid var(--border-color-primary); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { min-width: 30%; }
small, .ex-quiet { color: var(--body-text-color-subdued); }
details { margin-top: 3px; }
a { text-decoration: underline; }
ul { margin: 2px 0 2px 18px; padding: 0; }
progress { width: 180px; height: 8px; vertical-align: middle; margin-right: 8px; accent-color: var(--color-accent); }
button { border: 1px solid var(--border-color-primary); background: none; color: inherit; border-radius: 4px;
  font-size: 12px; padding: 0 8px; margin-left: 8px; cursor: pointer; }
button:hover { border-color: var(--color-accent); }
"""


def build(lab: Lab) -> tuple[Callable, gr.State]:
    """The section at the foot of the tab; returns `opened(event)`, which refreshes it after an event of the tab, and
    what changes when an import or a computation of score gaps has ended: the rest of the tab shows more then."""
    with gr.Accordion("Export and import", open=False, elem_id="data-exchange"):
        with gr.Row():
            with gr.Column(min_width=320):
                out_study = Choice([], label="study to export", elem_id="data-export-study")
                format_ = gr.Radio(FORMATS, value="zip", label="format", elem_id="data-export-format")
                out = gr.Button("Export", elem_id="data-export", elem_classes=ONCE)
            with gr.Column(min_width=320):
                with gr.Row():
                    into = Choice([NEW], value=0, label="import into", elem_id="data-import-study")
                    base = gr.Textbox(
                        "scenes", label="base model of a new study", max_lines=1, elem_id="data-import-base"
                    )
                upload = gr.File(
                    label="file (.zip, or .parquet: one or all parts)",
                    file_types=list(ENDINGS),
                    file_count="multiple",
                    height=130,
                    elem_id="data-import-file",
                )
                path = gr.Textbox(
                    label="or a path on the machine that runs the lab",
                    placeholder="/data/pickapic_v1  (.parquet, a folder of them, HPDv2's train.json, .jsonl, .zip)",
                    max_lines=1,
                    elem_id="data-import-path",
                )
                bring = gr.Button("Import", elem_id="data-import", elem_classes=ONCE)
        note = gr.Markdown(elem_id="data-exchange-note")
        listing = gr.HTML(css_template=STYLE, js_on_load=SELECT, apply_default_css=False, elem_id="data-jobs")
    timer, ended = gr.Timer(1.0, active=False), gr.State([])
    moving = [listing, timer, ended]

    def export(study_id, kind):
        try:
            start_export(lab, study_id, kind)
        except ValueError as error:
            return warning(error), gr.skip(), gr.skip(), gr.skip()
        return "", *progress(lab)

    def bring_in(files, path, study_id, base):
        try:
            start_import(lab, files, path, study_id or None, base)
        except ValueError as error:
            return warning(error), *[gr.skip()] * 5
        return "", None, "", *progress(lab)

    def act(event: gr.EventData):
        try:
            ACTIONS[event.act](lab, event.job)
        except JobError as error:  # it ended, or was resumed in another window, meanwhile
            gr.Warning(str(error))
        return progress(lab)

    def refresh(study_id, into_id):
        """Fresh study choices, and how the jobs are going."""
        known = [(row.name, row.id) for row in lab.studies()]
        return kept(known, study_id, lab.current_study().id), kept([NEW, *known], into_id), *progress(lab)

    quiet = in_turn("data-exchange")
    out.click(export, [out_study, format_], [note, *moving], **quiet)
    bring.click(bring_in, [upload, path, into, base], [note, upload, path, *moving], **quiet)
    listing.select(act, None, moving, **quiet, **EVERY)
    timer.tick(lambda: progress(lab), None, moving, **quiet)
    fresh = [out_study, into]
    return lambda event: event.then(refresh, fresh, [*fresh, *moving], **quiet, **LAST), ended


def start_export(lab: Lab, study_id: int | None, kind: str) -> str:
    """Queues an export; returns the job's id."""
    if study_id not in {row.id for row in lab.studies()}:
        raise ValueError("No study is chosen; choose the study to export.")
    if kind not in dict(map(reversed, FORMATS)):
        raise ValueError(f"{kind!r} is not an export format; choose zip or parquet.")
    return jobs.submit(lab, "export", {"format": kind, "study_id": study_id}, study_id)


def start_import(
    lab: Lab, files: list[str] | None, path: str, study_id: int | None, base: str | None = "scenes"
) -> str:
    """Takes over uploaded files, or checks a path on this machine, and queues the import; returns the job's id. `base`
    is that of a study which is made for the data; a study that is there keeps its own."""
    if not files and not (path or "").strip():
        raise ValueError(f"No file is chosen; {WANTED}.")
    if study_id is not None and study_id not in {row.id for row in lab.studies()}:
        raise ValueError("That study is gone; choose another one to import into.")
    if study_id is None and not (base or "").strip():
        raise ValueError("A new study needs a base model; give scenes, or the folder or id of the model to train.")
    if study_id is None:
        resolve_base(base.strip())
    if files:
        config = uploads.take_over(lab, files, ENDINGS, WANTED)
    else:
        found = uploads.local_path(lab, path)
        config = {"path": str(found), "name": found.name}
    return jobs.submit(lab, "import", {**config, "study_id": study_id, "base": (base or "").strip()}, study_id)


def progress(lab: Lab) -> list:
    """The list of exports and imports as HTML, whether to keep polling, and what has ended of what adds to the lab."""
    rows = [row for row in jobs.list_jobs(lab, lane="data", limit=30) if row["kind"] in KINDS]
    names = {row.id: row.name for row in lab.studies()}
    lines = "".join(f"<tr><td>{_what(row)}</td><td>{_state(lab, row, names)}</td></tr>" for row in rows)
    table = f"<table>{lines}</table>" if lines else '<p class="ex-quiet">Nothing was exported or imported yet.</p>'
    ended = [row["id"] for row in rows if row["kind"] != "export" and row["state"] in ENDED]
    return [table, gr.Timer(active=any(row["state"] not in ENDED for row in rows)), ended]


def _what(row: dict) -> str:
    config = row["config"]
    if row["kind"] == "import":
        return f"Import of {escape(config.get('path') or config['name'])}"  # the whole path: its box is empty now
    if row["kind"] == "gaps":
        return f"Score gaps of {escape(config['name'])}" if config["source"] == "csv" else "Score gaps, computed here"
    return f"Export as {escape(config['format'])}"


def _state(lab: Lab, row: dict, studies: dict[int, str]) -> str:
    if row["state"] == "failed":
        upload = row["config"].get("upload")  # an unreadable one was thrown away: there is nothing to try again
        again = not upload or (lab.store.cache_dir / "uploads" / upload).exists()
        return f"⚠️ {escape(row['error'] or 'It failed.')}{_button(row, 'resume', 'Try again') if again else ''}"
    if row["state"] == "queued":
        return f"{jobs.waiting(lab)} {_button(row, 'stop')}"
    if row["state"] in ("stopped", "cancelled"):
        return escape(row["message"] or row["state"]) + _button(row, "resume")
    if row["state"] != "done":
        share = row["progress"]
        bar = "" if share is None else f'<progress value="{share:.4f}"></progress>'
        return bar + escape(row["message"] or row["state"]) + _button(row, "stop")
    result = row["result"] or {}
    if row["kind"] == "gaps":
        return _gaps_report(result)
    if row["kind"] == "export":
        link = f'<a href="exports/{row["id"]}" download><b>Download</b></a>'
        what = "pairs" if row["config"]["format"] == "zip" else "labels"  # a parquet row is one answer
        return f"{link} <small>{result['done']:,} {what}, {megabytes(result['bytes'])}</small>"
    return _report(result, row["id"], studies.get(result["study_id"], ""))


def _button(row: dict, act: str, words: str = "") -> str:
    return f'<button type="button" data-act="{act}" data-job="{row["id"]}">{words or act.capitalize()}</button>'


def _gaps_report(result: dict) -> str:
    words = f"{result['labels']:,} labels have score gaps now"
    if result.get("disagree"):
        words += (
            f"; ⚠️ {result['disagree']:,} rows say tie where the label does not, or the other way round: "
            "is it the CSV of this very file, in its order?"
        )
    return words


def _report(result: dict, job_id: str, study: str) -> str:
    """What an import took and what it refused, every reason counted, every rejected row to download."""
    refused = sum(result["rejected"].values())
    words = (
        f"{result['done']:,} rows: {result['pairs']:,} new pairs, {result['labels']:,} new labels, "
        f"{result['duplicates']:,} already here, {refused:,} rejected <small>in study {escape(study)}</small>"
    )
    if not refused:
        return words
    reasons = "".join(f"<li>{count:,} × {escape(reason)}</li>" for reason, count in result["rejected"].items())
    examples = "".join(f"<li>{escape(each)}</li>" for each in result["examples"])
    link = f'<a href="imports/{job_id}/rejected.csv" download>All rejected rows (CSV)</a>'
    first = f"<small>The first ones:</small><ul>{examples}</ul>"
    return f"{words}<details><summary>Why</summary><ul>{reasons}</ul>{link}<br>{first}</details>"
