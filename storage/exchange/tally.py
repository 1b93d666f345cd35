"""What an import has done so far: counted, explained, and how long the rest will take."""

import time
from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 20
REASONS = 50  # different ones that are counted apart


@dataclass
class Tally:
    """What an import has done so far; `report()` is what is stored, `state()` what its generator yields."""

    import_id: int | None  # both None while an import waits for another one of the same file
    study_id: int | None
    total: int | None
    done: int = 0
    pairs: int = 0
    labels: int = 0
    duplicates: int = 0
    unlabelled: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    comparisons: dict[str, int] = field(default_factory=dict)  # key -> id of those that came with the file
    resumed: int = 0
    started: float = field(default_factory=time.monotonic)

    def reject(self, reason: str, row: int) -> None:
        if reason not in self.rejected and len(self.rejected) >= REASONS:
            reason = "other reasons (the list of rejected rows has them)"
        self.rejected[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"row {row}: {reason}")

    def report(self) -> dict:
        """{done (rows), pairs and labels (new ones), duplicates (rows that brought nothing new), unlabelled (pairs
        that came without a label), rejected: {reason: rows}, examples}."""
        return {
            "done": self.done, "pairs": self.pairs, "labels": self.labels, "duplicates": self.duplicates,
            "unlabelled": self.unlabelled, "rejected": dict(self.rejected), "examples": list(self.examples),
        }  # fmt: skip

    def state(self, finished: bool = False) -> dict:
        """report() with {import_id, study_id, total (None if unknown), resumed (rows that an earlier, killed or stopped
        run had done), left_s (seconds left at this run's speed, None if nobody knows), waiting (False), finished}."""
        new = self.done - self.resumed
        seconds = time.monotonic() - self.started
        left = None if not new or self.total is None else seconds * max(0, self.total - self.done) / new
        return {
            "import_id": self.import_id, "study_id": self.study_id, "total": self.total, **self.report(),
            "resumed": self.resumed, "left_s": left, "waiting": False, "finished": finished,
        }  # fmt: skip
