"""Writing a study as JSONL + pictures, to a folder or a zip; jsonl_in.py describes the format."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from sqlalchemy import text

from ..db import Storage
from ..studies import get_study
from . import comparisons
from .files import MOST_PICTURES
from .items import FORMAT_VERSION, ExchangeError, Label
from .jsonl_in import FORMAT

_PAIRS = text("""SELECT pair.id, prompt.text AS prompt, sp.split, a.hash AS first, b.hash AS second,
        a.provenance AS first_provenance, b.provenance AS second_provenance, c.seed AS comparison, cp.a_is, cp.seed,
        cp.position
    FROM pair JOIN prompt ON prompt.id = pair.prompt_id
    JOIN study_prompt sp ON sp.prompt_id = pair.prompt_id AND sp.study_id = :study
    JOIN picture a ON a.id = pair.first_id JOIN picture b ON b.id = pair.second_id
    LEFT JOIN comparison_pair cp ON cp.pair_id = pair.id
    LEFT JOIN comparison c ON c.id = cp.comparison_id AND c.study_id = :study
    WHERE pair.id > :after
    AND pair.id NOT IN (SELECT cp.pair_id FROM comparison_pair cp JOIN comparison c ON c.id = cp.comparison_id
        WHERE c.state IN ('preparing', 'voting'))
    AND (EXISTS (SELECT 1 FROM study_pair q WHERE q.study_id = :study AND q.pair_id = pair.id)
        OR EXISTS (SELECT 1 FROM preference p WHERE p.study_id = :study AND p.pair_id = pair.id))
    ORDER BY pair.id LIMIT 100""")

_LABELS = text("""SELECT n.name AS annotator, n.kind, p.choice, p."left", p.milliseconds, p.created_at, p.client_key,
        p.repeat, old.client_key AS revokes, c.seed AS comparison
    FROM preference p JOIN annotator n ON n.id = p.annotator_id LEFT JOIN preference old ON old.id = p.revokes
    LEFT JOIN comparison c ON c.id = p.comparison_id
    WHERE p.study_id = :study AND p.pair_id = :pair ORDER BY p.id""")


def _pages(store: Storage, study_id: int) -> Iterator[list[dict]]:
    """The study's pairs with all their labels, a hundred at a time, each page from its own short transaction."""
    after = 0
    while True:
        with store.reader() as session:
            page = [dict(row) for row in session.execute(_PAIRS, {"study": study_id, "after": after}).mappings()]
            for row in page:
                found = session.execute(_LABELS, {"study": study_id, "pair": row["id"]}).mappings()
                row["labels"] = [_label(each) for each in found]
                place = {name: row.pop(name) for name in ("a_is", "seed", "position")}
                key = comparisons.key_of(row["comparison"])
                row["comparison"] = None if key is None else {"key": key, **place}
        if not page:
            return
        yield page
        after = page[-1]["id"]


def _label(row: Mapping) -> dict:
    known = {**row, "repeat": bool(row["repeat"]), "comparison": comparisons.key_of(row["comparison"])}
    return asdict(Label(**known))


def export_jsonl(store: Storage, study_id: int, target: str | Path) -> Iterator[dict]:
    """Write the study to a folder, or to a zip if the name ends in .zip; yields {done, labels, path, finished} per
    page of pairs. The target appears under its name only when it is complete; it must not exist before."""
    target = Path(target)
    study = get_study(store, study_id)
    if target.exists():
        raise ExchangeError(f"{target} exists already; choose another name.")
    partial = target.with_name(f".{target.name}.partial")
    _discard(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    out = _ZipOut(partial) if target.suffix == ".zip" else _FolderOut(partial)
    lines = partial.with_name(f"{partial.name}.jsonl")
    done = labels = 0
    written: set[bytes] = set()
    try:
        with out, lines.open("w", encoding="utf-8") as file:
            about = study.model_dump(include={"name", "base", "question", "salt", "settings"})
            out.text("study.json", json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **about}, indent=1))
            for page in _pages(store, study_id):
                for row in page:
                    for side in ("first", "second"):
                        row[f"{side}_provenance"] = json.loads(row[f"{side}_provenance"])
                        row[side] = _copy(store, out, row[side], written)
                    labels += len(row["labels"])
                    file.write(json.dumps(row) + "\n")
                done += len(page)
                yield {"done": done, "labels": labels, "path": str(target), "finished": False}
            file.flush()
            out.file("pairs.jsonl", lines)
            with store.reader() as session:
                told = comparisons.finished(session, study_id)
            out.text("comparisons.jsonl", "".join(json.dumps(each) + "\n" for each in told))
        os.replace(partial, target)
    finally:
        lines.unlink(missing_ok=True)
        _discard(partial)
    yield {"done": done, "labels": labels, "path": str(target), "finished": True}


def _copy(store: Storage, out: "_ZipOut | _FolderOut", digest: str, written: set[bytes]) -> str:
    path = store.media.path(digest)
    name = f"media/{digest[:2]}/{digest[2:]}{path.suffix}"
    if bytes.fromhex(digest) not in written:
        if isinstance(out, _ZipOut) and len(written) == MOST_PICTURES:
            raise ExchangeError(f"A zip holds at most {MOST_PICTURES:,} pictures; export as parquet, or to a folder.")
        out.file(name, path)
        written.add(bytes.fromhex(digest))
    return name


def _discard(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


class _FolderOut:
    def __init__(self, root: Path):
        self.root = root

    def __enter__(self) -> "_FolderOut":
        self.root.mkdir(parents=True)
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def text(self, name: str, content: str) -> None:
        (self.root / name).write_text(content, encoding="utf-8")

    def file(self, name: str, path: Path) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


class _ZipOut:
    def __init__(self, path: Path):
        self.zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)  # pictures are compressed already

    def __enter__(self) -> "_ZipOut":
        return self

    def __exit__(self, *_error: object) -> None:
        self.zip.close()

    def text(self, name: str, content: str) -> None:
        self.zip.writestr(name, content)

    def file(self, name: str, path: Path) -> None:
        packed = zipfile.ZIP_DEFLATED if name.endswith(".jsonl") else zipfile.ZIP_STORED
        self.zip.write(path, name, compress_type=packed)
