"""The way in and out of the lab: export and import as jobs of the data lane, each with its report.

Uploads are hostile: a file goes into a folder of our own naming, and `storage/exchange` checks every row.
"""

import re
import shutil
import uuid
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr

from app import jobs
from app.lab import Lab
from app.story import megabytes

FORMATS = [("JSONL and pictures (zip)", "zip"), ("Pick-a-Pic parquet", "parquet")]
ENDINGS = (".zip", ".parquet")
NEW = ("a study of its own", 0)
ENDED = ("done", "failed", "stopped", "cancelled")
STYLE = """
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { padding: 6px 10px 6px 0; border-top: 1px solid var(--border-color-primary); vertical-align: top; }
small, .ex-quiet { color: var(--body-text-color-subdued); }
details { margin-top: 3px; }
ul { margin: 2px 0 2px 18px; padding: 0; }
"""


@dataclass(frozen=True)
class Exchange:
    """Handles that the tab refreshes when it is opened."""

    lab: Lab
    outputs: list

    def refresh(self) -> list:
        """Fresh study choices, the list of jobs, and whether to keep polling."""
        known = [(row.name, row.id) for row in self.lab.studies()]
        current = self.lab.current_study().id
        return [gr.Dropdown(known, value=current), gr.Dropdown([NEW, *known]), *progress(self.lab)]


def build(lab: Lab) -> Exchange:
    """The section at the foot of the tab."""
    with gr.Accordion("Export and import", open=False, elem_id="data-exchange"):
        with gr.Row():
            with gr.Column(min_width=320):
                out_study = gr.Dropdown([], label="study to export", elem_id="data-export-study")
                format_ = gr.Radio(FORMATS, value="zip", label="format", elem_id="data-export-format")
                out = gr.Button("Export", elem_id="data-export")
            with gr.Column(min_width=320):
                into = gr.Dropdown([NEW], value=0, label="import into", elem_id="data-import-study")
                upload = gr.File(
                    label="file (.zip or .parquet)", file_types=list(ENDINGS), height=150, elem_id="data-import-file"
                )
                bring = gr.Button("Import", elem_id="data-import")
        note = gr.Markdown(elem_id="data-exchange-note")
        listing = gr.HTML(css_template=STYLE, apply_default_css=False, elem_id="data-jobs")
    timer = gr.Timer(1.0, active=False)

    def export(study_id, kind):
        try:
            start_export(lab, study_id, kind)
        except ValueError as error:
            return f"⚠️ {error}", gr.skip(), gr.skip()
        return "", *progress(lab)

    def bring_in(path, study_id):
        try:
            start_import(lab, path, study_id or None)
        except ValueError as error:
            return f"⚠️ {error}", gr.skip(), gr.skip(), gr.skip()
        return "", None, *progress(lab)

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    out.click(export, [out_study, format_], [note, listing, timer], **quiet)
    bring.click(bring_in, [upload, into], [note, upload, listing, timer], **quiet)
    timer.tick(lambda: progress(lab), None, [listing, timer], **quiet)
    return Exchange(lab, [out_study, into, listing, timer])


def start_export(lab: Lab, study_id: int | None, kind: str) -> str:
    """Queues an export; returns the job's id."""
    if study_id not in {row.id for row in lab.studies()}:
        raise ValueError("No study is chosen; choose the study to export.")
    if kind not in dict(map(reversed, FORMATS)):
        raise ValueError(f"{kind!r} is not an export format; choose zip or parquet.")
    return jobs.submit(lab, "export", {"format": kind, "study_id": study_id}, study_id)


def start_import(lab: Lab, path: str | None, study_id: int | None) -> str:
    """Takes over an uploaded file and queues its import; returns the job's id."""
    if not path:
        raise ValueError("No file is chosen; choose a .zip exported by a lab or a Pick-a-Pic .parquet file.")
    name = Path(path).name
    if Path(name).suffix.lower() not in ENDINGS:
        raise ValueError(f"{name[:80]} is not a .zip or .parquet file; choose one of those two.")
    if study_id is not None and study_id not in {row.id for row in lab.studies()}:
        raise ValueError("That study is gone; choose another one to import into.")
    upload = uuid.uuid4().hex
    folder = lab.store.cache_dir / "uploads" / upload
    folder.mkdir(parents=True)
    own = re.sub(r"[^\w .()-]", "_", Path(name).stem)[:80] + Path(name).suffix.lower()
    shutil.copyfile(path, folder / own)
    return jobs.submit(lab, "import", {"upload": upload, "name": own, "study_id": study_id}, study_id)


def progress(lab: Lab) -> list:
    """The list of exports and imports as HTML, and whether to keep polling."""
    rows = [row for row in jobs.list_jobs(lab, lane="data", limit=30) if row["kind"] in ("import", "export")]
    lines = "".join(f"<tr><td>{_what(row)}</td><td>{_state(row)}</td></tr>" for row in rows)
    table = f"<table>{lines}</table>" if lines else '<p class="ex-quiet">Nothing was exported or imported yet.</p>'
    return [table, gr.Timer(active=any(row["state"] not in ENDED for row in rows))]


def _what(row: dict) -> str:
    config = row["config"]
    if row["kind"] == "import":
        return f"Import of {escape(config['name'])}"
    return f"Export as {escape(config['format'])}"


def _state(row: dict) -> str:
    if row["state"] == "failed":
        return f"⚠️ {escape(row['error'] or 'It failed.')}"
    if row["state"] == "queued":
        return "waiting for the worker…"
    if row["state"] != "done":
        return escape(row["message"] or row["state"])
    result = row["result"] or {}
    if row["kind"] == "export":
        link = f'<a href="exports/{row["id"]}" download><b>Download</b></a>'
        what = "pairs" if row["config"]["format"] == "zip" else "labels"  # a parquet row is one answer
        return f"{link} <small>{result['done']:,} {what}, {megabytes(result['bytes'])}</small>"
    return _report(result)


def _report(result: dict) -> str:
    """What an import took and what it refused, every reason counted."""
    refused = sum(result["rejected"].values())
    words = (
        f"{result['done']:,} rows: {result['pairs']:,} new pairs, {result['labels']:,} new labels, "
        f"{result['duplicates']:,} already here, {refused:,} rejected"
    )
    if not refused:
        return words
    reasons = "".join(f"<li>{count:,} × {escape(reason)}</li>" for reason, count in result["rejected"].items())
    examples = "".join(f"<li>{escape(each)}</li>" for each in result["examples"])
    first = f"<small>The first ones:</small><ul>{examples}</ul>"
    return f"{words}<details><summary>Why</summary><ul>{reasons}</ul>{first}</details>"
