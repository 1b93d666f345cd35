"""Which accelerators a job computes on, and what the page says of a job that waits for one. Imports no torch: a worker
that has it loaded writes down what "auto" means on this machine."""

import time

from storage import Storage, checkpoints
from storage.leases import Claim
from storage.models import LANES

DEVICES = "devices"  # the setting that says how many devices one training may use
AUTO = "device auto"  # the setting that says what "auto" means: "cpu" or an accelerator
WAITS = "Waits for the GPU"  # how the line of a running job begins that does not have its turn
ENDS = {"interactive": "no pairs, curves or comparisons are drawn", "training": "the training ends",
        "data": "the score gaps are computed"}  # fmt: skip
MAKES_ROOM = {"training": "the training", "data": "the computation of score gaps"}


def device_count(store: Storage) -> int:
    """How many devices a training may use at once, as a worker has counted them; 1 until it has."""
    return checkpoints.get_setting(store, DEVICES, 1)


def accelerators(store: Storage, device: str, processes: int = 1) -> list[str]:
    """The devices, by their full names, that a job takes turns on with other jobs; none on the CPU, which all share."""
    meant = checkpoints.get_setting(store, AUTO, "cpu") if device == "auto" else device
    if meant == "cpu":
        return []
    if processes > 1:
        return [f"{meant.partition(':')[0]}:{number}" for number in range(processes)]
    return [meant if ":" in meant else f"{meant}:0"]


def waits_words(lane: str, other: Claim) -> str:
    """What a job of this lane says on the page while it waits for `other`."""
    if not other.has or LANES.index(other.lane) <= LANES.index(lane):
        return f"{WAITS} until {ENDS[other.lane]}; goes on by itself then"
    minutes = round((other.until - time.time()) / 60)
    when = f"in about {minutes} min" if minutes > 0 else "as soon as it has saved itself"
    return f"{WAITS}: {MAKES_ROOM[other.lane]} makes room {when}"


def waits(message: str | None) -> bool:
    """Whether a running job's line says that it waits for a device."""
    return (message or "").startswith(WAITS)
