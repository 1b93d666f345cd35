"""What travels between a file and the database: one pair with its pictures and labels."""

import json
from dataclasses import dataclass, field

from ..db import StorageError
from ..models import ANNOTATOR_KINDS, CHOICES, SIDES

FORMAT_VERSION = 2  # 2: comparisons travel too; files of version 1 have none and are read as they are
MAX_PROVENANCE = 20_000


class ExchangeError(StorageError):
    """A file that cannot be imported or written, in one sentence."""


class Rejected(StorageError):
    """One row that cannot be taken; the text is the reason that is counted."""


@dataclass
class Label:
    """One answer on its way in or out; `revokes` is the client key of another answer to the same pair, `comparison`
    the key of the blind comparison that asked."""

    annotator: str
    choice: str | None
    kind: str = "human"
    left: str | None = None
    milliseconds: int | None = None
    created_at: float = 0.0
    client_key: str = ""
    repeat: bool = False
    revokes: str | None = None
    comparison: str | None = None

    def check(self) -> None:
        """Raises Rejected for anything that `labels.vote` would not have written."""
        if not _text(self.annotator, 80):
            raise Rejected("label: the annotator's name needs 1 to 80 characters")
        if self.kind not in ANNOTATOR_KINDS:
            raise Rejected(f"label: the annotator is {' or '.join(ANNOTATOR_KINDS)}")
        if self.choice not in (*CHOICES, None) or (self.choice is None and not self.revokes):
            raise Rejected(f"label: the choice is one of {', '.join(CHOICES)}")
        if self.left not in (*SIDES, None):
            raise Rejected("label: the left picture is first or second")
        if self.milliseconds is not None and not _number(self.milliseconds, 0, 2**31):
            raise Rejected("label: milliseconds is a whole number of 0 or more")
        if not _number(self.created_at, 0, 2**40):
            raise Rejected("label: created_at is seconds since 1970")
        if not _text(self.client_key, 200) or not (self.revokes is None or _text(self.revokes, 200)):
            raise Rejected("label: a client key needs 1 to 200 characters")
        if self.comparison is not None and not _text(self.comparison, 40):
            raise Rejected("label: the key of a comparison needs 1 to 40 characters")


@dataclass(frozen=True)
class Place:
    """A pair's place in a blind comparison: the comparison's key, whose picture is first, the seed, the order."""

    key: str
    a_is: str
    seed: int
    position: int


@dataclass
class Item:
    """One pair on its way in: the bytes of both pictures, where they come from, and its labels in order."""

    prompt: str
    first: bytes
    second: bytes
    first_provenance: dict
    second_provenance: dict
    labels: list[Label] = field(default_factory=list)
    place: Place | None = None


def place_of(value: object) -> Place | None:
    """The place that a line of pairs.jsonl names; raises Rejected."""
    if value is None:
        return None
    if isinstance(value, dict) and value.get("a_is") in SIDES and _text(value.get("key"), 40):
        seed, position = value.get("seed"), value.get("position")
        if all(_number(x, 0, 2**62) and isinstance(x, int) for x in (seed, position)):
            return Place(value["key"], value["a_is"], seed, position)
    raise Rejected("the line's place in a comparison is wrong")


def provenance_of(value: object) -> dict:
    """The value if it is a JSON object of reasonable size; raises Rejected."""
    try:
        if isinstance(value, dict) and len(json.dumps(value)) <= MAX_PROVENANCE:
            return value
    except RecursionError:
        pass
    raise Rejected(f"the provenance of a picture is no object of at most {MAX_PROVENANCE} characters")


def _text(value: object, longest: int) -> bool:
    """A text that SQLite can hold: a lone surrogate has no UTF-8."""
    if not isinstance(value, str) or not 1 <= len(value.strip()) <= longest:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
