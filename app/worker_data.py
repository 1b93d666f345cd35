"""Runs imports and exports in the data lane. Imports no torch.

An import's config is {"upload": folder in `cache/uploads`, "name": the file in it, or the folder's own title if several
parquet files came together} or {"path": a file or folder of this machine, "name"}, with {"study_id": id or None,
"base": of a new study}; an export's {"format": "zip" | "parquet", "study_id"}. The result of both is the last report of
`storage/exchange`.
"""

import re
import shutil
from pathlib import Path

from app.worker_task import Stopped, Task
from storage import Storage, Unwritable
from storage.exchange import ExchangeError, export_jsonl, export_parquet, import_data

ENDINGS = {"zip": ".zip", "parquet": ".parquet"}
UPLOAD = re.compile(r"[0-9a-z]{1,64}")


def uploads(store: Storage, name: str) -> Path:
    """The folder of one upload; its name is made by the page and has letters and digits only."""
    if not UPLOAD.fullmatch(name):
        raise ExchangeError("That is not the name of an upload; choose the file again.")
    return store.cache_dir / "uploads" / name


def uploaded(store: Storage, config: dict) -> tuple[Path, Path]:
    """The folder of a job's upload, and what lies in it: one file, or a folder of parquet files."""
    folder = uploads(store, config["upload"])
    path = folder / Path(config["name"]).name
    if not path.exists():
        raise ExchangeError(f"The uploaded file {config['name']} is gone; choose it again.")
    return folder, path


def run(task: Task) -> dict:
    """The job's result. Raises Stopped or a ValueError sentence."""
    return run_import(task) if task.job.kind == "import" else run_export(task)


def run_import(task: Task) -> dict:
    """Imports an upload or what lies on this machine; stopped, killed and resumed, it goes on with the next row.

    An upload is deleted once it is in, or known to be unreadable; it stays for a stopped import and on a full disk.
    """
    config = task.job.config
    folder, path = (None, Path(config["path"])) if "path" in config else uploaded(task.store, config)
    report: dict = {}
    try:
        for report in import_data(task.store, path, config.get("study_id"), config.get("base", "scenes")):
            share = report["done"] / report["total"] if report["total"] else None
            task.say(share, _progress(report))
            if task.stopping and not report["finished"]:
                raise Stopped
    except Unwritable:
        raise
    except ValueError:
        _discard(folder)
        raise
    _discard(folder)
    return report


def _discard(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder)


def _progress(report: dict) -> str:
    if report["waiting"]:
        return "Waits for another import of the same file"
    total = "" if report["total"] is None else f" of {report['total']:,}"
    words = f"{report['done']:,}{total} rows read, {report['pairs']:,} pairs are new"
    refused = sum(report["rejected"].values())
    if refused:
        words += f", {refused:,} rejected"
    left = report.get("left_s")
    return words if left is None else f"{words}; about {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{seconds:.0f} s"


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
