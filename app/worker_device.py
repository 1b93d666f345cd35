"""Who gets how many cores: training and the interactive lane together never use more threads than there are cores.

How many GPUs there are is counted by a worker that has torch loaded and told to the page through the storage. On them
the lanes take turns (worker_turns.py). Two trainings never run at once, since their lane has one worker.
"""

import os

from app.devices import AUTO, DEVICES
from storage import Storage, checkpoints
from storage import jobs as queue


def cores() -> int:
    """The cores that this process may use (fewer than the machine's inside a container or under taskset)."""
    if os.name == "posix" and "sched_getaffinity" in dir(os):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def training_threads() -> int:
    """A quarter of the cores, at least one, stays free for the interactive lane. One core is shared."""
    total = cores()
    return max(1, total - max(1, total // 4))


def interactive_threads(training: bool) -> int:
    """All cores, or what a running training leaves; one on a machine that others overload, where several threads
    would only wait for each other."""
    if overloaded():
        return 1
    return max(1, cores() - training_threads()) if training else cores()


def overloaded() -> bool:
    """Whether more than twice as many processes want to compute as there are cores."""
    return os.name == "posix" and os.getloadavg()[0] > 2 * cores()


def report_devices(store: Storage, device: str) -> None:
    """Tell the page how many devices a training may use at once (all GPUs, unless `device` names another or one), and
    what "auto" means here."""
    import torch

    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    checkpoints.set_setting(store, DEVICES, max(1, count))
    checkpoints.set_setting(store, AUTO, "cuda:0" if torch.cuda.is_available() else "cpu")


def is_training(store: Storage) -> bool:
    """Whether a training runs in this lab now."""
    return bool(queue.list_jobs(store, lane="training", states=("running", "stopping"), limit=1))
