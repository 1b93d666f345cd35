"""A worker process: claims the jobs of one lane, one after the other, runs them and records what came out.

    python -m app.worker --lane training --data-dir DIR        (the supervisor does this)

It ends by itself after the job in hand once the launch that started it is gone, and on SIGTERM it lets that job save
itself and stop. Together with app/worker_*.py this is the one place where storage and lpo meet.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import filelock

import storage
from app import worker_device
from app.worker_task import Stopped, Task, Vanished, explain
from app.worker_turns import LINGER, Turns
from storage import jobs as queue
from storage.jobs import JobLost
from storage.models import LANES, Job

IDLE_SECONDS = 0.2
ATTEMPTS = 3  # a job whose worker dies under it is tried this often
NICE = 5  # the page, which must answer at once, comes before what is computed


class Worker:
    """One lane's loop. `name` is unique to this process; `launcher` is the pid of the launch that started it."""

    def __init__(self, store: storage.Storage, lane: str, device: str = "auto", launcher: int | None = None):
        self.store = store
        self.lane = lane
        self.device = device
        self.launcher = launcher
        self.name = f"{lane} {os.getpid()} {int(time.time())}"
        self.ending = False
        self.models = None  # what the interactive lane keeps loaded, see worker_models.py
        self.turns = Turns(store, lane)
        (store.data_dir / "workers").mkdir(exist_ok=True)

    @property
    def over(self) -> bool:
        """Whether to claim nothing more: the lab closes, or the launch that started this worker is gone."""
        return self.ending or (self.launcher is not None and os.getppid() != self.launcher)

    def run(self) -> None:
        """Works until the lab closes or is gone."""
        lock = filelock.FileLock(self.store.data_dir / "workers" / f"{self.lane}.lock")
        if not self._acquire(lock):
            return
        if self.lane == "interactive":
            from app.worker_models import Models

            self.models = Models()  # imports torch now, before the first request needs it
            worker_device.report_devices(self.store, self.device)
        self._adopt()
        busy = time.monotonic()
        while not self.over:
            job = queue.claim(self.store, self.lane, self.name, os.getpid())
            if job is not None:
                self.work(job)
                busy = time.monotonic()
                continue
            if time.monotonic() - busy > LINGER and self.turns.waited_for():
                self.models.unload()
                self.turns.leave()
            time.sleep(IDLE_SECONDS)
        lock.release()

    def _acquire(self, lock: filelock.FileLock) -> bool:
        """Only one worker per lane and data folder works: waits for one that outlived its launch to end its job."""
        while not self.over:
            try:
                lock.acquire(timeout=0)
                return True
            except filelock.Timeout:
                time.sleep(IDLE_SECONDS)
        return False

    def _adopt(self) -> None:
        """Takes over what the lane's last worker left running. The lane's lock is ours, so that worker is dead."""
        for job in queue.orphans(self.store, self.lane, stale=-1.0):
            if queue.adopt(self.store, job.id, self.name, stale=-1.0) is None:
                continue
            if self.lane == "training":
                self.work(job)  # finds the child, which may live
            else:
                self.retry(job, "The worker ended in the middle of this job, perhaps because memory ran out.")

    def work(self, job: Job) -> None:
        """Runs one job and records its end, whatever it is."""
        if self.models is not None:
            self.models.breathe(self.store)
        with Task(self, job) as task:
            try:
                end, value = queue.finish, run(task)
            except Stopped:
                why = "stopped when the lab closed" if self.ending else "stopped"
                end, value = queue.stopped, f"{why}; it can be resumed"
            except Vanished as error:
                end, value = None, str(error)
            except Exception as error:  # noqa: BLE001  the boundary: a job's fault becomes a sentence, the worker lives
                end, value = queue.fail, explain(task, error)
        if self.models is None:  # a warm lane keeps the device with its models
            self.turns.leave()
        try:
            if end is None:
                self.retry(job, value)
                return
            end(self.store, job.id, self.name, value)
        except JobLost:
            print(f"{job.kind} {job.id} was taken over or deleted meanwhile", flush=True)
        self._attempts(job).unlink(missing_ok=True)

    def work_waiting(self, kinds: tuple[str, ...]) -> None:
        """Runs the queued jobs of these kinds, in the middle of another one."""
        while not self.over and (job := queue.claim(self.store, self.lane, self.name, os.getpid(), kinds)) is not None:
            self.work(job)

    def retry(self, job: Job, why: str) -> None:
        """Queues an own job again to be resumed, or gives up if it has brought a worker down too often."""
        attempts = self._attempts(job)
        count = int(attempts.read_text()) + 1 if attempts.exists() else 1
        if count < ATTEMPTS:
            attempts.write_text(str(count))
            queue.release(self.store, job.id, self.name)
        else:
            attempts.unlink(missing_ok=True)
            queue.fail(self.store, job.id, self.name, f"{why} It was tried {count} times; its log says more.")

    def _attempts(self, job: Job) -> Path:
        return self.store.data_dir / "workers" / f"attempts-{job.id}"


def run(task: Task) -> dict | None:
    """Does the work of any kind of job; what it returns is the job's result. Raises Stopped, Vanished or ValueError."""
    if task.worker.models is not None:
        task.worker.turns.enter(task)
    match task.job.kind:
        case "train-lrm" | "train-lpo":
            from app import worker_training

            return worker_training.run(task)
        case "pairs":
            from app import worker_pairs

            return worker_pairs.run(task)
        case "trace":
            from app import worker_trace

            return worker_trace.run(task)
        case "compare":
            from app import worker_compare

            return worker_compare.run(task)
        case "import" | "export":
            from app import worker_data

            return worker_data.run(task)
        case "export-model" | "import-model":
            from app import worker_export

            return worker_export.run(task)
        case "gaps":
            from app import worker_gaps

            return worker_gaps.run(task)
        case kind:
            raise ValueError(f"This version cannot do jobs of the kind {kind!r}; update Preference Lab.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.worker", description=__doc__)
    parser.add_argument("--lane", choices=LANES, required=True, help="the jobs to do")
    parser.add_argument("--data-dir", type=Path, required=True, help="the lab's data folder")
    parser.add_argument("--device", default="auto", help="what jobs that say auto compute on")
    parser.add_argument("--launcher", type=int, help="end with this parent process")
    arguments = parser.parse_args(argv)
    if os.name == "posix":
        os.nice(NICE)
    store = storage.open(arguments.data_dir)
    worker = Worker(store, arguments.lane, arguments.device, arguments.launcher)

    def end(signum: int, frame: object) -> None:
        worker.ending = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    worker.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
