"""What the labels say together: effective labels, training pairs, one annotator's progress. numbers.py counts them.

Votes of a comparison that is still running are left out everywhere here: before the verdict nothing may tell who
made a picture, neither a training file nor a table. Labels may be a million: they are read pair by pair, never held.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from sqlalchemy import Row, text
from sqlmodel import Session

from .db import Storage
from .models import SPLITS
from .studies import split_of, study_row

SOFT = {"first": 1.0, "second": 0.0, "tie": 0.5}  # both_bad and skip say nothing about which is better

_FILTER = text("SELECT id, name FROM label_filter WHERE study_id = :study AND removed_at IS NULL")

# every answer that stood when `upto` was the newest row, pair by pair, oldest first
_STANDING = """SELECT p.id, p.pair_id, p.annotator_id, p.choice, p."left", p.milliseconds, p.created_at, p.simulated,
        p.repeat, p.comparison_id, EXISTS (SELECT 1 FROM filter_drop d WHERE d.filter_id = :filter
            AND d.preference_id = p.id) AS dropped {columns}
    FROM preference p {joins} WHERE p.study_id = :study AND p.choice IS NOT NULL AND p.id <= :upto
    AND (p.comparison_id IS NULL OR p.comparison_id NOT IN (SELECT value FROM json_each(:open)))
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id AND r.id <= :upto) {more}
    ORDER BY p.pair_id, p.id"""

_PICTURES = (
    ", prompt.text, prompt.key, a.hash AS first, b.hash AS second",
    """JOIN pair ON pair.id = p.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id""",
)


@dataclass(frozen=True)
class Moment:
    """What decides which rows stand: the newest row, the comparisons that still run, the filter that is on."""

    upto: int
    open: tuple[int, ...]
    filter: int | None


def moment(session: Session, study_id: int) -> Moment:
    """Now; raises LabelError for an unknown study."""
    study_row(session, study_id)
    upto = session.execute(text("SELECT COALESCE(MAX(id), 0) FROM preference")).scalar()
    running = text("SELECT id FROM comparison WHERE study_id = :study AND state IN ('preparing', 'voting') ORDER BY id")
    found = session.execute(_FILTER, {"study": study_id}).first()
    return Moment(upto, tuple(session.execute(running, {"study": study_id}).scalars()), found and found.id)


def by_pair(
    session: Session, study_id: int, when: Moment, columns: str = "", joins: str = "", pairs: Collection[int] = ()
) -> Iterator[tuple[int, list[Row]]]:
    """(pair, its standing answers), by pair id; only of `pairs`, if there are any."""
    more = "AND p.pair_id IN (SELECT value FROM json_each(:pairs))" if pairs else ""
    query = text(_STANDING.format(columns=columns, joins=joins, more=more)).execution_options(yield_per=2000)
    known = {"study": study_id, "upto": when.upto, "open": json.dumps(when.open), "filter": when.filter}
    rows = session.execute(query, known | ({"pairs": json.dumps(list(pairs))} if pairs else {}))
    return ((pair, list(group)) for pair, group in groupby(rows, lambda row: row.pair_id))


def last(rows: Iterable[Row]) -> list[Row]:
    """The effective label of each annotator, of the standing answers to one pair."""
    return list({row.annotator_id: row for row in rows}.values())


def effective(store: Storage, study_id: int) -> list[dict]:
    """The effective label of each (pair, annotator), in the order in which they were given: {id, pair_id,
    annotator_id, choice, left, milliseconds, created_at, simulated, repeat, comparison_id, dropped (whether the
    study's filter keeps it out of the training)}."""
    with store.reader() as session:
        pairs = by_pair(session, study_id, moment(session, study_id))
        return sorted((dict(row._mapping) for _, rows in pairs for row in last(rows)), key=lambda row: row["id"])


def training_pairs(
    store: Storage, study_id: int, include_simulated: bool = True, annotators: Collection[int] | None = None
) -> Iterator[dict]:
    """The lines of pairs.jsonl: {id, prompt, first, second, target, weight, split}, one per pair, by pair id.

    `target` is the mean over annotators of their effective labels (first 1, tie 0.5, second 0): annotators who
    disagree make a soft label. Both-bad and skip do not count, nor does what the study's filter drops (see
    filters.py); while one is on, each line says so with its name as `filter`. `weight` is 1 / (number of labelled
    pairs of the same prompt, those that a filter drops included, as the official code has it), scaled to mean 1 within
    each split. `first` and `second` are paths of the stored pictures. Two readings of the labels, one for the weights:
    memory holds the prompts and no labels.
    """

    def decided(session: Session) -> Iterator[tuple[Row, list[float]]]:
        for _, rows in by_pair(session, study_id, when, *_PICTURES):
            heard = [
                row for row in rows
                if (include_simulated or not row.simulated) and (annotators is None or row.annotator_id in annotators)
            ]  # fmt: skip
            said = [row for row in last(heard) if row.choice in SOFT]
            if said:
                yield said[0], [SOFT[row.choice] for row in said if not row.dropped]

    with store.reader() as session:
        when, study = moment(session, study_id), study_row(session, study_id)
        of_prompt, trained, split = Counter(), Counter(), {}
        for row, opinions in decided(session):
            of_prompt[row.key] += 1
            trained[row.key] += bool(opinions)
            split[row.key] = split.get(row.key) or split_of(row.text, study.salt)
        found = session.execute(_FILTER, {"study": study_id}).first()
    mean = {}
    for part in SPLITS:
        keys = [key for key in split if split[key] == part]
        total = math.fsum(trained[key] / of_prompt[key] for key in keys)
        mean[part] = total / max(1, sum(trained[key] for key in keys))

    def lines() -> Iterator[dict]:
        with store.reader() as session:
            for row, opinions in decided(session):
                if opinions:
                    yield {
                        "id": str(row.pair_id),
                        "prompt": row.text,
                        "first": str(store.media.path(row.first)),
                        "second": str(store.media.path(row.second)),
                        "target": sum(opinions) / len(opinions),
                        "weight": 1.0 / of_prompt[row.key] / mean[split[row.key]],
                        "split": split[row.key],
                        **({"filter": found.name} if found else {}),
                    }

    return lines()


_PROGRESS = text("""SELECT
    (SELECT COALESCE(MAX(position) + 1, 0) FROM study_pair WHERE study_id = :study) AS pairs,
    COUNT(*) AS labels, COALESCE(SUM(p.created_at >= :midnight), 0) AS today, COUNT(DISTINCT sp.pair_id) AS answered
    FROM preference p LEFT JOIN study_pair sp ON sp.study_id = p.study_id AND sp.pair_id = p.pair_id
    WHERE p.study_id = :study AND p.annotator_id = :annotator AND p.choice IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)""")

_RECENT = text("""SELECT created_at FROM preference WHERE study_id = :study AND annotator_id = :annotator
    AND choice IS NOT NULL ORDER BY id DESC LIMIT 30""")


def progress(store: Storage, study_id: int, annotator_id: int) -> dict:
    """What the Label tab shows after every vote, quickly: {today, labels, left, pace}. `labels` are this annotator's
    standing answers, repeats included; `left` the pairs not answered yet; `pace` answers per minute over the last 30
    without pauses of more than a minute, None before there are three."""
    who = {"study": study_id, "annotator": annotator_id, "midnight": _midnight()}
    with store.reader() as session:
        row = session.execute(_PROGRESS, who).mappings().one()
        times = session.execute(_RECENT, who).scalars().all()
    gaps = [new - old for new, old in pairwise(times) if new - old <= 60.0]
    pace = 60.0 * len(gaps) / sum(gaps) if len(gaps) >= 2 and sum(gaps) > 0 else None
    return {"today": row["today"], "labels": row["labels"], "left": row["pairs"] - row["answered"], "pace": pace}


def _midnight() -> float:
    now = time.localtime()
    return time.mktime((now.tm_year, now.tm_mon, now.tm_mday, 0, 0, 0, 0, 0, -1))
