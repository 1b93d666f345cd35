"""Whose turn it is on an accelerator: one process at a time may have models on a device, or it would run out of memory.

Each lane has one claim, a row of the settings: its process has devices, or waits for them. A claim counts only while
exactly that process lives (pid and start time), so it ends with the process however that ends. A lane that waits goes
before the lanes behind it in LANES: a person sits before the interactive one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from sqlmodel import Session

from .db import Storage
from .jobs import is_process, process_start
from .models import LANES, Setting


@dataclass(frozen=True)
class Claim:
    """A lane's claim on `devices`, by their full names. If it `has` them, it makes room for a lane that goes before it
    from `until` on (seconds since 1970)."""

    lane: str
    devices: list[str]
    pid: int
    started: float
    has: bool = False
    until: float = 0.0

    @property
    def alive(self) -> bool:
        return is_process(self.pid, self.started)


def claim(lane: str, devices: list[str], pid: int) -> Claim:
    """The claim of a process that lives."""
    return Claim(lane, devices, pid, process_start(pid) or 0.0)


def take(store: Storage, mine: Claim, until: float = 0.0) -> Claim | None:
    """Takes all of the devices, or none: then the lane waits, and the claim that is in the way is returned. Call again
    to try again."""
    with store.reader() as session:  # who only waits on takes no write lock
        other = _in_the_way(session, mine)
        if other is not None and _read(session, mine.lane) == mine:
            return other
    with store.session() as session:
        other = _in_the_way(session, mine)
        _write(session, mine if other is not None else replace(mine, has=True, until=until))
    return other


def hold(store: Storage, mine: Claim, until: float = 0.0) -> None:
    """Writes down that the claim's process has the devices: it has taken over from another process of the lane."""
    with store.session() as session:
        _write(session, replace(mine, has=True, until=until))


def release(store: Storage, lane: str, pid: int) -> None:
    """The process `pid` neither has devices nor waits for them any more. A claim that another living process of the
    lane has stays."""
    with store.session() as session:
        had = _read(session, lane)
        if had is not None and (had.pid == pid or not had.alive):
            session.delete(session.get(Setting, _key(lane)))


def waiting(store: Storage, lane: str) -> list[str]:
    """The lanes that wait for a device that `lane` has."""
    with store.reader() as session:
        own = _read(session, lane)
        return [] if own is None else [other.lane for other in _others(session, own) if not other.has]


def _in_the_way(session: Session, mine: Claim) -> Claim | None:
    """The first claim that has one of the devices, or waits for one and goes before."""
    before = LANES[: LANES.index(mine.lane)]
    return next((other for other in _others(session, mine) if other.has or other.lane in before), None)


def _others(session: Session, mine: Claim) -> Iterator[Claim]:
    """The living claims of other processes on the same devices."""
    for lane in LANES:
        other = _read(session, lane)
        if other is None or (other.lane, other.pid) == (mine.lane, mine.pid):
            continue
        if set(other.devices) & set(mine.devices) and other.alive:
            yield other


def _read(session: Session, lane: str) -> Claim | None:
    row = session.get(Setting, _key(lane))
    return None if row is None else Claim(**row.value)


def _write(session: Session, claim: Claim) -> None:
    session.merge(Setting(key=_key(claim.lane), value=asdict(claim)))


def _key(lane: str) -> str:
    return f"devices of {lane}"
