"""Multi-preference consistent filtering: which imported labels agree with other judges of pictures. Pure maths.

    mask = keeps(PRESETS["MPCF rule 2"], ties, {"aesthetic": [...], "clip": [...], "vqa": [...]})

A gap is the score of the chosen picture minus the score of the other one, of a tie the first minus the second. A
chosen-rejected pair is kept if every gap lies *above* its gate, a tie if every gap lies *below* its gate.
Source: the LPO paper (arXiv 2502.01051) and the thresholds of the official code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .data_models import GAP_COLUMNS
from .db import StorageError

FORMAT_VERSION = 1
WORDS = {"aesthetic": "aesthetic", "clip": "CLIP", "vqa": "VQA", "pick": "PickScore"}
LARGEST = 1000.0


class RuleError(StorageError):
    """A rule that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Gate:
    """What one score asks of a pair. `above`: a chosen picture's gap must be greater; `tie_below`: a tie's gap must be
    smaller."""

    on: bool = True
    above: float = 0.0
    tie_below: float = 0.0


@dataclass(frozen=True)
class Rule:
    """Gates by score; a score without a gate asks nothing.

    `tie_distance` compares a tie's |gap|. Differs from the paper: the official code compares the signed gap, so that a
    tie whose second picture is far better passes; off is as published. `keep_ties` off drops every tie.
    """

    name: str
    gates: Mapping[str, Gate]
    keep_ties: bool = True
    tie_distance: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.name.strip()) <= 80:
            raise RuleError("A filter's name has 1 to 80 characters; choose another one.")
        for column, gate in self.gates.items():
            if column not in GAP_COLUMNS:
                raise RuleError(f"{column!r} is no score of this lab; allowed are {', '.join(GAP_COLUMNS)}.")
            for value in (gate.above, gate.tie_below):
                if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > LARGEST:
                    allowed = f"a number from {-LARGEST:g} to {LARGEST:g}"
                    raise RuleError(f"The gate of {WORDS[column]} is {value!r}; it must be {allowed}.")

    @property
    def active(self) -> list[str]:
        """The scores that decide, in the order of GAP_COLUMNS."""
        return [column for column in GAP_COLUMNS if column in self.gates and self.gates[column].on]


def _published(name: str, aesthetic: float) -> Rule:
    gates = {"aesthetic": Gate(True, aesthetic, 0.2), "clip": Gate(True, 0.0, 0.03), "vqa": Gate(True, 0.0, 0.07)}
    return Rule(name, gates)


PRESETS = {
    rule.name: rule
    for rule in (_published("MPCF rule 1", 0.0), _published("MPCF rule 2", -0.5), _published("MPCF rule 3", -1.0))
}
DEFAULT = "MPCF rule 2"  # the one that the published LRMs were trained with


def passes(rule: Rule, ties: Sequence[bool], gaps: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """For every active score whether each label passes its gate alone, (N,) bool; a missing gap (nan) never passes."""
    ties = np.asarray(ties, bool)
    out = {}
    for column in rule.active:
        gate, gap = rule.gates[column], np.asarray(gaps[column], np.float64)
        distance = np.abs(gap) if rule.tie_distance else gap
        out[column] = np.where(ties, distance < gate.tie_below, gap > gate.above)
    return out


def keeps(rule: Rule, ties: Sequence[bool], gaps: Mapping[str, Sequence[float]]) -> np.ndarray:
    """(N,) bool: whether each label trains under the rule."""
    ties = np.asarray(ties, bool)
    kept = np.ones(len(ties), bool) if rule.keep_ties else ~ties
    for passed in passes(rule, ties, gaps).values():
        kept &= passed
    return kept


def without(rule: Rule, missing: Sequence[str]) -> Rule:
    """The rule with the gates of scores that nobody computed switched off."""
    return replace(rule, gates={c: replace(g, on=g.on and c not in missing) for c, g in rule.gates.items()})


def to_json(rule: Rule) -> dict:
    return {"format_version": FORMAT_VERSION, **asdict(rule)}


def from_json(data: dict) -> Rule:
    """The rule that `to_json` wrote; raises RuleError for one of a newer version."""
    if data.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise RuleError(f"This filter has format {data['format_version']}; update Preference Lab to read it.")
    gates = {column: Gate(**gate) for column, gate in data["gates"].items()}
    return Rule(data["name"], gates, data["keep_ties"], data["tie_distance"])


def words(rule: Rule) -> str:
    """The rule in one line: 'aesthetic > -0.5, CLIP > 0, VQA > 0; ties aesthetic < 0.2, CLIP < 0.03, VQA < 0.07'."""
    if not rule.active:
        return "every pair" + ("" if rule.keep_ties else "; no ties")
    chosen = ", ".join(f"{WORDS[c]} > {rule.gates[c].above:g}" for c in rule.active)
    if not rule.keep_ties:
        return f"{chosen}; no ties"
    shape = "|{}| < {:g}" if rule.tie_distance else "{} < {:g}"
    return f"{chosen}; ties " + ", ".join(shape.format(WORDS[c], rule.gates[c].tie_below) for c in rule.active)
