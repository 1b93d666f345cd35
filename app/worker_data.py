"""Runs imports and exports in the data lane. Imports no torch.

An import's config is {"upload": folder in `cache/uploads`, "name": the one file in it, "study_id": id or None};
an export's {"format": "zip" | "parquet", "study_id"}. The result of both is the last report of `storage/exchange`.
"""

import re
import shutil
from pathlib import Path

from app.worker_task import Stopped, Task
from storage import Storage
from storage.exchange import ExchangeError, export_jsonl, export_parquet, import_data

ENDINGS = {"zip": ".zip", "parquet": ".parquet"}
UPLOAD = re.compile(r"[0-9a-z]{1,64}")


def uploads(store: Storage, name: str) -> Path:
    """The folder of one upload; its name is made by the page and has letters and digits only."""
    if not UPLOAD.fullmatch(name):
        raise ExchangeError("That is not the name of an upload; choose the file again.")
    return store.cache_dir / "uploads" / name


def run(task: Task) -> dict:
    """The job's result. Raises Stopped or a ValueError sentence."""
    return run_import(task) if task.job.kind == "import" else run_export(task)


def run_import(task: Task) -> dict:
    """Imports an uploaded file; stopped and resumed at any row, it doubles nothing (see `storage/exchange`).

    The upload is deleted once it is in, or known to be unreadable; it stays for a stopped import.
    """
    config = task.job.config
    folder = uploads(task.store, config["upload"])
    path = folder / Path(config["name"]).name
    if not path.exists():
        raise ExchangeError(f"The uploaded file {config['name']} is gone; choose it again.")
    report: dict = {}
    try:
        for report in import_data(task.store, path, config.get("study_id")):
            share = report["done"] / report["total"] if report["total"] else None
            task.say(share, f"{report['done']:,} rows read, {report['pairs']:,} pairs are new")
            if task.stopping and not report["finished"]:
                raise Stopped
    except ValueError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return report


def run_export(task: Task) -> dict:
    """Writes the study into the run folder; the Data tab links to it. A stopped export starts again from its top."""
    config = task.job.config
    write = {"zip": export_jsonl, "parquet": export_parquet}[config["format"]]
    target = task.folder / f"export{ENDINGS[config['format']]}"
    target.unlink(missing_ok=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    report: dict = {}
    for report in write(task.store, config["study_id"], target):
        task.say(None, f"{report['done']:,} rows written")
        if task.stopping and not report["finished"]:
            raise Stopped
    return {**report, "path": target.name, "bytes": target.stat().st_size}
