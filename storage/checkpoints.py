"""Checkpoints that can be chosen by name, and the lab's few settings."""

from pathlib import Path
from typing import Any

from sqlmodel import select

from .db import Storage, StorageError, only
from .models import CHECKPOINT_KINDS, Checkpoint, Setting


def add_checkpoint(
    store: Storage,
    *,
    kind: str,
    name: str,
    path: str | Path,
    parent_id: int | None = None,
    study_id: int | None = None,
    job_id: str | None = None,
    step: int | None = None,
    meta: dict | None = None,
) -> Checkpoint:
    """Record a folder as a base, an adapter or an LRM; the same path again updates its row."""
    if kind not in CHECKPOINT_KINDS:
        raise StorageError(f"{kind!r} is no kind of checkpoint; allowed are {', '.join(CHECKPOINT_KINDS)}.")
    with store.session() as session:
        row = session.exec(select(Checkpoint).where(Checkpoint.path == str(path))).first()
        row = row or Checkpoint(kind=kind, name=name, path=str(path))
        row.kind, row.name, row.parent_id, row.study_id = kind, name, parent_id, study_id
        row.job_id, row.step, row.meta = job_id, step, meta or {}
        session.add(row)
    return row


def get_checkpoint(store: Storage, checkpoint_id: int) -> Checkpoint:
    with store.reader() as session:
        row = session.get(Checkpoint, checkpoint_id)
    if row is None:
        raise StorageError(f"There is no checkpoint {checkpoint_id} any more; choose another one.")
    return row


def list_checkpoints(
    store: Storage,
    kind: str | None = None,
    study_id: int | None = None,
    job_id: str | None = None,
    include_hidden: bool = False,
) -> list[Checkpoint]:
    """Newest first."""
    query = select(Checkpoint).order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc())
    query = only(query, (Checkpoint.kind, kind), (Checkpoint.study_id, study_id), (Checkpoint.job_id, job_id))
    if not include_hidden:
        query = query.where(Checkpoint.hidden.is_(False))
    with store.reader() as session:
        return list(session.exec(query))


def hide_checkpoint(store: Storage, checkpoint_id: int, hidden: bool = True) -> Checkpoint:
    """Take it off the lists (or back on); its files stay."""
    with store.session() as session:
        row = session.get(Checkpoint, checkpoint_id)
        if row is None:
            raise StorageError(f"There is no checkpoint {checkpoint_id} any more; choose another one.")
        row.hidden = hidden
    return row


def get_setting(store: Storage, key: str, default: Any = None) -> Any:
    """A JSON value that was set before, else `default`."""
    with store.reader() as session:
        row = session.get(Setting, key)
    return default if row is None else row.value


def set_setting(store: Storage, key: str, value: Any) -> None:
    with store.session() as session:
        session.merge(Setting(key=key, value=value))
