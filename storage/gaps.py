"""Score gaps of imported labels: read from a CSV that is joined to an import by row, or given by local scorers.

    for state in gaps.add_csv(store, import_id, "scores.csv"): print(state["done"])
    columns = gaps.load(store, state["gap_set_id"])

The CSV has the official columns different_flag, aesthetic_gap, clipscore_gap and vqascore_gap, and may have
pickscore_gap (others are ignored, an empty cell is a gap that nobody computed; `python -m lpo gaps` writes such a
file). Row n belongs to row n of the import, whatever became of that row.
"""

import csv
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from sqlalchemy import delete, text
from sqlmodel import Session, select

from .data_models import GAP_COLUMNS, Gap, GapSet, Import
from .db import Storage, StorageError
from .studies import study_row

CSV_COLUMNS = {"aesthetic": "aesthetic_gap", "clip": "clipscore_gap", "vqa": "vqascore_gap"}
PICK = "pickscore_gap"
CHUNK = 2000
MAX_LINE = 100_000

_INSERT = text("""INSERT OR IGNORE INTO gap (gap_set_id, preference_id, tie, aesthetic, clip, vqa, pick)
    VALUES (:gap_set, :label, :tie, :aesthetic, :clip, :vqa, :pick)""")

_LABELS = text("""SELECT r."row", r.preference_id AS label, p.choice FROM import_row r
    JOIN preference p ON p.id = r.preference_id
    WHERE r.import_id = :import AND r."row" > :low AND r."row" <= :high AND p.choice IN ('first', 'second', 'tie')""")

# labels that can train, with the split of their prompt: what a filter is shown and applied to
_LOAD = text("""SELECT g.preference_id, g.tie, sp.split = 'train' AS train, g.aesthetic, g.clip, g.vqa, g.pick
    FROM gap g JOIN preference p ON p.id = g.preference_id JOIN pair ON pair.id = p.pair_id
    JOIN study_prompt sp ON sp.study_id = p.study_id AND sp.prompt_id = pair.prompt_id
    WHERE g.gap_set_id = :gap_set AND p.choice IN ('first', 'second', 'tie')
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id) ORDER BY g.preference_id""")

# decided labels of imported pairs, in order, each with what a scorer needs
_IMPORTED = """FROM preference p JOIN pair ON pair.id = p.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id
    WHERE p.study_id = :study AND pair.origin = 'import' AND p.choice IN ('first', 'second', 'tie') AND p.id > :after
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)"""
_TO_SCORE = text(f"""SELECT p.id AS label, p.choice, prompt.text AS prompt, a.hash AS first, b.hash AS second
    {_IMPORTED} ORDER BY p.id LIMIT :limit""")


@dataclass(frozen=True)
class Gaps:
    """The gaps of N labels: `labels` (N,) ids, `ties` and `train` (N,) bool, `scores` {score: (N,) float, nan where
    nobody computed it}."""

    labels: np.ndarray
    ties: np.ndarray
    train: np.ndarray
    scores: dict[str, np.ndarray]


def list_imports(store: Storage, study_id: int) -> list[Import]:
    """The study's finished imports, newest first."""
    query = select(Import).where(Import.study_id == study_id, Import.finished_at.is_not(None))
    with store.reader() as session:
        return list(session.exec(query.order_by(Import.id.desc())))


def list_sets(store: Storage, study_id: int) -> list[GapSet]:
    """The study's usable gap sets, newest first."""
    query = select(GapSet).where(GapSet.study_id == study_id, GapSet.finished_at.is_not(None))
    with store.reader() as session:
        return list(session.exec(query.order_by(GapSet.id.desc())))


def finished_set(store: Storage, gap_set_id: int) -> GapSet:
    """The gap set; raises StorageError if it is not there or not complete."""
    with store.reader() as session:
        row = session.get(GapSet, gap_set_id)
    if row is None or row.finished_at is None:
        raise StorageError("These score gaps are not there any more or not complete; choose others from the list.")
    return row


def add_csv(store: Storage, import_id: int, path: str | Path, name: str | None = None) -> Iterator[dict]:
    """Join a CSV of gaps to a finished import by row position.

    Yields {gap_set_id, done (CSV rows), total, labels (that got gaps), disagree (rows whose different_flag contradicts
    the label: many mean another file or order), finished}. Raises StorageError, before anything is stored, if a column
    is missing, a cell is no number, or the row counts differ.
    """
    path = Path(path)
    with store.reader() as session:
        source = session.get(Import, import_id)
    if source is None or source.finished_at is None:
        raise StorageError("Choose an import that is finished; the CSV is joined to its rows.")
    expected = source.state["done"]
    found, computed = 0, set()
    for row in read_csv(path):
        found += 1
        computed |= {column for column in GAP_COLUMNS if row[column] is not None}
    if found != expected:
        raise StorageError(
            f"{path.name} has {found:,} rows and the import of {source.name} has {expected:,}, so they cannot be "
            "joined by row; choose the CSV of exactly this file, or import the whole split."
        )
    config = {"csv": path.name, "columns": [column for column in GAP_COLUMNS if column in computed]}
    gap_set = new_set(store, source.study_id, name or path.name, config, import_id)
    state = {"gap_set_id": gap_set, "done": 0, "total": found, "labels": 0, "disagree": 0, "finished": False}
    for chunk in _chunks(read_csv(path)):
        with store.session() as session:
            window = {"import": import_id, "low": state["done"], "high": state["done"] + len(chunk)}
            rows = []
            for row in session.execute(_LABELS, window).mappings():
                values = chunk[row["row"] - state["done"] - 1]
                state["disagree"] += values["tie"] != (row["choice"] == "tie")
                rows.append({"label": row["label"], **values})
            state["labels"] += add_gaps(session, gap_set, rows)
        state["done"] += len(chunk)
        yield dict(state)
    finish_set(store, gap_set, {"labels": state["labels"], "disagree": state["disagree"]})
    yield {**state, "finished": True}


def read_csv(path: Path) -> Iterator[dict]:
    """{tie, aesthetic, clip, vqa, pick} of every row; raises StorageError with the row's number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(_lines(path, file))
            for column in ("different_flag", *CSV_COLUMNS.values()):
                if column not in (reader.fieldnames or []):
                    wanted = ", ".join(("different_flag", *CSV_COLUMNS.values()))
                    raise StorageError(f"{path.name} has no column {column}; a CSV of gaps has {wanted}.")
            for number, row in enumerate(reader, 1):
                flag = _number(path, number, row, "different_flag")
                if flag not in (0.0, 1.0):
                    raise StorageError(
                        f"{path.name}, row {number}: different_flag must be 1 (one is chosen) or 0 (a tie)."
                    )
                pick = _number(path, number, row, PICK) if row.get(PICK) else None
                scores = {key: _number(path, number, row, name) for key, name in CSV_COLUMNS.items()}
                yield {"tie": flag == 0.0, **scores, "pick": pick}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StorageError(f"{path.name} cannot be read as a CSV file ({error}); save it again as UTF-8.") from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines, none of them longer than memory should hold."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise StorageError(f"{path.name} has a line of more than {MAX_LINE // 1000} kB; it is no CSV of gaps.")
        yield line


def _number(path: Path, number: int, row: dict, column: str) -> float | None:
    try:
        value = float(row[column] or "nan")
    except ValueError as error:
        raise StorageError(
            f"{path.name}, row {number}: {column} is {str(row[column])[:40]!r}; it must be a number or empty."
        ) from error
    return value if math.isfinite(value) else None


def _chunks(rows: Iterable[dict]) -> Iterator[list[dict]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def new_set(store: Storage, study_id: int, name: str, config: dict, import_id: int | None = None) -> int:
    """The id of a new, unfinished gap set; an unfinished one of the same name (of a killed job) is thrown away."""
    with store.session() as session:
        study_row(session, study_id)
        session.execute(
            delete(GapSet).where(GapSet.study_id == study_id, GapSet.name == name, GapSet.finished_at.is_(None))
        )
        row = GapSet(study_id=study_id, import_id=import_id, name=name, config=config)
        session.add(row)
        session.flush()
        return row.id


def add_gaps(session: Session, gap_set_id: int, rows: list[dict]) -> int:
    """Store {label, tie, aesthetic, clip, vqa, pick (a missing score may be left out)}; returns how many were new."""
    if not rows:
        return 0
    empty = dict.fromkeys(GAP_COLUMNS)
    return session.connection().execute(_INSERT, [{"gap_set": gap_set_id, **empty, **row} for row in rows]).rowcount


def finish_set(store: Storage, gap_set_id: int, report: dict) -> None:
    """Make the set usable; `report` goes into its config."""
    with store.session() as session:
        row = session.get(GapSet, gap_set_id)
        row.config = {**row.config, **report}
        row.finished_at = time.time()


def unfinished(store: Storage, study_id: int, name: str) -> tuple[int, int] | None:
    """(id, last label) of a set that a killed or stopped job of local scorers left: what it goes on from."""
    query = select(GapSet).where(GapSet.study_id == study_id, GapSet.name == name, GapSet.finished_at.is_(None))
    with store.reader() as session:
        row = session.exec(query).first()
        if row is None:
            return None
        last = select(Gap.preference_id).where(Gap.gap_set_id == row.id).order_by(Gap.preference_id.desc())
        return row.id, session.exec(last).first() or 0


def to_score(store: Storage, study_id: int, after: int, limit: int) -> list[dict]:
    """The next labels of imported pairs behind label `after`: {label, choice, prompt, first, second (paths)}."""
    with store.reader() as session:
        found = session.execute(_TO_SCORE, {"study": study_id, "after": after, "limit": limit}).mappings().all()
    return [{**row, **{side: store.media.path(row[side]) for side in ("first", "second")}} for row in found]


def count_to_score(store: Storage, study_id: int, after: int) -> int:
    """How many labels to_score would still give."""
    query = text(f"SELECT COUNT(*) {_IMPORTED}")
    with store.reader() as session:
        return session.execute(query, {"study": study_id, "after": after}).scalar()


def load(store: Storage, gap_set_id: int) -> Gaps:
    """The gaps of all labels of the set that stand and can train, as columns: about 50 bytes a label."""
    parts: list[np.ndarray] = []
    with store.reader() as session:
        found = session.execute(_LOAD, {"gap_set": gap_set_id})
        while rows := found.fetchmany(20_000):
            parts.append(np.array([tuple(row) for row in rows], np.float64))  # None becomes nan
    table = np.concatenate(parts) if parts else np.empty((0, 3 + len(GAP_COLUMNS)))
    scores = {column: table[:, 3 + place] for place, column in enumerate(GAP_COLUMNS)}
    return Gaps(table[:, 0].astype(np.int64), table[:, 1].astype(bool), table[:, 2].astype(bool), scores)
