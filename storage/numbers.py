"""A study in numbers: labels, usable pairs, agreement. Quick with a million labels, because only what changed is read.

Everything here is a sum over pairs of whole numbers. The sum is kept in the `setting` table with the moment that it
describes; the next reader takes off what the pairs with newer rows contributed then and adds what they contribute now.
Imports and filters leave a fresh sum behind. Losing it costs a reading of all labels, some seconds for a million.
"""

from collections import Counter, defaultdict
from collections.abc import Collection
from itertools import combinations

from sqlalchemy import text
from sqlmodel import Session, select

from .answers import SOFT, Moment, by_pair, last, moment
from .db import Storage, Unwritable
from .models import Annotator, Setting

FORMAT_VERSION = 1
MANY = 20_000  # changed pairs above which everything is read again
WORTH_KEEPING = 200  # changed pairs above which the new sum is written down

_SPLIT = (", sp.split", """JOIN pair ON pair.id = p.pair_id
    JOIN study_prompt sp ON sp.study_id = p.study_id AND sp.prompt_id = pair.prompt_id""")  # fmt: skip
_CHANGED = text("""SELECT pair_id FROM preference WHERE id > :upto AND +study_id = :study
    UNION SELECT pair_id FROM preference WHERE comparison_id IN (SELECT value FROM json_each(:ended))""")


def counts(store: Storage, study_id: int) -> dict:
    """The study in numbers: {pairs, labels, train, heldout, filter (its name or None), filtered, choices: {choice: n},
    annotators: [{id, name, kind, labels}]}. `labels` counts effective labels; `train` and `heldout` count the pairs
    that can be used (training_pairs of each split), `filtered` the labels that the filter keeps out."""
    total = refresh(store, study_id)
    with store.reader() as session:
        queue = session.execute(text("SELECT COUNT(*) FROM study_pair WHERE study_id = :s"), {"s": study_id}).scalar()
        query = text("SELECT name FROM label_filter WHERE study_id = :s AND removed_at IS NULL")
        filtered = session.execute(query, {"s": study_id}).scalar()
        people = session.exec(select(Annotator).order_by(Annotator.id)).all()
    return {
        "pairs": queue,
        **{name: total[name] for name in ("labels", "train", "heldout", "filtered")},
        "filter": filtered,
        "choices": _under(total, "choice"),
        "annotators": [
            {"id": who.id, "name": who.name, "kind": who.kind, "labels": total[f"by {who.id}"]}
            for who in people
            if total[f"by {who.id}"]
        ],
    }


def agreement(store: Storage, study_id: int) -> dict:
    """How far answers can be trusted; skipped answers are left out, `percent` and `alpha` are None without data.

    {"self": {n, agree, percent}, "between": {n, agree, percent, alpha, pairs, annotators}}. `self` compares first and
    second answers to repeat pairs. In `between`, `n` counts couples of annotators over the `pairs` that two or more
    answered, and alpha is Krippendorff's for nominal data (1 perfect, 0 chance).
    """
    total = refresh(store, study_id)
    return {
        "self": _rate(total["again"], total["again same"]),
        "between": {
            **_rate(total["couples"], total["couples same"]),
            "alpha": krippendorff_alpha(_under(total, "value"), _under(total, "apart")),
            "pairs": total["shared"],
            "annotators": len(_under(total, "voice")),
        },
    }


def refresh(store: Storage, study_id: int) -> Counter:
    """The sum as of now, written down if much has changed."""
    with store.reader() as session:
        now, kept = moment(session, study_id), session.get(Setting, _key(study_id))
        old, total = _kept(kept, now)
        changed: list[int] = []
        if old is not None:
            ended = set(old.open) ^ set(now.open)
            known = {"study": study_id, "upto": old.upto, "ended": f"[{', '.join(map(str, ended))}]"}
            changed = list(session.execute(_CHANGED, known).scalars())
        if old is None or len(changed) > MANY:
            total = _sum(session, study_id, now)
        elif changed:
            total.subtract(_sum(session, study_id, old, changed))
            total.update(_sum(session, study_id, now, changed))
    if old is None or len(changed) > WORTH_KEEPING:
        _keep(store, study_id, now, total)
    return total


def _key(study_id: int) -> str:
    return f"numbers of study {study_id}"


def _kept(row: Setting | None, now: Moment) -> tuple[Moment | None, Counter]:
    """What was written down, unless another version or another filter wrote it."""
    if row is None or row.value["format_version"] != FORMAT_VERSION or row.value["filter"] != now.filter:
        return None, Counter()
    return Moment(row.value["upto"], tuple(row.value["open"]), now.filter), Counter(row.value["sum"])


def _keep(store: Storage, study_id: int, now: Moment, total: Counter) -> None:
    value = {"format_version": FORMAT_VERSION, "upto": now.upto, "open": list(now.open), "filter": now.filter,
             "sum": {name: count for name, count in total.items() if count}}  # fmt: skip
    try:
        with store.session() as session:
            session.merge(Setting(key=_key(study_id), value=value))
    except Unwritable:
        print("the numbers of a study could not be written down; the next reader counts again", flush=True)


def _sum(session: Session, study_id: int, when: Moment, pairs: Collection[int] = ()) -> Counter:
    """The sum over all pairs, or over these."""
    total: Counter = Counter()
    for _, rows in by_pair(session, study_id, when, *_SPLIT, pairs):
        labels = last(rows)
        total["labels"] += len(labels)
        for row in labels:
            total[f"choice {row.choice}"] += 1
            total[f"by {row.annotator_id}"] += 1
            total["filtered"] += row.dropped
        if any(row.choice in SOFT and not row.dropped for row in labels):
            total[rows[0].split] += 1
        if len(rows) > 1:
            _agree(total, [row for row in rows if row.choice != "skip"])
    return total


def _agree(total: Counter, rows: list) -> None:
    """Adds what the standing answers to one pair say about agreement; krippendorff_alpha explains value and apart."""
    answers: dict[int, dict[bool, str]] = defaultdict(dict)
    for row in rows:
        answers[row.annotator_id][bool(row.repeat)] = row.choice
    for each in answers.values():
        if len(each) == 2:
            total["again"] += 1
            total["again same"] += each[True] == each[False]
    labels = last(rows)
    if len(labels) < 2:
        return
    said = Counter(row.choice for row in labels)
    total["shared"] += 1
    total["couples"] += len(labels) * (len(labels) - 1) // 2
    total["couples same"] += sum(a.choice == b.choice for a, b in combinations(labels, 2))
    total[f"apart {len(labels)}"] += len(labels) ** 2 - sum(count * count for count in said.values())
    for row in labels:
        total[f"voice {row.annotator_id}"] += 1
        total[f"value {row.choice}"] += 1


def _under(total: Counter, name: str) -> dict[str, int]:
    """{rest of the key: count} of the counts whose key begins with this word."""
    return {key.removeprefix(f"{name} "): count for key, count in total.items() if count and key.startswith(f"{name} ")}


def _rate(n: int, agree: int) -> dict:
    return {"n": n, "agree": agree, "percent": 100.0 * agree / n if n else None}


def krippendorff_alpha(values: dict[str, int], apart: dict[str, int]) -> float | None:
    """Krippendorff's alpha for nominal values, of units with two or more values each.

    `values` {value: how often it was given}, `apart` {m: ordered couples that disagree, over all units with m values}.
    alpha = 1 - (n - 1) * sum_m apart_m / (m - 1) / sum_{c != k} n_c n_k. None if there is no unit or only one value was
    ever given. Source: Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
    """
    n = sum(values.values())
    expected = n * n - sum(count * count for count in values.values())
    if expected == 0:
        return None
    return 1.0 - (n - 1) * sum(count / (int(m) - 1) for m, count in apart.items()) / expected
