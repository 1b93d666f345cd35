"""One item into the database session: its prompt, pictures, pair and labels, each only if it is not there already."""

import hashlib
import json
from concurrent.futures import Future

from sqlalchemy import text
from sqlmodel import Session, select

from ..data_models import ImportRow
from ..models import Annotator, Pair, Picture, Preference, Study
from ..studies import add_prompt, insert_pair
from . import comparisons
from .items import Item, Label, Rejected
from .tally import Tally

OTHER = {"first": "second", "second": "first"}


def refuse(tally: Tally, result: ImportRow, reason: str) -> None:
    tally.reject(reason, result.row)
    result.reason = reason if result.reason is None else f"{result.reason}; {reason}"


def put(
    session: Session, study: Study, tally: Tally, item: Item | Rejected, files: dict[bytes, Future], result: ImportRow
) -> None:
    """Put one item into the session. Whatever can be refused is refused before anything of it is added."""
    if isinstance(item, Rejected):
        raise item
    sides = [files[hashlib.sha256(data).digest()].result() for data in (item.first, item.second)]
    if sides[0][0] == sides[1][0]:
        raise Rejected("both pictures are the same file")
    prompt = add_prompt(session, study, item.prompt)
    provenances = (item.first_provenance, item.second_provenance)
    ids = [_picture(session, file, prompt.id, origin) for file, origin in zip(sides, provenances, strict=True)]
    known = session.exec(text("SELECT COALESCE(MAX(id), 0) FROM pair")).scalar()
    if item.place is not None and item.place.key in tally.comparisons:
        comparison_id = tally.comparisons[item.place.key]
        pair = comparisons.put_pair(session, study, comparison_id, item.place, prompt.id, ids)
    else:
        pair = insert_pair(session, study.id, prompt.id, ids[0], ids[1], "import")
    swapped = session.get(Picture, pair.first_id).hash != sides[0][0]
    before, stored = tally.labels, []
    for label in item.labels:
        try:
            label.check()
            row, is_new = _add_label(session, study, pair, label, swapped, tally.comparisons.get(label.comparison))
            tally.labels += is_new
            stored.append(row)
        except Rejected as reason:
            refuse(tally, result, str(reason))
    if len(item.labels) == 1 and stored:
        result.preference_id = stored[0]
    is_new = pair.id > known
    tally.pairs += is_new
    tally.unlabelled += is_new and not item.labels
    tally.duplicates += not is_new and tally.labels == before


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


def _add_label(
    session: Session, study: Study, pair: Pair, label: Label, swapped: bool, comparison_id: int | None
) -> tuple[int, bool]:
    """The label's id and whether it was new. A key that another study here uses gets the study's number in front."""
    keys = (label.client_key, f"{study.id}:{label.client_key}")
    found = {row.client_key: row for row in session.exec(select(Preference).where(Preference.client_key.in_(keys)))}
    here = next((row for row in found.values() if row.study_id == study.id), None)
    if here is not None:
        return here.id, False
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
    row = Preference(
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
        comparison_id=comparison_id,
    )
    session.add(row)
    session.flush()
    return row.id, True


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
