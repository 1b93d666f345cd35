"""A job in hand, as the functions that do the work see it: what to do, where, whether to stop, what to say.

Apart from worker.py, because that file runs as `__main__` and would be imported a second time under its own name.
"""

import errno
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from storage import Unwritable
from storage import jobs as queue
from storage.jobs import JobLost
from storage.models import Job

if TYPE_CHECKING:
    from app.worker import Worker

BEAT_SECONDS = 2.0


class Stopped(Exception):
    """Raised by a job's function when it has saved itself because `task.stopping` became true."""


class Vanished(Exception):
    """Raised by a job's function when the process that did the work is gone, nobody knows why; it may be resumed."""


class TrainingError(ValueError):
    """Why a training cannot start or ended without success, in one sentence."""


class Task:
    """A job in hand. A thread says every two seconds that the worker lives, and learns whether to stop."""

    def __init__(self, worker: "Worker", job: Job):
        self.worker = worker
        self.store = worker.store
        self.job = job
        self.device = worker.device
        self.lost = False
        self._state = job.state
        self._saying: tuple[float | None, str | None] = (None, None)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def folder(self) -> Path:
        """The job's run folder, which may not exist yet."""
        return self.store.runs_dir / self.job.id

    @property
    def stopping(self) -> bool:
        """Whether to save and stop: asked for on the page, superseded, or the lab closes."""
        return self._state == "stopping" or self.lost or self.worker.ending

    def say(self, progress: float | None, message: str | None = None) -> None:
        """Progress in [0, 1] and a line for the page, written with the next heartbeat."""
        self._saying = (progress, message)

    def give_way(self, kinds: tuple[str, ...]) -> None:
        """Does waiting jobs of these kinds first: a person sits before them. The models' adapters may change."""
        self.worker.work_waiting(kinds)
        self.worker.turns.enter(self)  # one of them may have changed to another device

    def beat(self) -> None:
        """One heartbeat now."""
        try:
            self._state = queue.heartbeat(self.store, self.job.id, self.worker.name, *self._saying)
        except JobLost:
            self.lost = True
        except (SQLAlchemyError, Unwritable) as error:  # a full disk, a long lock: the next beat may do
            print(f"no heartbeat: {error}", flush=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.beat()

    def __enter__(self) -> "Task":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        self._thread.join()


def explain(task: Task, error: Exception) -> str:
    """The sentence for the page. What nobody foresaw goes to the job's log with its traceback."""
    if isinstance(error, ValueError):  # ConfigError, StorageError and their like are sentences
        return str(error)
    print(f"{task.job.kind} {task.job.id}", flush=True)
    traceback.print_exception(error)
    task.folder.mkdir(parents=True, exist_ok=True)
    with open(task.folder / "log.txt", "a") as log:
        traceback.print_exception(error, file=log)
    if type(error).__name__ == "OutOfMemoryError":
        return "The device ran out of memory; make fewer or smaller pictures at once, or stop what else uses it."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk with {task.store.data_dir} is full; make room on it and try again."
    if isinstance(error, OSError) and error.filename:
        return f"Cannot use {error.filename}: {error.strerror}."
    return f"The job failed unexpectedly ({type(error).__name__}: {str(error)[:200]}); its log has the details."
