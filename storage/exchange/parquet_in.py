"""Reading Pick-a-Pic-style parquet: caption, jpg_0 and jpg_1 (bytes), label_0 and label_1 (1, 0.5, 0), has_label,
user_id and the rest. Files written by parquet_out.py also have `lab_*` columns, which bring back what Pick-a-Pic
cannot say: skip and both bad, simulated annotators, times and sides, provenance."""

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..media import MAX_BYTES
from . import pages
from .files import fingerprint
from .items import ExchangeError, Item, Label, Rejected, provenance_of

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
URLS = {"jpg_0": "image_0_url", "jpg_1": "image_1_url"}  # some editions have only these: nothing is ever fetched
USED = (
    *NEEDED, *URLS.values(), "has_label", "user_id", "ranking_id", "created_at", "model_0", "model_1", "lab_annotator",
    "lab_simulated", "lab_choice", "lab_left", "lab_milliseconds", "lab_created_at", "lab_client_key", "lab_repeat",
    "lab_provenance_0", "lab_provenance_1",
)  # fmt: skip
ROWS = 4  # rows decoded at a time: two pictures each
LARGE = 16 * 2**20  # pictures in pages above this are not read by pyarrow, which would hold the page twice
TEXTS = 96 * 2**20  # all that pyarrow may have to hold: a page of each column
CHOICE = {(1.0, 0.0): "first", (0.0, 1.0): "second", (0.5, 0.5): "tie"}


class Source:
    """One .parquet file, or all of a folder in order of name."""

    kind = "parquet"

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self.rows = sum(self._check(file) for file in self.files)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def study(self) -> dict:
        return {"name": self.path.stem or "Imported"}

    def fingerprint(self) -> str:
        return fingerprint(self.files)

    def total(self) -> int:
        return self.rows

    def _check(self, file: Path) -> int:
        """The number of rows; refuses what is not such a file before a single picture is read."""
        with self._open(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [name for name in NEEDED if name not in names and URLS.get(name) not in names]
            if missing:
                raise ExchangeError(
                    f"{file.name} lacks the column {missing[0]}; Pick-a-Pic parquet has {', '.join(NEEDED)}."
                )
            return parquet.metadata.num_rows

    def _open(self, file: Path) -> pq.ParquetFile:
        try:
            # buffered and without pre-buffering: memory follows the page, not the row group
            return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowException, OSError) as error:
            raise ExchangeError(f"{file.name} is not a readable parquet file; download or export it again.") from error

    def items(self, skip: int = 0) -> Iterator[Item | Rejected]:
        """What each row says, from row `skip` + 1 of all files on; whole files and row groups are skipped unread."""
        for file in self.files:
            with self._open(file) as parquet:
                if skip >= parquet.metadata.num_rows:
                    skip -= parquet.metadata.num_rows
                    continue
                groups = list(range(parquet.metadata.num_row_groups))
                while skip >= parquet.metadata.row_group(groups[0]).num_rows:
                    skip -= parquet.metadata.row_group(groups.pop(0)).num_rows
                for group in groups:
                    for row in self._rows(file, parquet, group, skip):
                        try:
                            yield self._item(row)
                        except Rejected as reason:
                            yield reason
                    skip = 0

    def _rows(self, file: Path, parquet: pq.ParquetFile, group: int, skip: int) -> Iterator[dict]:
        """The rows of a row group behind the first `skip`; pictures of large pages come from a stream, one by one."""
        columns = [name for name in USED if name in parquet.schema_arrow.names]
        try:
            streams = self._streams(file, parquet, group)
            columns = [name for name in columns if name not in streams]
            for batch in parquet.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    row |= {name: next(values) for name, values in streams.items()}
                    if skip > 0:
                        skip -= 1
                    else:
                        yield row
        except ExchangeError:
            raise
        except pages.NotRead as error:
            raise ExchangeError(
                f"{file.name} has {error} in pages of more than {LARGE // 2**20} MB, which is not read: write it again "
                "in row groups of 100 rows, or with ZSTD compression and plain encoding."
            ) from error
        except (*pages.BROKEN, StopIteration) as error:
            raise ExchangeError(
                f"{file.name} is damaged ({str(error)[:100]}); the rows before the damage are imported."
            ) from error

    def _streams(self, file: Path, parquet: pq.ParquetFile, group: int) -> dict[str, Iterator[bytes | None]]:
        """{picture column: its values} for those with large pages. Raises ExchangeError if the rest is large, too."""
        streams, metadata, texts = {}, parquet.metadata.row_group(group), 0
        with file.open("rb") as heads:
            for place in range(metadata.num_columns):
                chunk, column = metadata.column(place), parquet.schema.column(place)
                name, _, part = chunk.path_in_schema.partition(".")
                size = max((page.size for page in pages.pages(heads, chunk)), default=0) if name in USED else 0
                of_bytes = column.physical_type == "BYTE_ARRAY" and column.max_repetition_level == 0
                if size > LARGE and name in URLS and part in ("", "bytes") and of_bytes:
                    streams[name] = pages.values(file, chunk, column.max_definition_level, MAX_BYTES)
                else:
                    texts += size
        if texts > TEXTS:
            raise ExchangeError(
                f"{file.name} has pages of {texts / 2**20:.0f} MB in all beside its pictures; at most "
                f"{TEXTS // 2**20} MB are read, so write it again in row groups of 100 rows."
            )
        return streams

    def _item(self, row: dict) -> Item:
        if not isinstance(row["caption"], str):
            raise Rejected("the row has no caption")
        pictures = [_bytes(row.get(name), row.get(url)) for name, url in URLS.items()]
        provenances = [self._provenance(row, number) for number in (0, 1)]
        return Item(row["caption"], *pictures, *provenances, self._labels(row, pictures))

    def _provenance(self, row: dict, number: int) -> dict:
        stored = row.get(f"lab_provenance_{number}")
        if stored is not None:
            try:
                return provenance_of(json.loads(stored))
            except (ValueError, TypeError, RecursionError) as error:
                raise Rejected("the provenance of a picture is not JSON") from error
        model = row.get(f"model_{number}")
        return {"imported": self.path.name, **({"model": model} if isinstance(model, str) and model else {})}

    def _labels(self, row: dict, pictures: list[bytes]) -> list[Label]:
        if row.get("lab_client_key") is not None:
            return [
                Label(
                    annotator=row.get("lab_annotator"),
                    kind="simulated" if row.get("lab_simulated") else "human",
                    choice=row.get("lab_choice"),
                    left=row.get("lab_left"),
                    milliseconds=row.get("lab_milliseconds"),
                    created_at=row.get("lab_created_at") or 0.0,
                    client_key=row["lab_client_key"],
                    repeat=bool(row.get("lab_repeat")),
                )
            ]
        if row.get("has_label") is False:
            return []
        choice = CHOICE.get((row["label_0"], row["label_1"]))
        if choice is None:
            raise Rejected("label_0 and label_1 are not 1 and 0, 0 and 1, or 0.5 and 0.5")
        user = row.get("user_id")
        names = (row["caption"], *(hashlib.sha256(each).hexdigest() for each in pictures), user, row.get("ranking_id"))
        key = hashlib.blake2b("\n".join(map(str, names)).encode(errors="replace"), digest_size=16).hexdigest()
        when = row.get("created_at")
        return [
            Label(
                annotator=f"Pick-a-Pic user {user}" if user is not None else "Pick-a-Pic",
                choice=choice,
                created_at=max(0.0, when.timestamp()) if isinstance(when, datetime) else 0.0,
                client_key=f"pickapic:{key}",
            )
        ]


def _bytes(value: object, url: object) -> bytes:
    """The picture's bytes; `datasets` may have wrapped them as {"bytes": ..., "path": ...}."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes) and len(value) > MAX_BYTES:
        raise Rejected(f"a picture is larger than {MAX_BYTES // 2**20} MB")
    if not isinstance(value, bytes) or not value:
        if isinstance(url, str) and url:
            raise Rejected("a picture is given by its URL only, and nothing is fetched from the network")
        raise Rejected("a picture is missing")
    return value
