"""Importing: from any source of items into the database, never doubling anything, going on where it was killed.

A batch of rows and the report that counts them are one transaction. So after `kill -9` the report says exactly what is
stored, and the same import goes on with the next row. Memory holds one batch. The same file given twice at a time is
imported by the first; the second waits, takes over if the first one stops, and otherwise finds everything there.
"""

import hashlib
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import filelock
from sqlmodel import select

from .. import numbers
from ..data_models import Import, ImportRow
from ..db import Storage, StorageError, Unwritable
from ..media import check_picture
from ..models import Picture, Study
from ..studies import create_study, list_studies, study_row
from . import comparisons, hpd_in, jsonl_in, parquet_in
from .files import Files
from .items import ExchangeError, Item, Rejected
from .put import put, refuse
from .tally import Tally

ROWS = 10  # of one transaction
BYTES = 32 * 2**20  # of pictures in one transaction; the row that passes it is the last one
WAIT_SECONDS = 0.5
THREADS = 12  # waiting for the disk: it writes many files at once several times faster than one after the other
DECODING = threading.BoundedSemaphore(3)  # pictures in memory decoded; media.py lets large ones take turns
Source = hpd_in.Source | jsonl_in.Source | parquet_in.Source


def open_source(path: Path) -> Source:
    """What can read this file or folder; raises ExchangeError for anything else."""
    if not path.exists():
        raise ExchangeError(f"There is no file or folder {path}; choose another one.")
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return parquet_in.Source(path)
    if path.suffix == ".jsonl":
        return jsonl_in.Source(path)
    if path.suffix == ".json":
        files = Files(path.parent)
        return hpd_in.Source(path) if hpd_in.is_array(files, path.name) else jsonl_in.Source(path)
    if path.is_dir() or zipfile.is_zipfile(path):
        files = Files(path)
        try:
            lines = files.exists("pairs.jsonl") or not any(hpd_in.is_array(files, n) for n in files.top(".json"))
        finally:
            files.close()
        return jsonl_in.Source(path) if lines else hpd_in.Source(path)
    raise ExchangeError(
        f"{path.name} is of no known kind; allowed are a zip or folder with pairs.jsonl or with HPDv2's .json, .jsonl, "
        ".json, .parquet, and a folder of .parquet."
    )


def import_data(store: Storage, path: str | Path, study_id: int | None = None, base: str = "scenes") -> Iterator[dict]:
    """Import a zip or folder with pairs.jsonl, a .jsonl beside its pictures, HPDv2's .json beside its pictures, or a
    .parquet file (or a folder of them).

    Yields Tally.state() after every batch of rows, the last with finished=True; with waiting=True, and nothing done,
    twice a second while another import of the same file runs. Without `study_id` the pairs go into
    the study that the file describes (or one named after the file, on `base`), which is made if it is not there. The
    same file into the same study goes on behind the last stored row if its import did not finish.
    Raises ExchangeError if the file as a whole cannot be read.
    """
    with open_source(Path(path)) as source, ThreadPoolExecutor(THREADS) as pool:
        turn = filelock.FileLock(store.cache_dir / f"import-{source.fingerprint()}.lock", thread_local=False)
        while not _acquired(turn):
            yield Tally(None, study_id, source.total()).state() | {"waiting": True}
            time.sleep(WAIT_SECONDS)
        try:
            study = _target(store, source.study(), study_id, base)
            yield from _take(store, source, _begin(store, study, source), pool)
        finally:
            turn.release()


def _acquired(turn: filelock.FileLock) -> bool:
    try:
        turn.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True


def _take(store: Storage, source: Source, tally: Tally, pool: ThreadPoolExecutor) -> Iterator[dict]:
    told = list(source.comparisons()) if isinstance(source, jsonl_in.Source) else []
    comparisons.begin(store, tally, told)
    for batch in _batches(source, tally.done):
        _store(store, tally, batch, pool)
        yield tally.state()
    comparisons.finish(store, tally, told)
    with store.session() as session:
        row = session.get(Import, tally.import_id)
        row.state, row.finished_at = tally.report(), time.time()
    numbers.refresh(store, tally.study_id)
    yield tally.state(finished=True)


def rejected_rows(store: Storage, import_id: int) -> Iterator[tuple[int, str]]:
    """(row, reason) of every row of an import that was rejected in whole or in part, in order of the file."""
    after = 0
    query = select(ImportRow).where(ImportRow.import_id == import_id, ImportRow.reason.is_not(None))
    while True:
        with store.reader() as session:
            page = session.exec(query.where(ImportRow.row > after).order_by(ImportRow.row).limit(1000)).all()
        if not page:
            return
        yield from ((row.row, row.reason) for row in page)
        after = page[-1].row


def _begin(store: Storage, study: Study, source: Source) -> Tally:
    """A new import, or the unfinished one of the same content into the same study."""
    content = source.fingerprint()
    total = source.total()
    with store.session() as session:
        query = select(Import).where(
            Import.study_id == study.id, Import.source == content, Import.finished_at.is_(None)
        )
        row = session.exec(query.order_by(Import.id.desc())).first()
        if row is None:
            row = Import(study_id=study.id, source=content, name=source.path.name, kind=source.kind)
            session.add(row)
            session.flush()
    known = {**row.state, "rejected": Counter(row.state["rejected"])} if row.state else {}
    return Tally(row.id, study.id, total, **known, resumed=known.get("done", 0))


def _batches(source: Source, skip: int) -> Iterator[list[Item | Rejected]]:
    """Rows in transactions' worth; what was read before the source broke comes before its error."""
    batch, size = [], 0
    try:
        for item in source.items(skip):
            batch.append(item)
            size += 0 if isinstance(item, Rejected) else len(item.first) + len(item.second)
            if len(batch) == ROWS or size > BYTES:
                yield batch
                batch, size = [], 0
    except ExchangeError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _target(store: Storage, described: dict, study_id: int | None, base: str) -> Study:
    if study_id is not None:
        with store.reader() as session:
            return study_row(session, study_id)
    wanted = {"base": base, "question": "Which picture do you prefer?", "salt": None, **described}
    name, number = wanted["name"], 1
    existing = {study.name: study for study in list_studies(store)}
    while name in existing:
        here = existing[name]
        same = here.base == wanted["base"] and wanted["salt"] in (None, here.salt)
        if same:
            return here  # the same study: a resumed import, or more of it
        number += 1
        name = f"{wanted['name']} ({number})"
    return create_study(store, name, wanted["base"], wanted["question"], wanted["salt"], described.get("settings"))


def _store(store: Storage, tally: Tally, batch: list[Item | Rejected], pool: ThreadPoolExecutor) -> None:
    """Store a batch: files first, then everything else and the report in one transaction."""
    files = _files(store, batch, pool)
    lost = next((each.exception() for each in files.values() if isinstance(each.exception(), OSError)), None)
    if lost is not None:
        raise Unwritable(f"Cannot write pictures in {store.media.root} ({lost.strerror}); make room on that disk.")
    with store.session() as session:
        study = study_row(session, tally.study_id)
        for item in batch:
            tally.done += 1
            result = ImportRow(import_id=tally.import_id, row=tally.done)
            try:
                put(session, study, tally, item, files, result)
            except StorageError as reason:
                refuse(tally, result, str(reason))
            if result.preference_id is not None or result.reason is not None:
                session.add(result)
        session.get(Import, tally.import_id).state = tally.report()


def _files(store: Storage, batch: list[Item | Rejected], pool: ThreadPoolExecutor) -> dict[bytes, Future]:
    """{sha256: (hash, width, height), or why it is refused}: files that a row knows already were checked before."""
    found: dict[bytes, Future] = {}
    for item in batch:
        if isinstance(item, Rejected):
            continue
        for data, name in ((item.first, "the first picture"), (item.second, "the second picture")):
            digest = hashlib.sha256(data).digest()
            if digest not in found:
                found[digest] = pool.submit(_file, store, data, digest.hex(), name)
    wait(found.values())
    return found


def _file(store: Storage, data: bytes, digest: str, name: str) -> tuple[str, int, int]:
    with store.reader() as session:
        known = session.exec(select(Picture).where(Picture.hash == digest)).first()
    if known is not None:
        return digest, known.width, known.height
    with DECODING:
        ending, width, height = check_picture(data, name)
    store.media.keep(digest, ending, data)
    return digest, width, height
