"""Studies, pairs, and the life of a label: from the queue to one answer, to its undo, to the effective label.

What rows mean:
- The effective label of (study, pair, annotator) is the last row with a choice that no other row revokes.
- An undo is a row without a choice that revokes the annotator's last answer; a changed answer revokes the old one.
- 1 pair in 20 is a *repeat* pair. It comes back to an annotator who has given at least `REPEAT_GAP` other answers
  since. That second answer is a row of its own with `repeat` set: both rows stay unrevoked, the later one is the
  effective label (the rule above needs no exception), and comparing the two is the agreement with oneself.
- A vote on a pair of a running comparison carries its `comparison_id`; such pairs enter the label queue on completion.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from sqlalchemy import text
from sqlmodel import Session, select

from .answers import effective, progress, training_pairs
from .db import Storage
from .models import CHOICES, SIDES, Annotator, Comparison, ComparisonPair, Preference, Study, StudyPair
from .numbers import agreement, counts
from .studies import (  # one door for everything about labels
    LabelError,
    add_pair,
    add_prompts,
    annotator,
    create_study,
    get_annotator,
    get_study,
    keyed_uniform,
    list_annotators,
    list_studies,
    normalise,
    split_of,
    study_prompts,
    study_row,
)

__all__ = [
    "LabelError", "add_pair", "add_prompts", "agreement", "annotator", "counts", "create_study", "effective",
    "get_annotator", "get_study", "list_annotators", "list_studies", "next_pairs", "normalise", "progress", "split_of",
    "study_prompts", "training_pairs", "undo", "vote",
]  # fmt: skip

REPEAT_GAP = 20  # other answers between the first and the second showing
REPEAT_WINDOW = 200  # how far beyond the first unanswered pair answers may lie and still be repeated


@dataclass
class QueueMark:
    """Positions of one annotator's queue below which every pair is answered (`fresh`) and every repeat pair needs no
    second showing (`repeats`), as of the annotator's row `undo`, the last one that revoked something."""

    undo: int
    fresh: int = 0
    repeats: int = 0


# --- the queue ----------------------------------------------------------------------------------------------------

_FRESH = text("""SELECT sp.pair_id, sp.position FROM study_pair sp
    WHERE sp.study_id = :study AND sp.position >= :low AND NOT EXISTS (SELECT 1 FROM preference p
        WHERE p.study_id = :study AND p.annotator_id = :annotator AND p.pair_id = sp.pair_id AND p.choice IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id))
    ORDER BY sp.position LIMIT :limit""")

# repeat pairs in order of position with this annotator's standing answers: how many, and the first one
_REPEATS = text("""SELECT sp.position, sp.pair_id, COUNT(p.id) AS times, MIN(p.id) AS answer, p.choice
    FROM study_pair sp LEFT JOIN preference p ON p.study_id = :study AND p.annotator_id = :annotator
        AND p.pair_id = sp.pair_id AND p.choice IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)
    WHERE sp.study_id = :study AND sp.repeat AND sp.position >= :from AND sp.position < :to
    GROUP BY sp.position ORDER BY sp.position""")

# the annotator's last row that revoked, and the earliest place in the queue of what was revoked after :since
_UNDONE = text("""SELECT (SELECT MAX(id) FROM preference
        WHERE study_id = :study AND annotator_id = :annotator AND revokes IS NOT NULL) AS undo,
    (SELECT MIN(sp.position) FROM preference u JOIN study_pair sp ON sp.study_id = :study AND sp.pair_id = u.pair_id
        WHERE u.study_id = :study AND u.annotator_id = :annotator AND u.revokes IS NOT NULL AND u.id > :since)
        AS position""")

# the id of the annotator's gap-th last answer: what lies at or before it is old enough to be asked again
_LATEST = text("""SELECT id FROM preference p WHERE p.study_id = :study AND p.annotator_id = :annotator
    AND p.choice IS NOT NULL AND p.comparison_id IS NULL ORDER BY id DESC LIMIT 1 OFFSET :gap""")

_SHOWN = text("""SELECT pair.id AS pair_id, prompt.id AS prompt_id, prompt.text AS prompt,
    a.hash AS first, a.width AS first_width, a.height AS first_height,
    b.hash AS second, b.width AS second_width, b.height AS second_height
    FROM pair JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id WHERE pair.id = :pair""")


def next_pairs(
    store: Storage, study_id: int, annotator_id: int, n: int = 1, exclude: Collection[int] = ()
) -> list[dict]:
    """The next `n` pairs to show, in a stable order: repeats that are due, then pairs not answered yet.

    `exclude` holds pair ids that the page has already been given. Each item is {pair_id, prompt_id, prompt, first,
    second (hashes), first_width, first_height, second_width, second_height, left}: `left` says which picture belongs
    on the left, drawn once per study, pair and annotator. Nothing in it tells who made a picture.
    """
    excluded = set(exclude)
    with store.reader() as session:
        study = study_row(session, study_id)
        mark = _queue_mark(store, session, study_id, annotator_id)
        ids = [pair_id for pair_id in _due(session, study_id, annotator_id, mark) if pair_id not in excluded][:n]
        if len(ids) < n:
            who = {"study": study_id, "annotator": annotator_id, "low": mark.fresh, "limit": n + len(excluded)}
            fresh = session.execute(_FRESH, who).all()
            ids += [row.pair_id for row in fresh if row.pair_id not in excluded][: n - len(ids)]
        return [shown(session, study, annotator_id, pair_id) for pair_id in ids]


def _due(session: Session, study_id: int, annotator_id: int, mark: QueueMark) -> list[int]:
    """Repeat pairs that may come back now; moves `mark.repeats` past those that never will."""
    who = {"study": study_id, "annotator": annotator_id}
    latest = session.execute(_LATEST, {**who, "gap": REPEAT_GAP}).scalar()
    window = {"from": mark.repeats, "to": mark.fresh + REPEAT_WINDOW}
    rows = session.execute(_REPEATS, {**who, **window}).all()
    open_ = [row for row in rows if row.times < 2 and row.choice != "skip"]
    mark.repeats = open_[0].position if open_ else (rows[-1].position + 1 if rows else mark.repeats)
    return [row.pair_id for row in open_ if row.times == 1 and latest is not None and row.answer <= latest]


def shown(session: Session, study: Study, annotator_id: int, pair_id: int) -> dict:
    """What a page may know of a pair."""
    item = dict(session.execute(_SHOWN, {"pair": pair_id}).mappings().one())
    item["left"] = SIDES[keyed_uniform(study.salt, "left", pair_id, annotator_id) < 0.5]
    return item


def _queue_mark(store: Storage, session: Session, study_id: int, annotator_id: int) -> QueueMark:
    """How far this annotator has got, remembered between calls so that a long answered head is not read again. Only a
    row that revokes can take an answer away, so newer ones move the marks back to what they revoked."""
    mark = replace(store.queue_marks.get((study_id, annotator_id)) or QueueMark(undo=0))
    who = {"study": study_id, "annotator": annotator_id}
    undone = session.execute(_UNDONE, {**who, "since": mark.undo}).one()
    mark.undo = undone.undo or 0
    if undone.position is not None:
        mark.fresh, mark.repeats = min(mark.fresh, undone.position), min(mark.repeats, undone.position)
    row = session.execute(_FRESH, {**who, "low": mark.fresh, "limit": 1}).first()
    if row is not None:
        mark.fresh = row.position
    store.queue_marks[study_id, annotator_id] = mark
    return mark


# --- answering ----------------------------------------------------------------------------------------------------


def vote(
    store: Storage,
    *,
    study_id: int,
    pair_id: int,
    annotator_id: int,
    choice: str,
    left: str,
    milliseconds: int,
    client_key: str,
    revokes: int | None = None,
) -> Preference:
    """Save one answer durably and return its row; a retry with the same `client_key` returns the row it made.

    `left` is the picture that was shown on the left, `revokes` the id of the annotator's earlier answer to the same
    pair that this one replaces. Raises LabelError.
    """
    if choice not in CHOICES:
        raise LabelError(f"{choice!r} is not an answer; allowed are {', '.join(CHOICES)}.")
    if left not in SIDES:
        raise LabelError(f"{left!r} is not a side; the left picture is first or second.")
    if not 1 <= len(client_key) <= 100:
        raise LabelError("A vote needs a client key of 1 to 100 characters.")
    with store.session() as session:
        old = session.exec(select(Preference).where(Preference.client_key == client_key)).first()
        if old is not None:
            if (old.study_id, old.pair_id, old.annotator_id, old.choice) != (study_id, pair_id, annotator_id, choice):
                raise LabelError("This client key belongs to another answer; reload the page.")
            return old
        who = session.get(Annotator, annotator_id)
        if who is None:
            raise LabelError("This annotator is not known here; choose a name first.")
        comparison_id = _asked_by(session, study_id, pair_id)
        if revokes is not None:
            _check_revocable(session, revokes, study_id, pair_id, annotator_id)
        row = Preference(
            study_id=study_id,
            pair_id=pair_id,
            annotator_id=annotator_id,
            choice=choice,
            left=left,
            milliseconds=max(0, min(int(milliseconds), 2**31)),
            client_key=client_key,
            revokes=revokes,
            simulated=who.kind == "simulated",
            repeat=revokes is None and comparison_id is None and _is_repeat(session, study_id, pair_id, annotator_id),
            comparison_id=comparison_id,
        )
        session.add(row)
    return row


def _asked_by(session: Session, study_id: int, pair_id: int) -> int | None:
    """The running comparison that asks this pair; None for the label queue; raises if the study asks it nowhere."""
    query = select(Comparison).join(ComparisonPair).where(ComparisonPair.pair_id == pair_id)
    comparison = session.exec(query).first()
    if comparison is not None and comparison.study_id == study_id and comparison.state == "voting":
        return comparison.id
    if session.get(StudyPair, (study_id, pair_id)) is None:
        raise LabelError(f"Study {study_id} does not ask about pair {pair_id}; reload the page.")
    return None


def _check_revocable(session: Session, revokes: int, study_id: int, pair_id: int, annotator_id: int) -> None:
    old = session.get(Preference, revokes)
    if old is None or (old.study_id, old.pair_id, old.annotator_id) != (study_id, pair_id, annotator_id):
        raise LabelError("Only an earlier answer of your own to the same pair can be replaced.")
    taken = session.exec(select(Preference.id).where(Preference.revokes == revokes)).first()
    if old.choice is None or taken is not None:
        raise LabelError("That answer was already taken back.")


def _is_repeat(session: Session, study_id: int, pair_id: int, annotator_id: int) -> bool:
    """Whether next_pairs asks this pair a second time now; an answer from a second open window is none."""
    place = session.get(StudyPair, (study_id, pair_id))
    if not place.repeat:
        return False
    mark = QueueMark(undo=0, fresh=place.position, repeats=place.position)
    return pair_id in _due(session, study_id, annotator_id, mark)


_LAST_ANSWER = """SELECT p.id, p.pair_id FROM preference p WHERE p.study_id = :study AND p.annotator_id = :annotator
    AND p.choice IS NOT NULL AND {scope} AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)
    ORDER BY p.id DESC LIMIT 1"""


def undo(
    store: Storage, study_id: int, annotator_id: int, client_key: str, comparison_id: int | None = None
) -> dict | None:
    """Take back the annotator's last answer (of the label queue, or of a running comparison) and return its pair as
    `next_pairs` does; None if there is nothing to take back. A retry with the same key takes back nothing more."""
    if not 1 <= len(client_key) <= 100:
        raise LabelError("An undo needs a client key of 1 to 100 characters.")
    with store.session() as session:
        study = study_row(session, study_id)
        old = session.exec(select(Preference).where(Preference.client_key == client_key)).first()
        if old is not None:
            if (old.study_id, old.annotator_id, old.choice) != (study_id, annotator_id, None):
                raise LabelError("This client key belongs to an answer; reload the page.")
            return shown(session, study, annotator_id, old.pair_id)
        if comparison_id is not None:
            comparison = session.get(Comparison, comparison_id)
            if comparison is None or comparison.state != "voting":
                raise LabelError("The verdict of this comparison is out; its votes can no longer be taken back.")
        scope = "p.comparison_id IS NULL" if comparison_id is None else "p.comparison_id = :comparison"
        found = {"study": study_id, "annotator": annotator_id, "comparison": comparison_id}
        last = session.execute(text(_LAST_ANSWER.format(scope=scope)), found).first()
        if last is None:
            return None
        who = session.get(Annotator, annotator_id)
        session.add(
            Preference(
                study_id=study_id,
                pair_id=last.pair_id,
                annotator_id=annotator_id,
                choice=None,
                left=None,
                milliseconds=None,
                client_key=client_key,
                revokes=last.id,
                simulated=who.kind == "simulated",
                comparison_id=comparison_id,
            )
        )
        session.flush()
        return shown(session, study, annotator_id, last.pair_id)
