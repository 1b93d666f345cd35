"""A job in hand without its heartbeat thread: what the functions of the workers get in tests."""

from types import SimpleNamespace

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
