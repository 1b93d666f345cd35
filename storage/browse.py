"""Pages of pictures, pairs and labels for the Data tab, by filters, newest first.

Blindness reaches here too: whatever belongs to a comparison without a verdict is left out, pictures by their file
hash, because a provenance shown beside them would tell which policy made them. `hidden` says how much that is.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, and_, exists, func, or_
from sqlalchemy.orm import aliased
from sqlmodel import Session, select

from .db import Storage
from .models import (
    Annotator,
    Comparison,
    ComparisonPair,
    Pair,
    Picture,
    Preference,
    Prompt,
    Study,
    StudyPair,
    StudyPrompt,
)

BLIND_STATES = ("preparing", "voting")
ANY = "any"
UNLABELLED = "unlabelled"
ORIGINS = ("comparison", "form", "import", "queue")  # where pairs come from
MOST = 10_000  # matches that are counted and paged through; of more the newest are shown


@dataclass(frozen=True)
class Filters:
    """What to show; None or "any" leaves a field open. `since` and `until` are seconds since 1970."""

    study_id: int | None = None
    text: str = ""
    annotator_id: int | None = None
    choice: str = ANY
    split: str = ANY
    origin: str = ANY
    kind: str = ANY
    since: float | None = None
    until: float | None = None

    @property
    def about_labels(self) -> bool:
        """Whether a field speaks of labels, so that only what was labelled can match."""
        return self.annotator_id is not None or self.kind != ANY or self.choice not in (ANY, UNLABELLED)


def pictures(store: Storage, filters: Filters, page: int, size: int) -> tuple[int, list[dict]]:
    """How many pictures match (at most MOST + 1), and page `page` (from 0) of them, newest first.

    Each is {id, hash, prompt, width, height, origin, made, provenance}.
    """
    query = select(Picture.id).where(Picture.hash.not_in(blind_hashes()), *_time(Picture.created_at, filters))
    query = query.where(*_prompt(filters, Picture.prompt_id))
    if filters.origin != ANY:
        query = query.where(_imported(Picture) if filters.origin == "import" else ~_imported(Picture))
    if filters.about_labels:
        labelled = exists().where(
            or_(Pair.first_id == Picture.id, Pair.second_id == Picture.id),
            Preference.pair_id == Pair.id,
            *_label(filters),
        )
        query = query.where(labelled)
    rows = select(Picture, Prompt).join(Prompt, Prompt.id == Picture.prompt_id, isouter=True)
    with store.reader() as session:
        total, found = _page(session, query, Picture.id, rows, page, size)
        return total, [picture_row(picture, prompt) for picture, prompt in found]


def pairs(store: Storage, filters: Filters, page: int, size: int) -> tuple[int, list[dict]]:
    """How many pairs match (at most MOST + 1), and a page of them, newest first: {id, prompt, first, second (hashes),
    origin, labels}."""
    query = select(Pair.id)
    if filters.choice == UNLABELLED:  # first, because few are
        query = query.where(_unlabelled())
    query = query.where(~blind_pair(Pair.id), *_time(Pair.created_at, filters), *_prompt(filters, Pair.prompt_id))
    if filters.study_id is not None:
        query = query.where(_asked(filters.study_id))
    if filters.origin != ANY:
        query = query.where(Pair.origin == filters.origin)
    if filters.about_labels:
        query = query.where(exists().where(Preference.pair_id == Pair.id, *_standing(), *_label(filters)))
    first, second = aliased(Picture), aliased(Picture)
    rows = select(Pair, Prompt, first.hash, second.hash).join(Prompt, Prompt.id == Pair.prompt_id)
    rows = rows.join(first, first.id == Pair.first_id).join(second, second.id == Pair.second_id)
    with store.reader() as session:
        total, found = _page(session, query, Pair.id, rows, page, size)
        said: dict[int, list[str]] = {}
        ids = [pair.id for pair, *_ in found]
        answers = select(Preference.pair_id, Preference.choice).where(Preference.pair_id.in_(ids), *_standing())
        if filters.study_id is not None:
            answers = answers.where(Preference.study_id == filters.study_id)
        for pair_id, choice in session.exec(answers):
            said.setdefault(pair_id, []).append(choice)
        return total, [
            {
                "id": pair.id,
                "prompt": prompt.text,
                "first": one,
                "second": two,
                "origin": pair.origin,
                "labels": said.get(pair.id, []),
            }
            for pair, prompt, one, two in found
        ]


def labels(store: Storage, filters: Filters, page: int, size: int) -> tuple[int, list[dict]]:
    """How many label rows match (at most MOST + 1), undos included, and a page of them, newest first.

    Each is as `label_row` gives it, with the hashes of both pictures as first and second.
    """
    query = select(Preference.id).where(~blind_pair(Preference.pair_id), *_time(Preference.created_at, filters))
    query = query.where(*_label(filters))
    if filters.study_id is not None:  # + 0: newest first is the order of the table, the study's index is not
        query = query.where(Preference.study_id + 0 == filters.study_id)
    of_pair = _prompt(filters, Pair.prompt_id) + ([Pair.origin == filters.origin] if filters.origin != ANY else [])
    if filters.text.strip():  # few match: find them first
        query = query.where(Preference.pair_id.in_(select(Pair.id).where(*of_pair)))
    elif of_pair:
        query = query.where(exists().where(Pair.id == Preference.pair_id, *of_pair))
    first, second = aliased(Picture), aliased(Picture)
    rows = select(Preference, Annotator, Prompt, Study, first.hash, second.hash)
    rows = rows.join(Annotator, Annotator.id == Preference.annotator_id)
    rows = rows.join(Pair, Pair.id == Preference.pair_id).join(Prompt, Prompt.id == Pair.prompt_id)
    rows = rows.join(Study, Study.id == Preference.study_id)
    rows = rows.join(first, first.id == Pair.first_id).join(second, second.id == Pair.second_id)
    with store.reader() as session:
        total, found = _page(session, query, Preference.id, rows, page, size)
        gone = revoked(session, [row.id for row, *_ in found])
        return total, [{**label_row(*row, row[0].id in gone), "first": one, "second": two} for *row, one, two in found]


def hidden(store: Storage) -> tuple[int, int]:
    """How many pictures and pairs are left out because their comparison has no verdict yet."""
    with store.reader() as session:
        files = session.exec(select(func.count(Picture.id)).where(Picture.hash.in_(blind_hashes()))).one()
        return files, session.exec(select(func.count(Pair.id)).where(blind_pair(Pair.id))).one()


def day(moment: float) -> str:
    """A time as the page shows it, in this machine's zone: 2026-11-23 01:09. Imported labels may have none (0)."""
    return "no date" if not moment else datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")


def _page(session: Session, query: Select, key, rows: Select, page: int, size: int) -> tuple[int, Sequence]:
    """How many ids the query gives, counted up to MOST + 1, and `rows` of one page of them, newest first."""
    found = session.exec(query.order_by(key.desc()).limit(MOST + 1)).all()
    ids = found[page * size : (page + 1) * size]
    return len(found), session.exec(rows.where(key.in_(ids)).order_by(key.desc())).all()


def blind_hashes() -> Select:
    one = aliased(Picture)
    pair = aliased(Pair)
    blind = select(ComparisonPair.pair_id).join(Comparison).where(Comparison.state.in_(BLIND_STATES))
    query = select(one.hash).join(pair, or_(pair.first_id == one.id, pair.second_id == one.id))
    return query.where(pair.id.in_(blind))


def blind_pair(pair_id):
    blind = select(ComparisonPair.pair_id).join(Comparison).where(Comparison.state.in_(BLIND_STATES))
    return pair_id.in_(blind)


def _imported(picture):
    return func.json_extract(picture.provenance, "$.imported").is_not(None)


def _time(column, filters: Filters) -> list:
    bounds = []
    if filters.since is not None:
        bounds.append(column >= filters.since)
    if filters.until is not None:
        bounds.append(column < filters.until)
    return bounds


def _prompt(filters: Filters, prompt_id) -> list:
    """Conditions on the prompt of a row: its text, and its study and split."""
    conditions = []
    if filters.text.strip():
        matching = select(Prompt.id).where(Prompt.text.icontains(filters.text.strip(), autoescape=True))
        conditions.append(prompt_id.in_(matching))
    if filters.split != ANY or filters.study_id is not None:
        member = [StudyPrompt.prompt_id == prompt_id]
        if filters.study_id is not None:
            member.append(StudyPrompt.study_id == filters.study_id)
        if filters.split != ANY:
            member.append(StudyPrompt.split == filters.split)
        conditions.append(exists().where(*member))
    return conditions


def _label(filters: Filters) -> list:
    conditions = []
    if filters.annotator_id is not None:
        conditions.append(Preference.annotator_id == filters.annotator_id)
    if filters.choice not in (ANY, UNLABELLED):
        conditions.append(Preference.choice == filters.choice)
    if filters.kind != ANY:
        conditions.append(Preference.simulated.is_(filters.kind == "simulated"))
    return conditions


def _standing() -> tuple:
    """Conditions for an answer that nobody took back."""
    later = aliased(Preference)
    return Preference.choice.is_not(None), ~exists().where(later.revokes == Preference.id)


def _unlabelled():
    """Whether nobody has answered this pair, or all have taken it back. The first, which is nearly all, by the index
    alone."""
    undone = select(Preference.pair_id).where(Preference.revokes.is_not(None))
    return or_(
        ~exists().where(Preference.pair_id == Pair.id),
        and_(Pair.id.in_(undone), ~exists().where(Preference.pair_id == Pair.id, *_standing())),
    )


def _asked(study_id: int):
    """Whether the study asks for this pair, in its queue or in one of its comparisons."""
    compared = and_(ComparisonPair.pair_id == Pair.id, Comparison.id == ComparisonPair.comparison_id)
    return or_(
        exists().where(StudyPair.pair_id == Pair.id, StudyPair.study_id == study_id),
        exists().where(compared, Comparison.study_id == study_id),
    )


def revoked(session: Session, ids: list[int]) -> set[int]:
    """Which of these labels were taken back."""
    return set(session.exec(select(Preference.revokes).where(Preference.revokes.in_(ids))))


def picture_row(picture: Picture, prompt: Prompt | None) -> dict:
    """{id, hash, prompt, width, height, origin, made, provenance}."""
    provenance = picture.provenance or {}
    return {
        "id": picture.id,
        "hash": picture.hash,
        "prompt": prompt.text if prompt else "",
        "width": picture.width,
        "height": picture.height,
        "origin": "import" if "imported" in provenance else "generated",
        "made": day(picture.created_at),
        "provenance": provenance,
    }


def label_row(row: Preference, who: Annotator, prompt: Prompt, study: Study, gone: bool) -> dict:
    """{id, pair, prompt, annotator, kind, choice, left, seconds, when, created_at, status ("counts", "repeat",
    "taken back" or "undo"), revokes, study, comparison}."""
    status = "undo" if row.choice is None else "taken back" if gone else "repeat" if row.repeat else "counts"
    return {
        "id": row.id,
        "pair": row.pair_id,
        "prompt": prompt.text,
        "annotator": who.name,
        "kind": who.kind,
        "choice": row.choice or "",
        "left": row.left or "",
        "seconds": None if row.milliseconds is None else row.milliseconds / 1000,
        "when": day(row.created_at),
        "created_at": row.created_at,
        "status": status,
        "revokes": row.revokes,
        "study": study.name,
        "comparison": row.comparison_id,
    }
