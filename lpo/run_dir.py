"""The folder of one run, the only thing an app or a person needs to follow it: plain files, written so that a kill at
any moment leaves nothing half-written. Imports no torch.

    config.json   the frozen config        log.txt       what was said, last line `error: ...` after a failure
    metrics.jsonl one JSON object a line   samples/      pictures while training
    checkpoints/  step-000040/ ... final/  state/        what --resume needs   result.json  written last, on success
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lpo.config import ConfigError
from lpo.options import parse_json

STOPPED = 3  # exit code: stopped, resumable
MAIN_FIRST = 0.5  # seconds for which another rank that fails lets the main one speak, which may fail alike


class Run:
    """A run folder being written, from `Run.create` or `Run.resume`; `stop_requested` turns true on SIGTERM.

    A run that does not write is the same one as another rank sees it (lpo/ranks.py): it has a place and can be stopped.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._first_step: int | None = None
        self._said = 0  # what log.txt held of earlier attempts, in characters

    @classmethod
    def create(cls, path: str | Path, config: dict) -> Run:
        """A new run in `path`. Raises ConfigError as `require_new` does."""
        cls.require_new(path)
        run = cls(Path(path))
        for folder in ("samples", "checkpoints", "state"):
            (run.path / folder).mkdir(parents=True, exist_ok=True)
        write_json(run.path / "config.json", config)
        return run

    @staticmethod
    def require_new(path: str | Path) -> None:
        """Raises ConfigError if `path` holds a run already, or cannot be written."""
        require_writable(path, folder=True)
        if (Path(path) / "config.json").exists():
            raise ConfigError(f"{path} already holds a run: pass --resume to continue it, or choose another --run-dir.")

    @classmethod
    def resume(cls, path: str | Path) -> tuple[Run, dict]:
        """Open the run in `path` again and read its config. Raises ConfigError if there is none or it has finished."""
        run = cls(Path(path))
        if not (run.path / "config.json").exists():
            raise ConfigError(f"{path} holds no run to resume (no config.json).")
        if (run.path / "result.json").exists():
            raise ConfigError(f"The run in {path} has already finished; start a new one to train further.")
        for folder in ("samples", "checkpoints", "state"):
            (run.path / folder).mkdir(exist_ok=True)
        log = run.path / "log.txt"
        run._said = len(_said_in(log))
        refused = f"{run.path}/config.json is damaged: it is no JSON object; start a new run."
        return run, parse_json((run.path / "config.json").read_bytes(), dict, refused)

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def state_file(self) -> Path:
        return self.path / "state" / "state.pt"

    def checkpoint(self, step: int | str) -> Path:
        """`checkpoints/step-000040` for a number, `checkpoints/final` for a name."""
        return self.path / "checkpoints" / (f"step-{step:06d}" if isinstance(step, int) else step)

    def log(self, text: str) -> None:
        """One dated line in log.txt and on stdout."""
        if not self.writes:
            return
        stamp = datetime.datetime.now().isoformat(timespec="seconds")
        print(text, flush=True)
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    def fail(self, sentence: str) -> bool:
        """The one sentence that says why the run failed, as the last line of log.txt. Returns False, and writes
        nothing, if another rank has said why already."""
        if not self.writes:
            time.sleep(MAIN_FIRST)
        log = self.path / "log.txt"
        said = _said_in(log)[self._said :].splitlines()
        if said and said[-1].startswith("error: "):
            return False
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"error: {sentence}\n")
        if not self.writes:  # the command line speaks for the main rank only
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        return True

    def record(self, metrics: dict) -> dict:
        """Append `metrics` (with step and total), plus seconds and left_s, to metrics.jsonl. Returns that line."""
        now = time.monotonic() - self._started
        if self._first_step is None:
            self._first_step = metrics["step"] - 1
        done = max(metrics["step"] - self._first_step, 1)
        left = now / done * (metrics["total"] - metrics["step"])
        row = {**metrics, "seconds": round(self._seconds_before + now, 2), "left_s": round(left, 1)}
        if self.writes:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        return row

    def rewind(self, step: int) -> None:
        """Drop metrics past `step`: the resumed run writes them again, identically."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        rows = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step:
                    rows.append(row)
            except (ValueError, TypeError, KeyError):  # cut short by a kill, or damaged; everything after it is newer
                break
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
        self._seconds_before = rows[-1]["seconds"] if rows else 0.0

    def finish(self, result: dict) -> None:
        """Write result.json: the run succeeded."""
        if not self.writes:
            return
        write_json(self.path / "result.json", {"format_version": 1, **result})

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def request_stop(self) -> None:
        self._stop.set()

    @contextlib.contextmanager
    def catching_signals(self, patience: float = 0.0) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT ask for a stop; a second one ends the process at once, but not within `patience`
        seconds: a launcher of several processes passes on what the terminal has already sent to all of them."""
        asked: list[float] = []

        def handler(signum: int, frame: object) -> None:
            if asked and time.monotonic() - asked[0] >= patience:
                os._exit(128 + signum)
            asked.append(time.monotonic())
            self.request_stop()

        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def unusable(error: OSError) -> str | None:
    """One sentence on a path that cannot be read or written; None if the error is not about a path."""
    if error.filename is None:
        return None
    return f"{error.filename} cannot be used ({error.strerror}): choose another path."


def require_writable(path: str | Path, folder: bool = False) -> None:
    """Raises ConfigError unless a file, or the files of a folder, can be written at `path`: asked by trying, before the
    work whose result goes there. What is there stays as it is; of what is not, only the folders above are made."""
    path = Path(path)
    probe = path / ".probe" if folder else path
    try:
        there = os.path.lexists(path)  # a link to a new file stays, too
        if not probe.parent.exists():
            probe.parent.mkdir(parents=True, exist_ok=True)
        with open(probe, "ab"):
            pass
    except OSError as error:
        raise ConfigError(unusable(OSError(error.errno, error.strerror, str(path)))) from error
    if folder or not there:
        probe.unlink()
    if folder and not there:
        path.rmdir()


def _said_in(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, data: dict | list) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")
