"""Writing a study's effective labels as Pick-a-Pic-style parquet, one row per label, ready for `datasets`.

Ties have both labels 0.5. Skip and both bad say nothing about which is better: has_label is false there, and
`lab_choice` keeps the answer. All `lab_*` columns are additions to Pick-a-Pic's, so that nothing is lost on the way
back in (see parquet_in.py).
"""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import text

from ..answers import SOFT
from ..db import Storage
from ..studies import get_study
from .items import ExchangeError

PAGE = 32  # rows of one row group: small groups keep readers of any kind within little memory
BYTES = 16 * 2**20  # of pictures in one row group, of which the writer makes copies; the row that passes it is the last

_COLUMNS = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("us")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("lab_annotator", pa.string()),
        ("lab_simulated", pa.bool_()),
        ("lab_choice", pa.string()),
        ("lab_left", pa.string()),
        ("lab_milliseconds", pa.int64()),
        ("lab_created_at", pa.float64()),
        ("lab_client_key", pa.string()),
        ("lab_repeat", pa.bool_()),
        ("lab_provenance_0", pa.string()),
        ("lab_provenance_1", pa.string()),
    ]
)

# what `datasets` reads the types of its columns from; its names are Arrow's but for these
_NAMES = {"double": "float64"}
_FEATURES = {each.name: {"dtype": _NAMES.get(str(each.type), str(each.type)), "_type": "Value"} for each in _COLUMNS}
SCHEMA = _COLUMNS.with_metadata({"huggingface": json.dumps({"info": {"features": _FEATURES}})})

# an effective label: a standing answer with no later standing answer of the same annotator to the same pair
_EFFECTIVE = """p.study_id = :study AND p.choice IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)
    AND (p.comparison_id IS NULL
        OR p.comparison_id NOT IN (SELECT id FROM comparison WHERE state IN ('preparing', 'voting')))
    AND NOT EXISTS (SELECT 1 FROM preference q WHERE q.study_id = p.study_id AND q.annotator_id = p.annotator_id
        AND q.pair_id = p.pair_id AND q.choice IS NOT NULL AND q.id > p.id
        AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = q.id))"""

_PER_PROMPT = text(f"""SELECT pair.prompt_id, COUNT(*) FROM preference p JOIN pair ON pair.id = p.pair_id
    WHERE {_EFFECTIVE} GROUP BY pair.prompt_id""")  # noqa: S608 constants only

_ROWS = text(f"""SELECT p.id, p.annotator_id, p.choice, p."left", p.milliseconds, p.created_at, p.client_key, p.repeat,
        p.simulated, n.name AS annotator, prompt.id AS prompt_id, prompt.text AS prompt, a.hash AS first,
        b.hash AS second, a.provenance AS provenance_0, b.provenance AS provenance_1,
        json_extract(a.provenance, '$.policy') AS model_0, json_extract(b.provenance, '$.policy') AS model_1
    FROM preference p JOIN annotator n ON n.id = p.annotator_id JOIN pair ON pair.id = p.pair_id
    JOIN prompt ON prompt.id = pair.prompt_id
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id
    WHERE {_EFFECTIVE} AND p.id > :after ORDER BY p.id LIMIT :limit""")  # noqa: S608 constants only


def export_parquet(store: Storage, study_id: int, target: str | Path) -> Iterator[dict]:
    """Write the file; yields {done (rows), total, path, finished}. It appears under its name when it is complete and
    must not exist before."""
    target = Path(target)
    get_study(store, study_id)  # raises for an unknown one
    if target.exists():
        raise ExchangeError(f"{target} exists already; choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with store.reader() as session:
        per_prompt = dict(session.execute(_PER_PROMPT, {"study": study_id}).tuples().all())
    done = after = 0
    try:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            while True:
                with store.reader() as session:
                    found = session.execute(_ROWS, {"study": study_id, "after": after, "limit": PAGE})
                    page = [dict(row) for row in found.mappings()]
                if not page:
                    break
                rows, size = [], 0
                for row in page:
                    rows.append(_row(store, row, per_prompt.get(row["prompt_id"], 1)))
                    size += len(rows[-1]["jpg_0"]) + len(rows[-1]["jpg_1"])
                    if size > BYTES or row is page[-1]:
                        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
                        rows, size = [], 0
                done += len(page)
                after = page[-1]["id"]
                yield {"done": done, "total": sum(per_prompt.values()), "path": str(target), "finished": False}
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    yield {"done": done, "total": done, "path": str(target), "finished": True}


def _row(store: Storage, row: dict, per_prompt: int) -> dict:
    label = SOFT.get(row["choice"])
    best = {"first": row["first"], "second": row["second"], "tie": "tie"}.get(row["choice"], "")
    return {
        "are_different": True,
        "best_image_uid": best,
        "caption": row["prompt"],
        "created_at": datetime.fromtimestamp(row["created_at"], UTC).replace(tzinfo=None),
        "has_label": label is not None,
        "image_0_uid": row["first"],
        "image_0_url": "",
        "image_1_uid": row["second"],
        "image_1_url": "",
        "jpg_0": store.media.path(row["first"]).read_bytes(),
        "jpg_1": store.media.path(row["second"]).read_bytes(),
        "label_0": 0.5 if label is None else label,
        "label_1": 0.5 if label is None else 1.0 - label,
        "model_0": row["model_0"] or "",
        "model_1": row["model_1"] or "",
        "ranking_id": row["id"],
        "user_id": row["annotator_id"],
        "num_example_per_prompt": per_prompt,
        "lab_annotator": row["annotator"],
        "lab_simulated": bool(row["simulated"]),
        "lab_choice": row["choice"],
        "lab_left": row["left"],
        "lab_milliseconds": row["milliseconds"],
        "lab_created_at": row["created_at"],
        "lab_client_key": row["client_key"],
        "lab_repeat": bool(row["repeat"]),
        "lab_provenance_0": row["provenance_0"],
        "lab_provenance_1": row["provenance_1"],
    }
