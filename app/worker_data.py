"""Imports and exports: storage does the work row by row, this reports how far it is and stops between rows.

Import: {"upload", "name", "study_id" or None}, the file being `cache/uploads/<upload>/<name>`; its result is the
import's tally. Export: {"format": "zip" or "parquet", "study_id"}; its result names the file in the run folder.
"""

import shutil

from app.worker_task import Stopped, Task
from storage import exchange


def run(task: Task) -> dict:
    return import_file(task) if task.job.kind == "import" else export_file(task)


def import_file(task: Task) -> dict:
    """Takes rows in; stopped and resumed it starts over, and what is there already counts as a duplicate."""
    config = task.job.config
    folder = task.store.cache_dir / "uploads" / config["upload"]
    state: dict = {}
    for state in exchange.import_data(task.store, folder / config["name"], config["study_id"]):
        total = state["total"]
        task.say(state["done"] / total if total else None, f"{state['done']:,} rows")
        if task.stopping and not state["finished"]:
            raise Stopped
    shutil.rmtree(folder)
    return state


def export_file(task: Task) -> dict:
    """Writes the file that the page offers for download."""
    config = task.job.config
    task.folder.mkdir(parents=True, exist_ok=True)
    target = task.folder / f"study.{config['format']}"
    target.unlink(missing_ok=True)  # of an earlier attempt whose end was not recorded
    write = exchange.export_jsonl if config["format"] == "zip" else exchange.export_parquet
    state: dict = {}
    for state in write(task.store, config["study_id"], target):
        task.say(None, f"{state['done']:,} rows")
        if task.stopping and not state["finished"]:
            raise Stopped
    return {"path": target.name, "done": state["done"], "bytes": target.stat().st_size}
