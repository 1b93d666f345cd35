"""The job queue: atomic claims, heartbeats, stopping, superseding, crashes and adoption."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import wait_for
from sqlalchemy import text

from storage import checkpoints, jobs
from storage.jobs import JobError, JobLost


def age(store, job_id: str, seconds: float) -> None:
    """Make the job's last heartbeat older."""
    with store.session() as session:
        session.execute(text("UPDATE job SET heartbeat = heartbeat - :s WHERE id = :id"), {"s": seconds, "id": job_id})


def test_a_job_from_the_button_to_its_result(store):
    job = jobs.submit(store, "train-lrm", "training", {"steps": 3})
    assert (job.state, len(job.id)) == ("queued", 32)
    assert jobs.claim(store, "interactive", "w") is None
    claimed = jobs.claim(store, "training", "w", pid=os.getpid())
    assert (claimed.id, claimed.state, claimed.worker, claimed.config) == (job.id, "running", "w", {"steps": 3})
    assert claimed.pid_started == pytest.approx(psutil.Process().create_time())
    assert jobs.heartbeat(store, job.id, "w", progress=0.5, message="half") == "running"
    assert jobs.heartbeat(store, job.id, "w", progress=7) == "running"
    assert (jobs.get(store, job.id).progress, jobs.get(store, job.id).message) == (1.0, "half")
    done = jobs.finish(store, job.id, "w", {"accuracy": 0.7})
    assert (done.state, done.progress, done.result, done.pid) == ("done", 1.0, {"accuracy": 0.7}, None)
    assert done.finished_at >= done.started_at >= done.created_at
    with pytest.raises(JobLost):
        jobs.heartbeat(store, job.id, "w")


def test_many_workers_claim_every_job_exactly_once(store):
    wanted = {jobs.submit(store, "pairs", "interactive", {"n": number}).id for number in range(20)}

    def work(name: int) -> list[str]:
        mine = []
        while job := jobs.claim(store, "interactive", f"w{name}"):
            mine.append(job.id)
        return mine

    with ThreadPoolExecutor(10) as pool:
        claimed = [job for mine in pool.map(work, range(10)) for job in mine]
    assert len(claimed) == 20 and set(claimed) == wanted


def test_priority_then_age_and_kinds(store):
    low = jobs.submit(store, "pairs", "interactive", {}, priority=-1)
    old = jobs.submit(store, "compare", "interactive", {})
    new = jobs.submit(store, "trace", "interactive", {})
    assert jobs.claim(store, "interactive", "w", kinds=["trace"]).id == new.id
    assert [jobs.claim(store, "interactive", "w").id for _ in range(2)] == [old.id, low.id]


def test_a_new_request_supersedes_older_ones_of_its_key_only(store):
    running = jobs.submit(store, "trace", "interactive", {}, supersedes="curves-1")
    jobs.claim(store, "interactive", "w")
    queued = jobs.submit(store, "trace", "interactive", {}, supersedes="curves-2")
    other = jobs.submit(store, "pairs", "interactive", {})
    waiting = jobs.submit(store, "trace", "interactive", {}, supersedes="curves-1")
    newest = jobs.submit(store, "trace", "interactive", {}, supersedes="curves-1")
    states = {job.id: job.state for job in jobs.list_jobs(store)}
    assert states == {
        running.id: "stopping", queued.id: "queued", other.id: "queued", waiting.id: "cancelled", newest.id: "queued",
    }  # fmt: skip
    assert jobs.heartbeat(store, running.id, "w") == "stopping"
    assert jobs.stopped(store, running.id, "w").state == "stopped"


def test_stop_resume_and_delete(store):
    job = jobs.submit(store, "train-lpo", "training", {}, run_dir="runs/x")
    assert jobs.request_stop(store, job.id).state == "cancelled"
    assert jobs.requeue(store, job.id).state == "queued"
    first = jobs.claim(store, "training", "w1").started_at
    assert jobs.request_stop(store, job.id).state == "stopping"
    with pytest.raises(JobError, match="is stopping; stop it before"):
        jobs.delete_job(store, job.id)
    with pytest.raises(JobError, match="is stopping; only a stopped"):
        jobs.requeue(store, job.id)
    jobs.stopped(store, job.id, "w1")
    again = jobs.requeue(store, job.id)
    assert (again.state, again.worker, again.error, again.finished_at) == ("queued", None, None, None)
    assert jobs.claim(store, "training", "w2").started_at == first  # the first start is kept
    with pytest.raises(JobLost):
        jobs.finish(store, job.id, "w1")
    jobs.fail(store, job.id, "w2", "The disk is full; free 2 GB and resume.")
    assert jobs.get(store, job.id).error.startswith("The disk")
    row = checkpoints.add_checkpoint(store, kind="adapter", name="A", path="runs/x/final", job_id=job.id)
    assert jobs.delete_job(store, job.id).run_dir == "runs/x"
    assert checkpoints.get_checkpoint(store, row.id).job_id is None  # what a job made outlives its row
    with pytest.raises(JobError, match="no job"):
        jobs.get(store, job.id)
    with pytest.raises(JobError, match="no job"):
        jobs.request_stop(store, job.id)


def test_a_dead_worker_is_noticed_and_its_job_adopted_once(store):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        job = jobs.submit(store, "train-lpo", "training", {})
        jobs.claim(store, "training", "dead")
        jobs.set_process(store, job.id, "dead", child.pid)
        assert jobs.orphans(store) == []
        assert jobs.adopt(store, job.id, "eager") is None  # its worker still beats
        age(store, job.id, 60)
        (orphan,) = jobs.orphans(store, "training")
        assert orphan.id == job.id and jobs.process_alive(orphan)
        assert jobs.orphans(store, "data") == []
        with ThreadPoolExecutor(5) as pool:
            adopted = [got for got in pool.map(lambda n: jobs.adopt(store, job.id, f"w{n}"), range(5)) if got]
        assert len(adopted) == 1 and adopted[0].pid == child.pid
        with pytest.raises(JobLost):
            jobs.heartbeat(store, job.id, "dead")
        child.kill()
        child.wait()
        assert not jobs.process_alive(jobs.get(store, job.id))
        released = jobs.release(store, job.id, adopted[0].worker)
        assert (released.state, released.worker, released.pid) == ("queued", None, None)
    finally:
        child.kill()
        child.wait()


def test_a_released_job_that_was_to_stop_is_stopped(store):
    job = jobs.submit(store, "train-lpo", "training", {})
    jobs.claim(store, "training", "w")
    jobs.request_stop(store, job.id)
    released = jobs.release(store, job.id, "w")
    assert released.state == "stopped" and released.finished_at is not None


def test_a_reused_pid_is_not_the_process(store):
    job = jobs.submit(store, "trace", "interactive", {})
    claimed = jobs.claim(store, "interactive", "w", pid=os.getpid())
    assert jobs.process_alive(claimed)
    claimed.pid_started -= 100
    assert not jobs.process_alive(claimed)
    claimed.pid = None
    assert not jobs.process_alive(claimed)
    assert jobs.get(store, job.id).pid == os.getpid()


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, what="its end")
    assert jobs.process_start(child.pid) is None
    child.wait()


def test_unknown_lanes_are_refused(store):
    with pytest.raises(JobError, match="'fast' is not a lane; allowed are interactive, training, data"):
        jobs.submit(store, "trace", "fast", {})


def test_lists_filter_and_are_newest_first(store):
    made = [jobs.submit(store, kind, "data", {}) for kind in ("import", "export", "import")]
    assert [job.id for job in jobs.list_jobs(store, kinds=["import"])] == [made[2].id, made[0].id]
    assert len(jobs.list_jobs(store, lane="data", states=["queued"], limit=2)) == 2
    assert jobs.list_jobs(store, lane="training") == []
