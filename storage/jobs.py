"""The queue of jobs. Every change of state is one UPDATE that names the state it expects, so that two workers, a
button and a crash can never both win.

States: queued -> running -> done | failed; running -> stopping -> stopped; queued -> cancelled. `requeue` sends a
stopped, failed or cancelled job back to the queue (its run folder makes it resume). A running job whose heartbeat is
old, and whose process is gone or belongs to no living worker, is an orphan that a worker may `adopt`.
"""

import time
from collections.abc import Collection

import psutil
from sqlalchemy import case, delete, update
from sqlmodel import select

from .db import Storage, StorageError, only
from .models import ENDED, LANES, Job

STALE_SECONDS = 15.0


class JobError(StorageError):
    """A job that cannot do what was asked, in one sentence."""


class JobLost(JobError):
    """The job is no longer this worker's: it was adopted, deleted, or ended by someone else."""


def process_start(pid: int) -> float | None:
    """When the process began (seconds since 1970), None if there is none: with the pid this names one process only."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return 0.0  # someone else's process: alive, but not one that we started


def is_process(pid: int, started: float) -> bool:
    """Whether the very process that had this pid and began then still runs; a reused pid has another start time."""
    now = process_start(pid)
    return now is not None and abs(now - started) < 2.0


def process_alive(job: Job) -> bool:
    """Whether the process that the job recorded still runs."""
    return job.pid is not None and job.pid_started is not None and is_process(job.pid, job.pid_started)


def submit(
    store: Storage,
    kind: str,
    lane: str,
    config: dict,
    *,
    study_id: int | None = None,
    run_dir: str | None = None,
    supersedes: str | None = None,
    priority: int = 0,
) -> Job:
    """Queue a job with its config frozen now. Jobs of the same `supersedes` key that have not ended are cancelled
    (queued) or told to stop (running). Higher `priority` is claimed first, then the older job."""
    if lane not in LANES:
        raise JobError(f"{lane!r} is not a lane; allowed are {', '.join(LANES)}.")
    row = Job(kind=kind, lane=lane, config=config, study_id=study_id, run_dir=run_dir)
    row.supersedes, row.priority = supersedes, priority
    with store.session() as session:
        if supersedes is not None:
            _stop(session, Job.supersedes == supersedes, "superseded by a newer request")
        session.add(row)
    return row


def claim(
    store: Storage, lane: str, worker: str, pid: int | None = None, kinds: Collection[str] | None = None
) -> Job | None:
    """Take the next queued job of the lane in one UPDATE ... RETURNING; None if there is none (of these kinds)."""
    pick = select(Job.id).where(Job.lane == lane, Job.state == "queued")
    if kinds is not None:
        pick = pick.where(Job.kind.in_(list(kinds)))
    pick = pick.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)
    now = time.time()
    with store.reader() as session:  # an idle worker polls without taking the write lock
        if session.exec(pick).first() is None:
            return None
    values = {
        "state": "running", "worker": worker, "heartbeat": now, "finished_at": None, "error": None,
        "pid": pid, "pid_started": None if pid is None else process_start(pid),
        "started_at": case((Job.started_at.is_(None), now), else_=Job.started_at),
    }  # fmt: skip
    return _change(store, Job.id == pick.scalar_subquery(), values)


def set_process(store: Storage, job_id: str, worker: str, pid: int) -> Job:
    """Record the process that does the work (for a training job: the child), with its start time."""
    values = {"pid": pid, "pid_started": process_start(pid), "heartbeat": time.time()}
    return _mine(store, job_id, worker, values)


def heartbeat(
    store: Storage, job_id: str, worker: str, progress: float | None = None, message: str | None = None
) -> str:
    """Say that the worker lives, with progress in [0, 1] and a line for the page; returns the state, so that the
    worker sees "stopping". Raises JobLost if the job is no longer this worker's."""
    values: dict = {"heartbeat": time.time()}
    if progress is not None:
        values["progress"] = min(1.0, max(0.0, progress))
    if message is not None:
        values["message"] = message
    return _mine(store, job_id, worker, values).state


def finish(store: Storage, job_id: str, worker: str, result: dict | None = None) -> Job:
    return _mine(store, job_id, worker, {**_end("done"), "progress": 1.0, "result": result, "error": None})


def fail(store: Storage, job_id: str, worker: str, error: str) -> Job:
    """`error` is the sentence that the page shows."""
    return _mine(store, job_id, worker, {**_end("failed"), "error": error})


def stopped(store: Storage, job_id: str, worker: str, message: str = "stopped; can be resumed") -> Job:
    """The work was saved and ended before its end."""
    return _mine(store, job_id, worker, {**_end("stopped"), "message": message})


def request_stop(store: Storage, job_id: str, message: str = "stopping") -> Job:
    """Cancel a queued job, ask a running one to save and stop; an ended job stays as it is."""
    with store.session() as session:
        _stop(session, Job.id == job_id, message)
    return get(store, job_id)


def requeue(store: Storage, job_id: str) -> Job:
    """Send a stopped, failed or cancelled job back to the queue, to resume from its run folder."""
    values = {"state": "queued", "worker": None, "pid": None, "pid_started": None, "heartbeat": None,
              "finished_at": None, "error": None, "message": None, "result": None}  # fmt: skip
    job = _change(store, (Job.id == job_id) & Job.state.in_(("stopped", "failed", "cancelled")), values)
    if job is None:
        state = get(store, job_id).state
        raise JobError(f"This job is {state}; only a stopped, failed or cancelled one can be resumed.")
    return job


def orphans(store: Storage, lane: str | None = None, stale: float = STALE_SECONDS) -> list[Job]:
    """Running or stopping jobs whose heartbeat is older than `stale` seconds: nobody watches them. `process_alive`
    tells whether their process still works (adopt and watch it) or is gone (adopt, then resume or give up)."""
    query = select(Job).where(Job.state.in_(("running", "stopping")), Job.heartbeat < time.time() - stale)
    with store.reader() as session:
        return list(session.exec(only(query, (Job.lane, lane))))


def adopt(store: Storage, job_id: str, worker: str, stale: float = STALE_SECONDS) -> Job | None:
    """Become the worker of an orphan, keeping its state and process; None if somebody else was faster."""
    unwatched = Job.state.in_(("running", "stopping")) & (Job.heartbeat < time.time() - stale)
    return _change(store, (Job.id == job_id) & unwatched, {"worker": worker, "heartbeat": time.time()})


def release(store: Storage, job_id: str, worker: str) -> Job:
    """Put an own job back to the queue (its process is gone, or the lab shuts down), to be resumed by any worker.
    A job that was asked to stop becomes stopped instead."""
    to_stop = Job.state == "stopping"
    values = {
        "state": case((to_stop, "stopped"), else_="queued"),
        "finished_at": case((to_stop, time.time()), else_=None),
        "worker": None, "pid": None, "pid_started": None,
    }  # fmt: skip
    return _mine(store, job_id, worker, values)


def get(store: Storage, job_id: str) -> Job:
    with store.reader() as session:
        row = session.get(Job, job_id)
    if row is None:
        raise JobError(f"There is no job {job_id[:12]} any more.")
    return row


def list_jobs(
    store: Storage, *, lane: str | None = None, kinds: Collection[str] | None = None,
    states: Collection[str] | None = None, study_id: int | None = None, limit: int = 200,
) -> list[Job]:  # fmt: skip
    """Newest first."""
    query = select(Job).order_by(Job.created_at.desc(), Job.id).limit(limit)
    query = only(query, (Job.lane, lane), (Job.study_id, study_id))
    if kinds is not None:
        query = query.where(Job.kind.in_(list(kinds)))
    if states is not None:
        query = query.where(Job.state.in_(list(states)))
    with store.reader() as session:
        return list(session.exec(query))


def delete_job(store: Storage, job_id: str) -> Job:
    """Forget an ended job and return its last state; its run folder is the caller's to delete or keep."""
    job = get(store, job_id)
    with store.session() as session:
        gone = session.execute(delete(Job).where(Job.id == job_id, Job.state.in_(ENDED)))
        if gone.rowcount == 0:
            raise JobError(f"This job is {job.state}; stop it before deleting it.")
    return job


def _end(state: str) -> dict:
    return {"state": state, "finished_at": time.time(), "heartbeat": time.time(), "pid": None, "pid_started": None}


def _stop(session, which, message: str) -> None:
    queued, running = (Job.state == "queued"), (Job.state == "running")
    session.execute(update(Job).where(which & running).values(state="stopping", message=message))
    cancelled = {"state": "cancelled", "message": message, "finished_at": time.time()}
    session.execute(update(Job).where(which & queued).values(**cancelled))


def _change(store: Storage, which, values: dict) -> Job | None:
    """The one UPDATE ... RETURNING behind every change; None if no row was in the expected state."""
    statement = update(Job).where(which).values(**values).returning(Job)
    with store.session() as session:
        return session.execute(statement, execution_options={"synchronize_session": False}).scalars().first()


def _mine(store: Storage, job_id: str, worker: str, values: dict) -> Job:
    own = (Job.id == job_id) & (Job.worker == worker) & Job.state.in_(("running", "stopping"))
    job = _change(store, own, values)
    if job is None:
        raise JobLost(f"Job {job_id[:12]} is no longer run by {worker}.")
    return job
