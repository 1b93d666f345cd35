"""Importing: from any source of items into the database, one pair per transaction, never doubling anything."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import text
from sqlmodel import Session, select

from ..db import Storage, StorageError
from ..models import Annotator, Pair, Picture, Preference, Study
from ..studies import add_prompt, create_study, insert_pair, list_studies, study_row
from . import jsonl_in, parquet_in
from .items import ExchangeError, Item, Label, Rejected

OTHER = {"first": "second", "second": "first"}


@dataclass
class Tally:
    """What an import has done so far; `state()` is what its generator yields."""

    study_id: int
    total: int | None
    done: int = 0
    pairs: int = 0
    labels: int = 0
    duplicates: int = 0
    unlabelled: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def reject(self, reason: str, row: int) -> None:
        self.rejected[reason] += 1
        if len(self.examples) < 20:
            self.examples.append(f"row {row}: {reason}")

    def state(self, finished: bool = False) -> dict:
        """{study_id, total (None if unknown), done (rows), pairs and labels (new ones), duplicates (rows that brought
        nothing new), unlabelled (pairs that came without a label), rejected: {reason: rows}, examples, finished}."""
        return {
            "study_id": self.study_id, "total": self.total, "done": self.done, "pairs": self.pairs,
            "labels": self.labels, "duplicates": self.duplicates, "unlabelled": self.unlabelled,
            "rejected": dict(self.rejected), "examples": list(self.examples), "finished": finished,
        }  # fmt: skip


def import_data(store: Storage, path: str | Path, study_id: int | None = None, base: str = "scenes") -> Iterator[dict]:
    """Import a zip or folder with pairs.jsonl, a .jsonl beside its pictures, or a .parquet file (or a folder of them).

    Yields Tally.state() about every ten rows, the last with finished=True. Without `study_id` the pairs go into the
    study that the file describes (or one named after the file, on `base`), which is made if it is not there.
    Raises ExchangeError if the file as a whole cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ExchangeError(f"There is no file or folder {path}; choose another one.")
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        source = parquet_in.Source(path)
    else:
        source = jsonl_in.Source(path)
    with source:
        study = _target(store, source.study(), study_id, base)
        tally = Tally(study.id, source.total())
        for row, item in enumerate(source.items(), 1):
            tally.done = row
            try:
                _take(store, tally, item, row)
            except StorageError as error:
                tally.reject(str(error), row)
            if row % 10 == 0:
                yield tally.state()
    yield tally.state(finished=True)


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


def _take(store: Storage, tally: Tally, item: Item | Rejected, row: int) -> None:
    """Store one item: files first, then everything of the pair in one transaction."""
    if isinstance(item, Rejected):
        raise item
    files = [_file(store, item.first, "the first picture"), _file(store, item.second, "the second picture")]
    if files[0][0] == files[1][0]:
        raise Rejected("both pictures are the same file")
    new_labels = 0
    with store.session() as session:
        study = study_row(session, tally.study_id)
        prompt = add_prompt(session, study, item.prompt)
        provenances = (item.first_provenance, item.second_provenance)
        ids = [_picture(session, file, prompt.id, origin) for file, origin in zip(files, provenances, strict=True)]
        known = session.exec(text("SELECT COALESCE(MAX(id), 0) FROM pair")).scalar()
        pair = insert_pair(session, study.id, prompt.id, ids[0], ids[1], "import")
        swapped = session.get(Picture, pair.first_id).hash != files[0][0]
        for label in item.labels:
            try:
                label.check()
                new_labels += _add_label(session, study, pair, label, swapped)
            except Rejected as reason:
                tally.reject(str(reason), row)
    is_new = pair.id > known
    tally.pairs += is_new
    tally.labels += new_labels
    tally.unlabelled += is_new and not item.labels
    tally.duplicates += not is_new and not new_labels


def _file(store: Storage, data: bytes, name: str) -> tuple[str, int, int]:
    """(hash, width, height), storing the file unless a row knows it already (then it was checked before)."""
    digest = hashlib.sha256(data).hexdigest()
    with store.reader() as session:
        known = session.exec(select(Picture).where(Picture.hash == digest)).first()
    if known is not None:
        return digest, known.width, known.height
    return store.media.put(data, name)


def _picture(session: Session, file: tuple[str, int, int], prompt_id: int, provenance: dict) -> int:
    digest, width, height = file
    wanted = json.dumps(provenance, sort_keys=True)
    for row in session.exec(select(Picture).where(Picture.hash == digest, Picture.prompt_id == prompt_id)):
        if json.dumps(row.provenance, sort_keys=True) == wanted:
            return row.id
    row = Picture(hash=digest, width=width, height=height, prompt_id=prompt_id, provenance=provenance)
    session.add(row)
    session.flush()
    return row.id


def _add_label(session: Session, study: Study, pair: Pair, label: Label, swapped: bool) -> bool:
    """Whether the label was new. A key that another study of this lab uses gets the study's number in front."""
    keys = (label.client_key, f"{study.id}:{label.client_key}")
    found = {row.client_key: row for row in session.exec(select(Preference).where(Preference.client_key.in_(keys)))}
    if any(row.study_id == study.id for row in found.values()):
        return False
    who, revokes = _annotator(session, label.annotator, label.kind), None
    if label.revokes is not None:
        targets = (label.revokes, f"{study.id}:{label.revokes}")
        query = select(Preference).where(Preference.client_key.in_(targets), Preference.study_id == study.id)
        old = session.exec(query.where(Preference.pair_id == pair.id, Preference.annotator_id == who.id)).first()
        taken = old is not None and session.exec(select(Preference.id).where(Preference.revokes == old.id)).first()
        if old is None or taken:
            raise Rejected("label: what it revokes is not there, or was revoked already")
        revokes = old.id
    turn = (lambda side: OTHER.get(side, side)) if swapped else (lambda side: side)
    session.add(
        Preference(
            study_id=study.id,
            pair_id=pair.id,
            annotator_id=who.id,
            choice=turn(label.choice),
            left=turn(label.left),
            milliseconds=label.milliseconds,
            created_at=float(label.created_at),
            client_key=keys[1] if found else keys[0],
            revokes=revokes,
            simulated=who.kind == "simulated",
            repeat=bool(label.repeat),
        )
    )
    session.flush()
    return True


def _annotator(session: Session, name: str, kind: str) -> Annotator:
    """The annotator of this name and kind; a name that belongs to the other kind here gets the kind behind it."""
    name = " ".join(name.split())
    for candidate in (name, f"{name} ({kind})"):
        row = session.exec(select(Annotator).where(Annotator.name == candidate)).first()
        if row is None:
            row = Annotator(name=candidate, kind=kind)
            session.add(row)
            session.flush()
        if row.kind == kind:
            return row
    raise Rejected("label: the annotator's name belongs to another kind of annotator here")
