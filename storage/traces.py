"""Stored trajectories with a disk budget. Traces can be sampled again, so the least recently used ones give way;
pictures and labels never do."""

import shutil
import time
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import delete
from sqlmodel import select

from .db import Storage, StorageError
from .models import Trace, TraceScore

DEFAULT_BUDGET = 2 * 2**30


def add_trace(
    store: Storage,
    *,
    key: str,
    path: Path,
    prompt: str,
    seed: int,
    policy: dict,
    config: dict,
    study_id: int | None = None,
    job_id: str | None = None,
) -> Trace:
    """Record a trace file or folder that lies under `store.traces_dir`. The same `key` again replaces what it names."""
    inside = Path(path).resolve()
    if not inside.is_relative_to(store.traces_dir.resolve()) or inside == store.traces_dir.resolve():
        raise StorageError(f"A trace lies under {store.traces_dir}, {path} does not.")
    where = str(inside.relative_to(store.traces_dir.resolve()))
    with store.session() as session:
        row = session.exec(select(Trace).where(Trace.key == key)).first()
        old = row.path if row is not None else where
        if row is None:
            row = Trace(key=key, path=where, bytes=0, prompt=prompt, seed=seed)
        else:
            session.execute(delete(TraceScore).where(TraceScore.trace_id == row.id))
        row.path, row.bytes, row.prompt, row.seed = where, size_of(inside), prompt, seed
        row.policy, row.config, row.study_id, row.job_id = policy, config, study_id, job_id
        row.used_at = time.time()
        session.add(row)
    if old != where:
        _remove(store.traces_dir / old)
    return row


def find_trace(store: Storage, key: str) -> Trace | None:
    """The trace of this key, marked as used now; None if it was never sampled, evicted, or its file is gone."""
    with store.session() as session:
        row = session.exec(select(Trace).where(Trace.key == key)).first()
        if row is None:
            return None
        if not trace_path(store, row).exists():
            session.delete(row)
            return None
        row.used_at = time.time()
    return row


def trace_path(store: Storage, trace: Trace) -> Path:
    return store.traces_dir / trace.path


def save_scores(store: Storage, trace_id: int, lrm: str, scores: list[float]) -> TraceScore:
    """What this LRM says along the trace, one number per step; a second time replaces the first."""
    with store.session() as session:
        if session.get(Trace, trace_id) is None:
            raise StorageError("This trace was evicted from the disk budget; sample it again.")
        row = session.exec(select(TraceScore).where(TraceScore.trace_id == trace_id, TraceScore.lrm == lrm)).first()
        row = row or TraceScore(trace_id=trace_id, lrm=lrm)
        row.scores, row.created_at = list(scores), time.time()
        session.add(row)
    return row


def scores_of(store: Storage, trace_id: int) -> dict[str, list[float]]:
    """{lrm: scores per step} of one trace."""
    with store.reader() as session:
        rows = session.exec(select(TraceScore).where(TraceScore.trace_id == trace_id))
        return {row.lrm: row.scores for row in rows}


def evict(store: Storage, budget: int = DEFAULT_BUDGET, keep: Collection[int] = ()) -> list[Trace]:
    """Delete the least recently used traces, files and rows, until the rest fits in `budget` bytes; those whose id is
    in `keep` (being shown or written) stay. Returns what was deleted. Rows go first: a crash leaves a file that the
    next call sweeps up, never a row without its file."""
    with store.session() as session:
        rows = list(session.exec(select(Trace).order_by(Trace.used_at, Trace.id)))
        used = sum(row.bytes for row in rows)
        gone = []
        for row in rows:
            if used <= budget:
                break
            if row.id not in keep:
                session.delete(row)
                used -= row.bytes
                gone.append(row)
    for row in gone:
        _remove(trace_path(store, row))
    return gone


def sweep(store: Storage, older_than: float = 3600.0) -> int:
    """Remove files under traces_dir that no row names and that nobody touched for `older_than` seconds."""
    with store.reader() as session:
        known = {Path(path).parts[0] for path in session.exec(select(Trace.path))}
    removed = 0
    for path in store.traces_dir.iterdir():
        if path.name not in known and time.time() - path.stat().st_mtime > older_than:
            _remove(path)
            removed += 1
    return removed


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
