"""What LRM checkpoints and run folders say about themselves, read for the page. Plain JSON files; imports no torch."""

import json
from pathlib import Path


def meta(folder: Path) -> dict:
    """The `meta` of an LRM folder of our own format; empty if it says nothing (an official checkpoint)."""
    path = folder / "lrm.json"
    return json.loads(path.read_text()).get("meta", {}) if path.exists() else {}


def accuracy(folder: Path, name: str) -> dict | None:
    """Held-out accuracy per timestep with its interval, as `app.figures` draws it; None if it was never measured."""
    rows = [r for r in heldout(meta(folder)) if r["accuracy"]["value"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda r: -r["t"])
    return {
        "lrm": name,
        "t": [r["t"] for r in rows],
        "accuracy": [r["accuracy"]["value"] for r in rows],
        "low": [r["accuracy"]["low"] for r in rows],
        "high": [r["accuracy"]["high"] for r in rows],
    }


def heldout(report: dict) -> list[dict]:
    """The rows {"t", "pairs", "accuracy", "log_loss", "ece"} of a report, each value with its interval."""
    return (report.get("heldout") or {}).get("timesteps", [])
