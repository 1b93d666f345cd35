"""What LRM checkpoints and run folders say about themselves, read for the page. Plain JSON files; imports no torch."""

import json
from pathlib import Path


def of_lrm(folder: Path) -> dict:
    """What was measured of an LRM: the result of the run that ended in this folder, else what its own file says.

    Keys, if measured: heldout and heldout_by_timestep (see lpo/calibration.py), temperature, training_pairs. Empty for
    an official checkpoint or one from the middle of a run.
    """
    result = folder.parent.parent / "result.json"
    if folder.name == "final" and result.exists():
        return json.loads(result.read_text())
    own = folder / "lrm.json"
    return json.loads(own.read_text()).get("meta", {}) if own.exists() else {}


def accuracy(folder: Path, name: str) -> dict | None:
    """Held-out accuracy per timestep with its interval, as `app.figures` draws it; None if it was never measured.

    A warm LRM has seen no label: it is shown on generated pictures that it did not train on (`labels` is False then),
    where the one made for the caption should win; that report has no interval.
    """
    report = of_lrm(folder)
    rows = [
        (r["t"], r["accuracy"]) for r in report.get("heldout_by_timestep") or [] if r["accuracy"]["value"] is not None
    ]
    labels = bool(rows)
    if not labels:
        unseen = (report.get("unseen_accuracy") or {}).get("generated", {})
        rows = [(int(t), {"value": value, "low": value, "high": value}) for t, value in unseen.items()]
    if not rows:
        return None
    rows.sort(key=lambda row: -row[0])
    parts = (("accuracy", "value"), ("low", "low"), ("high", "high"))
    values = {key: [estimate[part] for _, estimate in rows] for key, part in parts}
    return {"lrm": name, "labels": labels, "t": [t for t, _ in rows], **values}
