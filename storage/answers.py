"""What the labels say together: effective labels, training pairs, agreement, counts.

Votes of a comparison that is still running are left out everywhere here: before the verdict nothing may tell who
made a picture, neither a training file nor a table.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import combinations, pairwise

from sqlalchemy import text
from sqlmodel import Session

from .db import Storage
from .models import SPLITS
from .studies import split_of, study_row

SOFT = {"first": 1.0, "second": 0.0, "tie": 0.5}  # both_bad and skip say nothing about which is better

_OPEN = "SELECT c.id FROM comparison c WHERE c.state IN ('preparing', 'voting')"

# every answer that stands, oldest first; effective labels are the last of each (pair, annotator)
_STANDING = text(f"""SELECT p.id, p.pair_id, p.annotator_id, p.choice, p."left", p.milliseconds, p.created_at,
        p.simulated, p.repeat, p.comparison_id, EXISTS (SELECT 1 FROM filter_drop d WHERE d.preference_id = p.id
            AND d.filter_id = (SELECT id FROM label_filter WHERE study_id = :study AND removed_at IS NULL)) AS dropped
    FROM preference p WHERE p.study_id = :study AND p.choice IS NOT NULL
    AND (p.comparison_id IS NULL OR p.comparison_id NOT IN ({_OPEN}))
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id) ORDER BY p.id""")  # noqa: S608 constants only

_PAIRS = text("""SELECT pair.id, prompt.text, prompt.key, a.hash AS first, b.hash AS second FROM pair
    JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id
    WHERE pair.id IN (SELECT pair_id FROM preference WHERE study_id = :study)""")

_FILTER = text("SELECT name FROM label_filter WHERE study_id = :study AND removed_at IS NULL")


def _standing(
    session: Session, study_id: int, include_simulated: bool, annotators: Collection[int] | None
) -> list[dict]:
    study_row(session, study_id)  # raises for an unknown study
    rows = (dict(row) for row in session.execute(_STANDING, {"study": study_id}).mappings())
    return [
        row
        for row in rows
        if (include_simulated or not row["simulated"]) and (annotators is None or row["annotator_id"] in annotators)
    ]


def effective(
    store: Storage, study_id: int, include_simulated: bool = True, annotators: Collection[int] | None = None
) -> list[dict]:
    """The effective label of each (pair, annotator), in the order in which they were given: {id, pair_id,
    annotator_id, choice, left, milliseconds, created_at, simulated, repeat, comparison_id, dropped (whether the
    study's filter keeps it out of the training)}."""
    with store.reader() as session:
        return _last(_standing(session, study_id, include_simulated, annotators))


def _last(standing: list[dict]) -> list[dict]:
    last = {(row["pair_id"], row["annotator_id"]): row for row in standing}
    return sorted(last.values(), key=lambda row: row["id"])


def training_pairs(
    store: Storage, study_id: int, include_simulated: bool = True, annotators: Collection[int] | None = None
) -> list[dict]:
    """The lines of pairs.jsonl: {id, prompt, first, second, target, weight, split}, one per pair, by pair id.

    `target` is the mean over annotators of their effective labels (first 1, tie 0.5, second 0): annotators who
    disagree make a soft label. Both-bad and skip do not count, nor does what the study's filter drops (see
    filters.py); while one is on, each line says so with its name as `filter`. `weight` is 1 / (number of labelled
    pairs of the same prompt, those that a filter drops included, as the official code has it), scaled to mean 1 within
    each split. `first` and `second` are paths of the stored pictures.
    """
    with store.reader() as session:
        study = study_row(session, study_id)
        labels = _last(_standing(session, study_id, include_simulated, annotators))
        pairs = {row["id"]: row for row in session.execute(_PAIRS, {"study": study_id}).mappings()}
        filtered = session.execute(_FILTER, {"study": study_id}).scalar()
    opinions: dict[int, list[float]] = defaultdict(list)
    for label in labels:
        if label["choice"] in SOFT and not label["dropped"]:
            opinions[label["pair_id"]].append(SOFT[label["choice"]])
    keys = Counter(pairs[pair_id]["key"] for pair_id in {x["pair_id"] for x in labels if x["choice"] in SOFT})
    lines = [
        {
            "id": str(pair_id),
            "prompt": pairs[pair_id]["text"],
            "first": str(store.media.path(pairs[pair_id]["first"])),
            "second": str(store.media.path(pairs[pair_id]["second"])),
            "target": sum(opinions[pair_id]) / len(opinions[pair_id]),
            "weight": 1.0 / keys[pairs[pair_id]["key"]],
            "split": split_of(pairs[pair_id]["text"], study.salt),
            **({"filter": filtered} if filtered else {}),
        }
        for pair_id in sorted(opinions)
    ]
    for split in SPLITS:
        part = [line for line in lines if line["split"] == split]
        mean = math.fsum(line["weight"] for line in part) / max(1, len(part))
        for line in part:
            line["weight"] /= mean
    return lines


def agreement(store: Storage, study_id: int, include_simulated: bool = True) -> dict:
    """How far answers can be trusted; skipped answers are left out, `percent` and `alpha` are None without data.

    {"self": {n, agree, percent}, "self_by_annotator": {annotator_id: {n, agree, percent}},
     "between": {n, agree, percent, alpha, pairs, annotators}}. `self` compares first and second answers to repeat
    pairs. In `between`, `n` counts couples of annotators over the `pairs` that two or more answered, and alpha is
    Krippendorff's for nominal data (1 perfect, 0 chance).
    """
    with store.reader() as session:
        rows = [row for row in _standing(session, study_id, include_simulated, None) if row["choice"] != "skip"]
    shown_first, again = {}, {}
    for row in rows:
        (again if row["repeat"] else shown_first)[row["pair_id"], row["annotator_id"]] = row["choice"]
    by_annotator: dict[int, list[bool]] = defaultdict(list)
    for who in again.keys() & shown_first.keys():
        by_annotator[who[1]].append(again[who] == shown_first[who])
    units: dict[int, list[str]] = defaultdict(list)
    voices: dict[int, set[int]] = defaultdict(set)
    for row in _last(rows):
        units[row["pair_id"]].append(row["choice"])
        voices[row["pair_id"]].add(row["annotator_id"])
    shared = {pair_id: choices for pair_id, choices in units.items() if len(choices) > 1}
    couples = [a == b for choices in shared.values() for a, b in combinations(choices, 2)]
    people = set().union(*(voices[pair_id] for pair_id in shared))
    return {
        "self": _rate([same for each in by_annotator.values() for same in each]),
        "self_by_annotator": {who: _rate(same) for who, same in sorted(by_annotator.items())},
        "between": {
            **_rate(couples),
            "alpha": krippendorff_alpha(list(shared.values())),
            "pairs": len(shared),
            "annotators": len(people),
        },
    }


def _rate(same: list[bool]) -> dict:
    return {"n": len(same), "agree": sum(same), "percent": 100.0 * sum(same) / len(same) if same else None}


def krippendorff_alpha(units: list[list[str]]) -> float | None:
    """Krippendorff's alpha for nominal values; each unit lists the values it was given (any number of them).

    alpha = 1 - (n - 1) * sum_units disagreeing ordered couples / (m_u - 1) / sum_{c != k} n_c n_k, over the n values
    in units with m_u >= 2. None if there is no such unit or only one value was ever given.
    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
    """
    units = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in units for value in unit)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if expected == 0:
        return None
    observed = sum(
        (len(unit) ** 2 - sum(count * count for count in Counter(unit).values())) / (len(unit) - 1) for unit in units
    )
    return 1.0 - (n - 1) * observed / expected


def counts(store: Storage, study_id: int) -> dict:
    """The study in numbers: {pairs, labels, today, train, heldout, filter (its name or None), filtered, choices:
    {choice: n}, annotators: [{id, name, kind, labels, today, median_ms}]}. `labels` counts effective labels; `train`
    and `heldout` count the pairs that can be used (training_pairs of each split), `filtered` the labels that the
    filter keeps out; `today` begins at local midnight."""
    midnight = _midnight()
    with store.reader() as session:
        study = study_row(session, study_id)
        labels = _last(_standing(session, study_id, True, None))
        pairs = {row["id"]: row["text"] for row in session.execute(_PAIRS, {"study": study_id}).mappings()}
        queue = session.execute(text("SELECT COUNT(*) FROM study_pair WHERE study_id = :s"), {"s": study_id}).scalar()
        names = {row.id: row for row in session.execute(text("SELECT id, name, kind FROM annotator"))}
        filtered = session.execute(_FILTER, {"study": study_id}).scalar()
    usable = {label["pair_id"] for label in labels if label["choice"] in SOFT and not label["dropped"]}
    splits = Counter(split_of(pairs[pair_id], study.salt) for pair_id in usable)
    by_annotator: dict[int, list[dict]] = defaultdict(list)
    for label in labels:
        by_annotator[label["annotator_id"]].append(label)
    return {
        "pairs": queue,
        "labels": len(labels),
        "today": sum(label["created_at"] >= midnight for label in labels),
        "train": splits["train"],
        "heldout": splits["heldout"],
        "filter": filtered,
        "filtered": sum(label["dropped"] for label in labels),
        "choices": dict(Counter(label["choice"] for label in labels)),
        "annotators": [
            {
                "id": who,
                "name": names[who].name,
                "kind": names[who].kind,
                "labels": len(own),
                "today": sum(label["created_at"] >= midnight for label in own),
                "median_ms": _median([label["milliseconds"] for label in own if label["milliseconds"] is not None]),
            }
            for who, own in sorted(by_annotator.items())
        ],
    }


def _median(values: list[int]) -> int | None:
    """The upper median; None without values (imported labels may have no times)."""
    return sorted(values)[len(values) // 2] if values else None


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
