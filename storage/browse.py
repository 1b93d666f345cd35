"""Pages of pictures, pairs and labels for the Data tab, with filters. Pictures of a running comparison are left out,
also where the same file appears elsewhere: their provenance would tell who made them."""

import json
from typing import Any

from sqlalchemy import text

from .db import Storage

PAGE = 50

_SECRET = """SELECT h.hash FROM comparison c JOIN comparison_pair cp ON cp.comparison_id = c.id
    JOIN pair hp ON hp.id = cp.pair_id JOIN picture h ON h.id IN (hp.first_id, hp.second_id)
    WHERE c.state IN ('preparing', 'voting')"""

_PICTURES = """FROM picture p LEFT JOIN prompt ON prompt.id = p.prompt_id
    LEFT JOIN study_prompt sp ON sp.prompt_id = p.prompt_id AND sp.study_id = :study_id"""
_PAIRS = """FROM study_pair q JOIN pair ON pair.id = q.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    JOIN study_prompt sp ON sp.prompt_id = pair.prompt_id AND sp.study_id = q.study_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id"""
_LABELS = """FROM preference v JOIN pair ON pair.id = v.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    JOIN study_prompt sp ON sp.prompt_id = pair.prompt_id AND sp.study_id = v.study_id
    JOIN annotator n ON n.id = v.annotator_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id
    LEFT JOIN preference r ON r.revokes = v.id"""
_OPEN_VOTE = "v.comparison_id IN (SELECT id FROM comparison WHERE state IN ('preparing', 'voting'))"


def browse_pictures(
    store: Storage, study_id: int, *, prompt: str = "", split: str | None = None, imported: bool | None = None,
    page: int = 1, size: int = PAGE,
) -> dict:  # fmt: skip
    """{rows: [{id, hash, width, height, prompt, split, provenance, created_at}], total, page, pages}, newest first.
    Pictures of other studies' prompts are not shown."""
    where = ["sp.study_id IS NOT NULL", f"p.hash NOT IN ({_SECRET})"]
    values: dict[str, Any] = {"study_id": study_id}
    _filter_prompt(where, values, prompt, split)
    if imported is not None:
        where.append(f"json_extract(p.provenance, '$.imported') IS {'NOT ' if imported else ''}NULL")
    columns = "p.id, p.hash, p.width, p.height, prompt.text AS prompt, sp.split, p.provenance, p.created_at"
    return _page(store, columns, _PICTURES, where, values, "p.id DESC", page, size)


def browse_pairs(
    store: Storage, study_id: int, *, prompt: str = "", split: str | None = None, origin: str | None = None,
    labelled: bool | None = None, page: int = 1, size: int = PAGE,
) -> dict:  # fmt: skip
    """{rows: [{id, prompt, split, origin, first, second (hashes), labels (standing answers), created_at}], total, page,
    pages}, newest first."""
    answers = """(SELECT COUNT(*) FROM preference v WHERE v.study_id = q.study_id AND v.pair_id = q.pair_id
        AND v.choice IS NOT NULL AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = v.id))"""
    where = ["q.study_id = :study_id", f"a.hash NOT IN ({_SECRET})", f"b.hash NOT IN ({_SECRET})"]
    values: dict[str, Any] = {"study_id": study_id}
    _filter_prompt(where, values, prompt, split)
    if origin is not None:
        where.append("pair.origin = :origin")
        values["origin"] = origin
    if labelled is not None:
        where.append(f"{answers} {'> 0' if labelled else '= 0'}")
    columns = f"""pair.id, prompt.text AS prompt, sp.split, pair.origin, a.hash AS first, b.hash AS second,
        {answers} AS labels, pair.created_at"""
    return _page(store, columns, _PAIRS, where, values, "q.position DESC", page, size)


def browse_labels(
    store: Storage, study_id: int, *, prompt: str = "", split: str | None = None, annotator_id: int | None = None,
    choice: str | None = None, simulated: bool | None = None, revoked: bool | None = None,
    page: int = 1, size: int = PAGE,
) -> dict:  # fmt: skip
    """{rows: [{id, pair_id, prompt, split, annotator, simulated, choice (None for an undo), left, milliseconds, repeat,
    revokes, revoked, comparison_id, first, second, created_at}], total, page, pages}, newest first."""
    where = ["v.study_id = :study_id", f"(v.comparison_id IS NULL OR NOT {_OPEN_VOTE})"]
    values: dict[str, Any] = {"study_id": study_id}
    _filter_prompt(where, values, prompt, split)
    for column, value in (("annotator_id", annotator_id), ("choice", choice), ("simulated", simulated)):
        if value is not None:
            where.append(f"v.{column} = :{column}")
            values[column] = value
    if revoked is not None:
        where.append(f"r.id IS {'NOT ' if revoked else ''}NULL")
    columns = """v.id, v.pair_id, prompt.text AS prompt, sp.split, n.name AS annotator, v.simulated, v.choice, v."left",
        v.milliseconds, v.repeat, v.revokes, r.id IS NOT NULL AS revoked, v.comparison_id, a.hash AS first,
        b.hash AS second, v.created_at"""
    return _page(store, columns, _LABELS, where, values, "v.id DESC", page, size)


def _filter_prompt(where: list[str], values: dict[str, Any], prompt: str, split: str | None) -> None:
    if prompt.strip():
        where.append("instr(lower(prompt.text), lower(:prompt)) > 0")
        values["prompt"] = prompt.strip()
    if split is not None:
        where.append("sp.split = :split")
        values["split"] = split


def _page(
    store: Storage,
    columns: str,
    source: str,
    where: list[str],
    values: dict[str, Any],
    order: str,
    page: int,
    size: int,
) -> dict:
    # every part of the statement is a constant of this file; what a person typed travels in `values`
    size = max(1, min(size, 500))
    rest = f"{source} WHERE {' AND '.join(where)}"
    with store.reader() as session:
        total = session.execute(text(f"SELECT COUNT(*) {rest}"), values).scalar()
        pages = max(1, -(-total // size))
        page = max(1, min(page, pages))
        listed = f"SELECT {columns} {rest} ORDER BY {order} LIMIT :size OFFSET :skip"
        rows = session.execute(text(listed), {**values, "size": size, "skip": (page - 1) * size}).mappings()
        return {"rows": [_plain(dict(row)) for row in rows], "total": total, "page": page, "pages": pages}


def _plain(row: dict) -> dict:
    if "provenance" in row:
        row["provenance"] = json.loads(row["provenance"])
    for flag in ("simulated", "repeat", "revoked"):
        if flag in row:
            row[flag] = bool(row[flag])
    return row
