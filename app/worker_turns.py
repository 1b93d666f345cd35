"""Turns on an accelerator: two jobs that load models on one GPU at once would run it out of memory.

What a person sits before (pairs, traces, comparisons) goes first: a training or a computation of score gaps saves
itself, makes room, and goes on by itself once the interactive lane has been idle for half a minute. It then keeps the
device for five minutes, so that it gets somewhere. The interactive lane keeps its models loaded until another job
waits. On the CPU nobody waits for anybody.
"""

import gc
import os
import sys
import time

from app.devices import accelerators, device_count, waits_words
from app.worker_task import Stopped, Task
from storage import Storage, leases
from storage.models import LANES

POLL_SECONDS = 0.3
LINGER = 30.0  # seconds for which the idle interactive lane keeps the device: the next request is often soon there
TURN = 300.0  # seconds for which a job that made room keeps the device when it has it again
NEED_NO_DEVICE = ("import", "export", "import-model", "export-model")  # need not wait behind a job that does


class Turns:
    """The accelerators that a lane's worker has at the moment; none on the CPU."""

    def __init__(self, store: Storage, lane: str):
        self.store, self.lane = store, lane
        self.devices: list[str] = []
        self._until = 0.0

    def enter(self, task: Task, again: bool = False) -> None:
        """Waits until the job's devices are the lane's, saying so on the page. `again`: it made room before. Raises
        Stopped."""
        devices, told = devices_of(task), None
        if devices == self.devices:
            return
        if self.devices:  # the warm lane changes to another device
            task.worker.models.unload()
            self.leave()
        if not devices:
            return
        mine = leases.claim(self.lane, devices, os.getpid())
        try:
            while (other := self._take(mine, again)) is not None:
                if task.stopping:
                    raise Stopped
                if (words := waits_words(self.lane, other)) != told:
                    told = words
                    task.say(None, words)
                    task.beat()
                task.worker.work_waiting(NEED_NO_DEVICE)
                time.sleep(POLL_SECONDS)
            self.devices = devices
        finally:
            if not self.devices:  # nobody must make room for one that waits no more
                leases.release(self.store, self.lane, os.getpid())
        task.say(None, "Starting")

    def _take(self, mine: leases.Claim, again: bool) -> leases.Claim | None:
        self._until = time.time() + TURN if again else 0.0
        return leases.take(self.store, mine, self._until)

    def hand_over(self, task: Task, pid: int) -> None:
        """The process that does the work has the job's devices from now on, also without its worker."""
        self.devices = devices_of(task)
        if self.devices:
            leases.hold(self.store, leases.claim(self.lane, self.devices, pid), self._until)

    def wanted(self) -> bool:
        """Whether the job in hand is to make room now."""
        if not self.devices or time.time() < self._until:
            return False
        before = LANES[: LANES.index(self.lane)]
        return any(lane in before for lane in leases.waiting(self.store, self.lane))

    def waited_for(self) -> bool:
        """Whether any other lane waits for what this one has."""
        return bool(self.devices) and bool(leases.waiting(self.store, self.lane))

    def leave(self) -> None:
        """The devices are the next one's. Nobody must hold models on them any more."""
        if self.devices:
            free_memory()
            leases.release(self.store, self.lane, os.getpid())
            self.devices = []


def devices_of(task: Task) -> list[str]:
    """The accelerators that the job will load models on; none on the CPU."""
    config = task.job.config
    device = config.get("trace", config).get("device", "auto")
    processes = min(config.get("processes", 1), device_count(task.store))
    return accelerators(task.store, task.device if device == "auto" else device, processes)


def free_memory() -> None:
    """Gives back to the device what models that nobody holds any more took on it."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
