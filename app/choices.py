"""What a person can choose from: policies (the base and its adapters) and LRMs, by name, as dropdown choices.

A choice's value is a short text that survives a reload: "base", "scenes", or a checkpoint's id.
"""

from pathlib import Path

from app.lab import ROOT, Lab
from storage import checkpoints as stored
from storage.models import Checkpoint

WARM_LRM = ROOT / "lpo" / "scenes" / "weights" / "lrm"
BASE, WARM = "base", "scenes"


def checkpoints(lab: Lab, kind: str) -> list[Checkpoint]:
    """The visible checkpoints of a kind ("adapter" or "lrm"): newest run first, its end before its earlier steps."""
    rows = stored.list_checkpoints(lab.store, kind)
    runs = list(dict.fromkeys(row.job_id or row.path for row in rows))
    return sorted(
        rows, key=lambda row: (runs.index(row.job_id or row.path), not row.meta.get("final"), -(row.step or 0))
    )


def policies(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of the study's base and of all adapters."""
    return [("base", BASE), *((row.name, str(row.id)) for row in checkpoints(lab, "adapter"))]


def policy(lab: Lab, value: str, strength: float = 1.0) -> dict:
    """The Policy (plain JSON values) behind a choice: an adapter comes with the ones that it was trained on top of.

    `strength` is that of the chosen adapter; the ones below it keep what they were trained with.
    """
    if value == BASE:
        return {"base": lab.current_study().base, "adapters": []}
    row = _row(lab, value, "adapter")
    below = row.meta.get("policy")
    if below is None:
        below = policy(lab, str(row.parent_id) if _is_adapter(lab, row.parent_id) else BASE)
    return {**below, "adapters": [*below["adapters"], {"path": row.path, "strength": strength}]}


def lrms(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of all LRMs, newest first; the shipped one last, if it fits the study's base."""
    rows = [(row.name, str(row.id)) for row in checkpoints(lab, "lrm")]
    return rows + ([("Scenes, as shipped", WARM)] if lab.current_study().base == "scenes" else [])


def lrm(lab: Lab, value: str) -> str:
    """The folder, or the alias "scenes", behind a choice."""
    return WARM if value == WARM else _row(lab, value, "lrm").path


def lrm_folder(path: str) -> Path:
    """The folder of an LRM that is named by its folder or by the alias."""
    return WARM_LRM if path == WARM else Path(path)


def _row(lab: Lab, value: str, kind: str) -> Checkpoint:
    with lab.store.reader() as session:
        row = session.get(Checkpoint, int(value)) if str(value).isdigit() else None
    if row is None or row.kind != kind:
        raise ValueError(f"The chosen {kind} ({value!r}) is gone; choose another one from the list.")
    return row


def _is_adapter(lab: Lab, checkpoint_id: int | None) -> bool:
    with lab.store.reader() as session:
        row = session.get(Checkpoint, checkpoint_id) if checkpoint_id is not None else None
    return row is not None and row.kind == "adapter"
