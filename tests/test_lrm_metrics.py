"""Whatever a training logs is explained in docs/metrics.md: keys are read from the source and from a result."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from lpo.calibration import describe

ROOT = Path(__file__).parent.parent
DOCUMENTED = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "metrics.md").read_text()))
# dicts that are not metrics: adapter.json, the saved state, and what an iteration gathers before it becomes metrics
SKIP = {"save", "save_state", "_sample", "load_state", "state", "measure_reference"}


def logged(file: str) -> set[str]:
    """String keys of dict literals, and of assignments `metrics["key"] = ...`, outside of SKIP."""
    found: set[str] = set()
    for function in ast.walk(ast.parse((ROOT / file).read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name in SKIP:
            continue
        for node in ast.walk(function):
            keys: list[ast.expr | None] = node.keys if isinstance(node, ast.Dict) else []
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("metrics", "result"):
                keys = [node.slice]
            found |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return found


@pytest.mark.parametrize("file, some", [("lpo/lrm_trainer.py", {"loss", "grad_norm", "heldout_by_timestep"}),
                                        ("lpo/lpo_metrics.py", {"clamp_fraction", "kept_by_t", "drift"}),
                                        ("lpo/evaluation.py", {"diversity"})])
def test_every_logged_key_is_in_the_glossary(file: str, some: set[str]) -> None:
    keys = {key for key in logged(file) if re.fullmatch(r"[a-z_]+", key)}
    assert some <= keys  # the reading of the source works
    missing = keys - DOCUMENTED - NOT_METRICS
    assert not missing, f"{file} logs {sorted(missing)}: explain them in docs/metrics.md"


def test_every_key_of_a_measurement_is_in_the_glossary() -> None:
    found = describe(np.ones(3), np.ones(3), np.ones(3), ["a", "b", "c"])
    keys = set(found) | {key for value in found.values() if isinstance(value, dict) for key in value}
    assert keys <= DOCUMENTED


# keys of dict literals in the trainers that reach neither metrics.jsonl nor result.json
NOT_METRICS = {"params", "peak", "weights", "prompts", "text_projection"}
