"""A job in hand without its heartbeat thread: what the functions of the workers get in tests; and fake trainings."""

from types import SimpleNamespace

import psutil
from conftest import wait_for

from app.worker_turns import Turns
from storage import Storage
from storage import jobs as queue
from storage.models import Job


class TaskInHand:
    """As app.worker_task.Task. `said` keeps what was told the page; `stop_after` sayings the lab wants to stop."""

    def __init__(self, store: Storage, job: Job | str, models=None, stop_after: int | None = None):
        self.store, self.device, self.said = store, "cpu", []
        self.job = job if isinstance(job, Job) else queue.get(store, job)
        self.folder = store.runs_dir / self.job.id
        self.worker = SimpleNamespace(models=models, turns=Turns(store, self.job.lane), work_waiting=lambda kinds: None)
        self.stop_after = stop_after

    @property
    def stopping(self) -> bool:
        return self.stop_after is not None and len(self.said) > self.stop_after

    def say(self, progress: float | None, message: str | None = None) -> None:
        self.said.append((progress, message))

    def give_way(self, kinds: tuple[str, ...]) -> None:
        """Nobody else is waiting."""

    def beat(self) -> None:
        """Nobody watches."""


ENDLESS = 10**6  # steps: a training that is still under way whenever the test comes to look, however slow the machine


def trains(lab, job_id: str) -> psutil.Process:
    """The process of a fake training that has taken a step and is written down: only then is it the job's pid, which is
    its worker's before."""

    def child() -> int | None:
        job = queue.get(lab.store, job_id)
        stepped = (lab.store.runs_dir / job_id / "metrics.jsonl").exists()
        return job.pid if stepped and job.pid not in (None, int(job.worker.split()[1])) else None

    return psutil.Process(wait_for(child, what="the first step"))


def enough(lab, job_id: str) -> None:
    """Lets a fake training end well after the step in hand."""
    (lab.store.runs_dir / job_id / "enough").touch()
