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
    """Held-out accuracy per timestep with its interval, as `app.figures` draws it; None if it was never measured."""
    rows = [r for r in of_lrm(folder).get("heldout_by_timestep") or [] if r["accuracy"]["value"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda r: -r["t"])
    parts = {
        key: [r["accuracy"][part] for r in rows]
        for key, part in (("accuracy", "value"), ("low", "low"), ("high", "high"))
    }
    return {"lrm": name, "t": [r["t"] for r in rows], **parts}
