"""Reading JSONL + pictures: a folder, a zip, or a single .jsonl beside its pictures. The format:

    study.json     {"format": "preference-lab", "format_version": 2, name, base, question, salt, settings}
    pairs.jsonl    one pair a line: {prompt, first, second, first_provenance, second_provenance, split, labels: [...],
                   comparison: {key, a_is, seed, position} if a blind comparison asked it}
    comparisons.jsonl   see comparisons.py; absent before format 2
    media/ab/cd... the pictures, named by content hash

Every row of the preference table travels, undone ones too. Simple files are taken as well: lines with prompt, first,
second (paths beside the file) and `choice`, or `target` 1 / 0.5 / 0.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import IO

from .files import DAMAGED, Files, fingerprint
from .items import FORMAT_VERSION, ExchangeError, Item, Label, Rejected, place_of, provenance_of

FORMAT = "preference-lab"
MAX_LINE = 4 * 2**20
MAX_STUDY = 2**20
MAX_COMPARISONS = 32 * 2**20
TARGETS = {1.0: "first", 0.5: "tie", 0.0: "second"}
_LABEL_FIELDS = {each.name for each in fields(Label)}


class Source:
    """pairs.jsonl of a folder or a zip, or a single .jsonl file beside its pictures."""

    kind = "jsonl"

    def __init__(self, path: Path):
        self.path, self.pairs = path, "pairs.jsonl"
        single = path.suffix in (".jsonl", ".json")
        if single:
            self.pairs = path.name
        self.files = Files(path.parent if single else path)
        if not self.files.exists(self.pairs):
            self.__exit__()
            raise ExchangeError(f"{path.name} has no pairs.jsonl at its top; choose an exported study.")

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_error: object) -> None:
        self.files.close()

    def fingerprint(self) -> str:
        return fingerprint([self.path / self.pairs if self.path.is_dir() else self.path])

    def study(self) -> dict:
        """name, base, question, salt and settings of study.json, or only a name made from the file's."""
        if not self.files.exists("study.json"):
            return {"name": self.path.stem or "Imported"}
        try:
            described = json.loads(self.files.read("study.json", MAX_STUDY))
        except (ValueError, RecursionError) as error:
            raise ExchangeError(f"study.json in {self.path.name} cannot be read ({error}); export it again.") from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ExchangeError(f"study.json in {self.path.name} was not written by Preference Lab; leave it out.")
        if not isinstance(described.get("format_version"), int) or described["format_version"] > FORMAT_VERSION:
            raise ExchangeError(
                f"{self.path.name} has format {described.get('format_version')}, this version reads up to "
                f"{FORMAT_VERSION}; update Preference Lab."
            )
        texts = {key: described.get(key) for key in ("name", "base", "question", "salt")}
        if not all(isinstance(value, str) and 1 <= len(value) <= 500 for value in texts.values()):
            raise ExchangeError(f"study.json in {self.path.name} needs name, base, question and salt as texts.")
        settings = described.get("settings")
        return {**texts, "settings": settings if isinstance(settings, dict) else {}}

    def total(self) -> int:
        """Lines of pairs.jsonl that are not empty."""
        try:
            return sum(1 for _ in self._lines())
        except ExchangeError as error:
            raise ExchangeError(f"{self.pairs} in {self.path.name} is damaged; export it again.") from error

    def items(self, skip: int = 0) -> Iterator[Item | Rejected]:
        """What each line says, from line `skip` + 1 on; empty lines do not count."""
        for line in islice(self._lines(), skip, None):
            try:
                if line is None:
                    raise Rejected("the line is longer than 4 MB")
                yield self._item(line)
            except Rejected as reason:
                yield reason

    def _lines(self) -> Iterator[bytes | None]:
        """The lines that are not empty, None for those that are too long."""
        with self.files.open(self.pairs) as file:
            while line := self._line(file):
                whole = line.endswith(b"\n") or len(line) < MAX_LINE
                rest = line
                while not rest.endswith(b"\n") and (rest := self._line(file)):
                    pass
                if not whole or line.strip():
                    yield line if whole else None

    def _line(self, file: IO[bytes]) -> bytes:
        try:
            return file.readline(MAX_LINE)
        except DAMAGED as error:
            raise ExchangeError(
                f"{self.pairs} in {self.path.name} is damaged ({error}); what came before the damage is imported."
            ) from error

    def _item(self, line: bytes) -> Item:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Rejected("the line is not JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise Rejected("the line has no prompt")
        imported = {"imported": self.path.name}
        first, second = (provenance_of(row.get(f"{side}_provenance", imported)) for side in ("first", "second"))
        pictures = [self.files.picture(row.get(side)) for side in ("first", "second")]
        place = place_of(row.get("comparison"))
        return Item(row["prompt"], *pictures, first, second, self._labels(row, pictures), place)

    def comparisons(self) -> Iterator[dict | Rejected]:
        """The lines of comparisons.jsonl, if there is one; the import holds them all."""
        if not self.files.exists("comparisons.jsonl"):
            return
        read = 0
        with self.files.open("comparisons.jsonl") as file:
            while line := self._line(file):
                read += len(line)
                if read > MAX_COMPARISONS:
                    raise ExchangeError(
                        f"comparisons.jsonl in {self.path.name} has more than {MAX_COMPARISONS // 2**20} MB; leave it "
                        "out, the votes of the comparisons are in pairs.jsonl."
                    )
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else Rejected("a line of comparisons.jsonl is not a JSON object")

    def _labels(self, row: dict, pictures: list[bytes]) -> list[Label]:
        if "labels" in row:
            listed = row["labels"]
            if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
                raise Rejected("labels is not a list of objects")
            return [_label(each) for each in listed]
        choice = row.get("choice")
        if choice is None and "target" in row:
            target = row["target"]
            if isinstance(target, bool) or not isinstance(target, int | float) or target not in TARGETS:
                raise Rejected("target is not 1, 0.5 or 0: a soft label has no single annotator")
            choice = TARGETS[target]
        if choice is None:
            return []
        annotator = row.get("annotator", f"import {self.path.stem}")
        contents = (hashlib.sha256(data).hexdigest() for data in pictures)
        key = "\n".join(map(str, (annotator, row["prompt"], *contents, choice)))
        kind = "simulated" if row.get("simulated") is True else "human"
        return [Label(annotator=annotator, choice=choice, kind=kind, client_key=_digest(key))]


def _label(row: dict) -> Label:
    known = {key: value for key, value in row.items() if key in _LABEL_FIELDS}
    if not {"annotator", "client_key"} <= known.keys():
        raise Rejected("label: it has no annotator or no client key")
    return Label(**{"choice": None, **known})


def _digest(text: str) -> str:
    return "import:" + hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
