"""Keeps one worker process per lane alive, and the queue of pairs filled. A thread of the web process.

Workers live in sessions of their own: a closed terminal or a killed web process does not take them along. Each holds
its lane's lock, so a worker that outlived an earlier launch finishes its job first and the new one waits for it.
"""

import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import text

from app import devices, jobs
from app.lab import ROOT, Lab
from storage import jobs as queue
from storage.models import LANES, Job

WORKER = [sys.executable, "-m", "app.worker"]
BACKOFF = (1.0, 60.0)  # seconds before a dead worker is started again: the first time, and at most
STOP_SECONDS = 90.0  # a big model may take that long to save itself
ENOUGH = 60  # pairs left: no more are made
FEW = 20  # pairs left: more are made even while something trains
FIRST_BATCH, BATCH = 4, 8  # the first pairs must be there soon; later ones give way to other requests


@dataclass
class Lane:
    """One worker process and when it may be started (again)."""

    name: str
    process: subprocess.Popen | None = None
    started: float = 0.0
    not_before: float = 0.0
    delay: float = field(default=BACKOFF[0])


class Supervisor:
    """`start()` once, `stop()` once. Everything happens in one daemon thread."""

    def __init__(self, lab: Lab, command: list[str] | None = None):
        self.lab = lab
        self.command = command or WORKER
        self.lanes = [Lane(name) for name in LANES]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._refill = Refill(lab)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                for lane in self.lanes:
                    self._keep(lane)
                self._refill.step()
            except Exception:  # noqa: BLE001  the boundary: whatever fails now (a full disk, say), try again
                traceback.print_exc()
                self._ending.wait(BACKOFF[1] / 4)
            self._ending.wait(1.0)

    def _keep(self, lane: Lane) -> None:
        """Starts the lane's worker if there is none; a worker that dies again and again is started ever more rarely."""
        now = time.monotonic()
        if lane.process is not None:
            if lane.process.poll() is None:
                return
            lane.delay = BACKOFF[0] if now - lane.started > BACKOFF[1] else min(2 * lane.delay, BACKOFF[1])
            lane.not_before = now + lane.delay
            lane.process = None
        if now >= lane.not_before:
            lane.process, lane.started = self._spawn(lane.name), now

    def _spawn(self, lane: str) -> subprocess.Popen:
        logs = Path(self.lab.store.data_dir) / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"worker-{lane}.log"
        if log.exists() and log.stat().st_size > 2**20:
            os.replace(log, log.with_suffix(".old.log"))
        command = [*self.command, "--lane", lane, "--data-dir", str(self.lab.store.data_dir)]
        command += ["--device", self.lab.settings.device, "--launcher", str(os.getpid())]
        with open(log, "ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Asks every worker, also one left by an earlier launch, to stop its job resumably, and waits for them."""
        self._ending.set()
        self._thread.join(30)
        waiting = [lane.process for lane in self.lanes if lane.process is not None]
        for process in waiting:
            if process.poll() is None:
                process.terminate()
        earlier = [job for job in self._running() if job.pid is not None]
        for job in earlier:
            # A job whose worker belongs to an earlier launch; the worker, or its child, saves and ends.
            if job.pid not in [process.pid for process in waiting]:
                queue.request_stop(self.lab.store, job.id, "stopped when the lab closed; it can be resumed")
        end = time.monotonic() + seconds
        while time.monotonic() < end and (any(p.poll() is None for p in waiting) or self._running()):
            time.sleep(0.1)

    def _running(self) -> list[Job]:
        rows = queue.list_jobs(self.lab.store, states=("running", "stopping"))
        return [job for job in rows if queue.process_alive(job)]


class Refill:
    """Keeps pairs to label ready in the current study, in small jobs that give way to whatever else is asked for."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self._job: str | None = None
        self._study: int | None = None  # the failures are those of its base
        self._failures = 0
        self._not_before = 0.0

    def step(self) -> None:
        """Submits a job for a few pairs, if they are needed and nothing speaks against it."""
        store, study = self.lab.store, self.lab.current_study()
        if study.id != self._study:
            self._study, self._failures, self._not_before = study.id, 0, 0.0
        if time.monotonic() < self._not_before:
            return
        active = queue.list_jobs(store, lane="interactive", states=("queued", "running", "stopping"))
        if active:
            for job in active:
                if job.id == self._job and job.study_id != study.id:  # a person has gone on to another study
                    queue.request_stop(store, job.id)
                    self._job = None
            return
        self._settle()
        if time.monotonic() < self._not_before or not study.settings.get("refill", True):
            return
        total, left = pairs_left(store, study.id)
        training = queue.list_jobs(store, lane="training", states=("running", "stopping"), limit=1)
        # one that has made room for the first pairs waits for all of them, not again and again for a few
        trains = bool(training) and not devices.waits(training[0].message)
        if left >= (FEW if trains else ENOUGH):
            self._not_before = time.monotonic() + 2.0
            return
        policies = study.settings.get("policies") or [{"base": study.base, "adapters": []}]
        config = {"count": FIRST_BATCH if total == 0 else BATCH, "policies": policies, "origin": "queue"}
        self._job = jobs.submit(self.lab, "pairs", config, study.id)

    def _settle(self) -> None:
        """Forgets the last job if it went well; after a failure the next one waits longer and longer."""
        if self._job is None:
            return
        job_id, self._job = self._job, None
        try:
            job = queue.get(self.lab.store, job_id)
        except queue.JobError:  # somebody deleted it
            return
        if job.state == "done":
            queue.delete_job(self.lab.store, job.id)
            self._failures = 0
        elif job.study_id == self._study:
            self._failures += 1
            self._not_before = time.monotonic() + min(600.0, 15.0 * 2**self._failures)


_ANSWERED = text("""SELECT COUNT(DISTINCT p.pair_id) FROM preference p JOIN annotator a ON a.id = p.annotator_id
    JOIN study_pair sp ON sp.study_id = p.study_id AND sp.pair_id = p.pair_id
    WHERE p.study_id = :study AND p.choice IS NOT NULL AND a.kind = 'human'
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)
    GROUP BY p.annotator_id ORDER BY 1 DESC LIMIT 1""")


def pairs_left(store, study_id: int) -> tuple[int, int]:
    """(pairs in the study's queue, those that its busiest annotator has not answered yet)."""
    with store.reader() as session:
        total = session.execute(
            text("SELECT COUNT(*) FROM study_pair WHERE study_id = :study"), {"study": study_id}
        ).scalar()
        answered = session.execute(_ANSWERED, {"study": study_id}).scalar() or 0
    return total, total - answered
