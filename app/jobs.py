"""What a button may do with a job: submit, stop, resume, duplicate, delete, and read how it is going.

The page only ever writes a row and reads files; the workers do the rest. A job's run folder is `runs/<job id>`.
"""

import json
import shutil
from pathlib import Path

from sqlmodel import select

from app.devices import device_count
from app.lab import Lab
from app.security import annotator_name
from lpo import config as lpo_config
from lpo.preflight import require_startable
from storage import jobs as queue
from storage.jobs import JobError
from storage.models import Checkpoint, Job

LANES = {
    "pairs": "interactive",
    "trace": "interactive",
    "compare": "interactive",
    "train-lrm": "training",
    "train-lpo": "training",
    "import": "data",
    "export": "data",
    "export-model": "data",
    "import-model": "data",
    "gaps": "data",
}
PROCESSES = "processes"  # key of a training job's config beside its settings: how many devices train together
RESUMABLE = ("stopped", "failed", "cancelled")
TAIL_BYTES = 64 * 1024
METRICS_BYTES = 4 * 2**20
METRICS_ROWS = 2000


def submit(
    lab: Lab, kind: str, config: dict, study_id: int | None = None, *, supersedes: str | None = None, priority: int = 0
) -> str:
    """Queues a job with its config frozen now and returns its id.

    `supersedes` names a line of requests, of which only the newest is looked at: an older job of the same name that has
    not ended is cancelled. Raises ConfigError or JobError, a sentence for the page.
    """
    if kind not in LANES:
        raise JobError(f"{kind!r} is not a kind of job; allowed are {', '.join(LANES)}.")
    if kind in ("train-lrm", "train-lpo"):
        require_startable(lpo_config.from_dict(lpo_config.CONFIGS[kind], settings(config)))
        if not 1 <= config.get(PROCESSES, 1) <= devices(lab):
            raise JobError(f"{config[PROCESSES]} devices are asked for, but this machine has {devices(lab)}.")
    job = queue.submit(
        lab.store, kind, LANES[kind], config, study_id=study_id, supersedes=supersedes, priority=priority
    )
    return job.id


def waiting(lab: Lab) -> str:
    """What a job that is in the queue waits for, as it follows a colon."""
    if lab.settings.workers:
        return "waiting for the worker…"
    return "waiting for a lab that runs with its workers: this one was started with --no-workers."


def trace_line(lab: Lab, tab: str, request) -> str:
    """The line of a person's traces in a tab, for `supersedes`: nobody cancels another's, nor one tab the other's.

    `request` is Gradio's; a person is their annotator cookie, which outlives a reload, else the open page.
    """
    who = annotator_name(lab, request) or request.session_hash
    return f"trace {tab} {lab.current_study().id} {who}"


def settings(config: dict) -> dict:
    """A training job's settings as lpo knows them: the number of processes is the launcher's business."""
    return {name: value for name, value in config.items() if name != PROCESSES}


def devices(lab: Lab) -> int:
    """How many devices a training may use at once, as a worker has counted them; 1 until it has."""
    return device_count(lab.store)


def stop(lab: Lab, job_id: str) -> None:
    """Asks a running job to save itself and stop; a queued one is cancelled."""
    queue.request_stop(lab.store, job_id)


def resume(lab: Lab, job_id: str) -> None:
    """Lets a stopped, failed or cancelled job go on from where it saved itself."""
    queue.requeue(lab.store, job_id)


def duplicate(lab: Lab, job_id: str) -> str:
    """Queues the same work again as a new job; returns its id."""
    job = queue.get(lab.store, job_id)
    return submit(lab, job.kind, dict(job.config), job.study_id)


def delete(lab: Lab, job_id: str) -> str:
    """Forgets an ended job. Its run folder goes too, unless checkpoints that can still be chosen lie in it.

    Returns the sentence that says which of the two happened.
    """
    with lab.store.reader() as session:
        query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.hidden == False)  # noqa: E712  (SQL)
        kept = len(session.exec(query).all())
    queue.delete_job(lab.store, job_id)
    if kept:
        return f"The job is deleted; its run folder stays, because {kept} of its checkpoints can still be chosen."
    shutil.rmtree(run_dir(lab, job_id), ignore_errors=True)
    return "The job and its run folder are deleted."


def run_dir(lab: Lab, job_id: str) -> Path:
    """Where the job's files are (config.json, log.txt, metrics.jsonl, samples/, checkpoints/), once it has started."""
    return lab.store.runs_dir / job_id


def list_jobs(lab: Lab, study_id: int | None = None, lane: str | None = None, limit: int = 50) -> list[dict]:
    """Newest first, as `describe` without what has to be read from files."""
    return [_row(job) for job in queue.list_jobs(lab.store, lane=lane, study_id=study_id, limit=limit)]


def describe(lab: Lab, job_id: str) -> dict:
    """Everything a page shows of one job.

    {id, kind, lane, state, config, study_id, progress 0..1 or None, left_s or None, message, error, result, created_at,
    started_at, finished_at, resumable, run_dir, metrics (list of rows), log (text), samples (list of {step, prompt,
    path})}. Raises JobError if there is no such job.
    """
    row = _row(queue.get(lab.store, job_id))
    folder = run_dir(lab, job_id)
    rows = read_metrics(folder / "metrics.jsonl")
    log = read_tail(folder / "log.txt")
    return {
        **row,
        "left_s": rows[-1].get("left_s") if rows and row["state"] in ("running", "stopping") else None,
        "run_dir": str(folder),
        "metrics": rows,
        "log": log,
        "samples": read_samples(folder / "samples"),
    }


def _row(job: Job) -> dict:
    row = job.model_dump(exclude={"pid", "pid_started", "worker", "supersedes", "priority", "heartbeat", "run_dir"})
    return {**row, "resumable": job.state in RESUMABLE}


def read_tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The last whole lines of a text file, at most `size` bytes: a log of any length never hangs a page."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(0, 2)
        start = max(0, file.tell() - size)
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    return text if start == 0 else text.partition("\n")[2]


def read_metrics(path: Path, limit: int = METRICS_ROWS) -> list[dict]:
    """The rows of a metrics.jsonl, thinned evenly to at most about `limit`; the newest row is always there."""
    rows = []
    for line in read_tail(path, METRICS_BYTES).splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that is being written just now
            continue
    stride = -(-len(rows) // limit) or 1
    return rows[::-1][::stride][::-1]


def read_samples(folder: Path, limit: int = 200) -> list[dict]:
    """Pictures made while training, oldest step first: samples/step_000010/prompt0_seed0.png."""
    found = []
    for step in sorted(folder.glob("step_*"))[-limit:]:
        found += [
            {"step": int(step.name.removeprefix("step_")), "prompt": picture.stem, "path": str(picture)}
            for picture in sorted(step.glob("*.png"))
        ]
    return found[-limit:]
