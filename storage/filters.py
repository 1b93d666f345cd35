"""Filters of imported labels, built on score gaps (gaps.py) by a rule (mpcf.py).

    filters.apply(store, gap_set_id, mpcf.PRESETS["MPCF rule 2"])   # from now on only these imported labels train
    filters.remove(store, study_id)

A filter never changes or deletes a label: it lists those that do not train while it is on. Held-out labels are never
filtered, so that accuracies stay comparable between filters, and labels without gaps (your own) always train.
"""

import time
from collections.abc import Sequence

import numpy as np
from sqlalchemy import text
from sqlmodel import Session, select

from . import mpcf, numbers
from .data_models import GAP_COLUMNS, FilterDrop, LabelFilter
from .db import Storage, StorageError
from .gaps import Gaps, finished_set, load

_EXAMPLES = text("""SELECT p.id, p.pair_id, p.choice, prompt.text AS prompt, a.hash AS first, b.hash AS second
    FROM preference p JOIN pair ON pair.id = p.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id WHERE p.id = :label""")


def active(store: Storage, study_id: int) -> LabelFilter | None:
    """The filter that is on in this study, if any."""
    with store.reader() as session:
        return _active(session, study_id)


def _active(session: Session, study_id: int) -> LabelFilter | None:
    query = select(LabelFilter).where(LabelFilter.study_id == study_id, LabelFilter.removed_at.is_(None))
    return session.exec(query).first()


def history(store: Storage, study_id: int) -> list[LabelFilter]:
    """Every filter that was ever on in this study, newest first."""
    with store.reader() as session:
        query = select(LabelFilter).where(LabelFilter.study_id == study_id).order_by(LabelFilter.id.desc())
        return list(session.exec(query))


def describe(row: LabelFilter | None) -> dict | None:
    """What a training snapshot says of the filter that it respects: {name, rule, words, kept, dropped, gap_set_id}."""
    if row is None:
        return None
    rule = mpcf.words(mpcf.from_json(row.rule))
    return {"name": row.name, "rule": row.rule, "words": rule, "kept": row.kept, "dropped": row.dropped,
            "gap_set_id": row.gap_set_id}  # fmt: skip


def preview(gaps: Gaps, rule: mpcf.Rule) -> dict:
    """What the rule would do to the labels that can train, without doing it.

    {kept, dropped, chosen: (kept, all), ties: (kept, all), heldout (labels that no filter touches), gates: {score:
    {passed, alone (labels that only this gate drops), missing (labels without this gap)}}}.
    """
    train = gaps.train
    ties = gaps.ties[train]
    scores = {column: gaps.scores[column][train] for column in GAP_COLUMNS}
    kept = mpcf.keeps(rule, ties, scores)
    passed = mpcf.passes(rule, ties, scores)
    misses = sum((~each).astype(int) for each in passed.values()) if passed else np.zeros(len(ties), int)
    return {
        "kept": int(kept.sum()), "dropped": int((~kept).sum()), "heldout": int((~train).sum()),
        "chosen": (int(kept[~ties].sum()), int((~ties).sum())), "ties": (int(kept[ties].sum()), int(ties.sum())),
        "gates": {
            column: {
                "passed": int(each.sum()), "alone": int((~each & (misses == 1)).sum()),
                "missing": int(np.isnan(scores[column]).sum()),
            }
            for column, each in passed.items()
        },
    }  # fmt: skip


def examples(store: Storage, gaps: Gaps, rule: mpcf.Rule, count: int = 6, seed: int = 0) -> dict[str, list[dict]]:
    """{"kept": [...], "dropped": [...]}, up to `count` labels of each, drawn at random by `seed`: {label, pair_id,
    choice, prompt, first, second (hashes), gaps: {score: float or None}, missed (scores whose gate it fails)}."""
    kept = mpcf.keeps(rule, gaps.ties, gaps.scores)
    passed = mpcf.passes(rule, gaps.ties, gaps.scores)
    draw = np.random.default_rng(seed)
    out = {}
    with store.reader() as session:
        for name, mask in (("kept", kept & gaps.train), ("dropped", ~kept & gaps.train)):
            places = np.flatnonzero(mask)
            chosen = draw.permutation(places)[:count]
            out[name] = [_example(session, gaps, passed, int(place)) for place in chosen]
    return out


def _example(session: Session, gaps: Gaps, passed: dict[str, np.ndarray], place: int) -> dict:
    row = session.execute(_EXAMPLES, {"label": int(gaps.labels[place])}).mappings().one()
    scores = {column: float(gaps.scores[column][place]) for column in GAP_COLUMNS}
    return {
        "label": row["id"], "pair_id": row["pair_id"], "choice": row["choice"], "prompt": row["prompt"],
        "first": row["first"], "second": row["second"],
        "gaps": {column: None if np.isnan(value) else value for column, value in scores.items()},
        "missed": [column for column, each in passed.items() if not each[place]],
    }  # fmt: skip


def apply(store: Storage, gap_set_id: int, rule: mpcf.Rule) -> LabelFilter:
    """Switch the filter on, in place of the one that was; raises StorageError if nothing would be left to train on."""
    row = finished_set(store, gap_set_id)
    missing = [mpcf.WORDS[column] for column in rule.active if column not in row.config["columns"]]
    if missing:
        raise StorageError(
            f"{row.name} has no {missing[0]} gaps, so this gate would drop everything; switch that gate off."
        )
    gaps = load(store, gap_set_id)
    kept = mpcf.keeps(rule, gaps.ties, gaps.scores) | ~gaps.train
    left, dropped = int((kept & gaps.train).sum()), gaps.labels[~kept]
    if left == 0:
        raise StorageError(f"{rule.name} would keep none of the {len(dropped)} labels; loosen a gate.")
    with store.session() as session:
        _remove(session, row.study_id)
        applied = LabelFilter(
            study_id=row.study_id, gap_set_id=gap_set_id, name=rule.name.strip(), rule=mpcf.to_json(rule), kept=left,
            dropped=len(dropped),
        )  # fmt: skip
        session.add(applied)
        session.flush()
        _insert(session, applied.id, dropped.tolist())
    numbers.refresh(store, row.study_id)
    return applied


def _insert(session: Session, filter_id: int, dropped: Sequence[int]) -> None:
    rows = [{"filter_id": filter_id, "preference_id": label} for label in dropped]
    if rows:
        session.execute(FilterDrop.__table__.insert(), rows)


def remove(store: Storage, study_id: int) -> LabelFilter | None:
    """Switch the study's filter off: every label trains again. Its record stays. None if none was on."""
    with store.session() as session:
        removed = _remove(session, study_id)
    numbers.refresh(store, study_id)
    return removed


def _remove(session: Session, study_id: int) -> LabelFilter | None:
    row = _active(session, study_id)
    if row is not None:
        row.removed_at = time.time()
        session.add(row)
        session.flush()
    return row
