"""Exports and imports of models in the data lane: a child `python -m lpo export` or `check` does the work, so that its
memory is given back and a damaged file cannot take the worker down. Imports no torch itself.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from app.lab import ROOT
from app.models import EXPORT
from app.worker_task import Stopped, Task
from storage import checkpoints
from storage.models import Checkpoint
from storage.studies import get_study

COMMAND = [sys.executable, "-m", "lpo"]
POLL_SECONDS = 0.2
FLAGS = {"adapter": "--adapter", "lrm": "--lrm", "base": "--unet"}


class ModelError(ValueError):
    """Why a model cannot be exported or taken in, in one sentence."""


def run(task: Task) -> dict:
    """The job's result. Raises Stopped or a ValueError sentence. A stopped job starts again from its top."""
    task.folder.mkdir(parents=True, exist_ok=True)
    return run_export(task) if task.job.kind == EXPORT else run_import(task)


def run_export(task: Task) -> dict:
    """{"files": [{"name", "bytes"}]} in `export/` of the run folder; folders become one zip file."""
    config, target = task.job.config, task.folder / "export"
    row = checkpoints.get_checkpoint(task.store, config["checkpoint_id"])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    name = re.sub(r"[^A-Za-z0-9]+", "-", row.name).strip("-").lower() or "model"
    (task.folder / "about.json").write_text(json.dumps({"format_version": 1, **config["about"]}))
    arguments = ["export", "--format", config["format"]]
    if row.kind == "lrm":
        arguments += ["--lrm", row.path, "--out", str(target / name)]
        arguments += [] if "@" in Path(row.path).name else ["--base", lrm_base(task, row)]
    else:
        out = target / (name if config["format"] == "merged" else f"{name}.safetensors")
        arguments += ["--adapter", row.path, "--out", str(out), "--dtype", config["dtype"], "--title", row.name]
        arguments += ["--about", str(task.folder / "about.json"), "--stack", "last" if config["alone"] else "merged"]
        base = (row.meta.get("policy") or {}).get("base")
        arguments += ["--base", base] if base else []
    child(task, arguments, "writing the files")
    for folder in [path for path in target.iterdir() if path.is_dir()]:
        pack(folder)
    files = sorted(target.iterdir(), key=lambda path: (path.suffix == ".md", path.name))
    return {"files": [{"name": file.name, "bytes": file.stat().st_size} for file in files]}


def lrm_base(task: Task, row: Checkpoint) -> str:
    """The base that an LRM was trained on; of one from elsewhere, that of the study it was checked for."""
    return row.meta.get("config", {}).get("base") or get_study(task.store, row.study_id).base


def pack(folder: Path) -> None:
    """`folder` as folder.zip beside it; weights do not shrink, so nothing is compressed."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, Path(folder.name) / file.relative_to(folder))
    shutil.rmtree(folder)


def run_import(task: Task) -> dict:
    """Checks the model, then lists it as a checkpoint: {"checkpoint_id", "words"}."""
    config = task.job.config
    other = config["kind"] == "lrm" and config["lrm_base"]
    path = f"{config['path']}@{config['lrm_base']}" if other else config["path"]
    printed = child(task, ["check", FLAGS[config["kind"]], path, "--base", config["base"]], "checking it")
    meta: dict = {"imported": True, "final": True}
    if config["kind"] == "adapter":
        meta["policy"] = {"base": config["base"], "adapters": []}
    row = checkpoints.add_checkpoint(
        task.store, kind=config["kind"], name=config["name"], path=path, study_id=task.job.study_id, meta=meta
    )
    if row.hidden:
        checkpoints.hide_checkpoint(task.store, row.id, hidden=False)
    return {"checkpoint_id": row.id, "words": printed.strip().splitlines()[-1]}


def child(task: Task, arguments: list[str], doing: str) -> str:
    """What `python -m lpo ...` printed. Raises Stopped, or ModelError with its sentence."""
    task.say(None, doing)
    printed, said = task.folder / "printed.txt", task.folder / "log.txt"
    with open(printed, "w") as out, open(said, "w") as err:
        process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while process.poll() is None:
                if task.stopping:
                    raise Stopped
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return printed.read_text()
    said_last = [line for line in said.read_text().splitlines() if line.removeprefix("error: ").strip()][-1:]
    if said_last and said_last[0].startswith("error: "):
        raise ModelError(said_last[0].removeprefix("error: "))
    raise ModelError(f"It ended with exit code {process.returncode}, most likely for want of memory; see its log.")
