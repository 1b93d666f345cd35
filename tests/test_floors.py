"""The floors of the house, read from the imports: who may know whom, and who may import torch."""

import ast
import dataclasses
from pathlib import Path

import pytest

from lpo.config import CONFIGS, Search

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as full dotted names (`from a import b` gives a and a.b)."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def local_module(name: str) -> Path | None:
    """The file of a dotted name of this repository, or None."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def reachable(start: Path) -> set[Path]:
    """Every file of the repository that importing `start` may import (package __init__ files included)."""
    seen, queue = set(), [start]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                module = local_module(".".join(parts[:length]))
                if module is not None and module not in seen:
                    queue.append(module)
    return seen


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("storage", HEAVY | {"gradio", "lpo", "app"}),
        ("lpo", {"gradio", "sqlmodel", "sqlalchemy", "storage", "app"}),
    ],
)
def test_rooms_know_only_those_below(folder, forbidden):
    assert files(folder)
    wrong = {str(path.relative_to(ROOT)): tops(path) & forbidden for path in files(folder)}
    assert {path: names for path, names in wrong.items() if names} == {}


def is_worker(path: Path) -> bool:
    return path.parent == ROOT / "app" and (path.stem == "worker" or path.stem.startswith("worker_"))


def test_in_app_only_the_worker_imports_torch():
    others = [path for path in files("app") if not is_worker(path)]
    assert others
    assert {str(path.relative_to(ROOT)) for path in others if tops(path) & HEAVY} == set()
    by_name = {f"app.{path.stem}" for path in files("app") if is_worker(path)}
    assert {str(path.relative_to(ROOT)) for path in others if imports(path) & by_name} == set()


def test_the_web_process_can_never_reach_torch():
    """Follows every import from the launcher and the server, lazy ones too, except into the worker's own process."""
    for start in (ROOT / "launch.py", ROOT / "app" / "server.py"):
        heavy = {str(path.relative_to(ROOT)) for path in reachable(start) if tops(path) & HEAVY}
        assert heavy == set()


LIGHT = ["lpo/__init__.py", "lpo/prompts.py", "lpo/config.py", "lpo/options.py", "lpo/presets.py", "lpo/run_dir.py",
         "lpo/search_costs.py", "lpo/policy.py", "lpo/places.py", "lpo/preflight.py",
         "lpo/scenes/__init__.py", "lpo/scenes/world/__init__.py", "lpo/scenes/judge.py"]  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_what_the_app_may_import_of_lpo_is_light(name):
    heavy = {str(path.relative_to(ROOT)) for path in reachable(ROOT / name) if tops(path) & HEAVY}
    assert heavy == set()


# Inside lpo: each floor may import those before it. A folder stands for all its files.
ORDER = [
    {
        "lpo/options.py",
        "lpo/presets.py",
        "lpo/config.py",
        "lpo/sample_config.py",
        "lpo/lrm_config.py",
        "lpo/lpo_config.py",
        "lpo/shared_settings.py",
        "lpo/policy.py",
        "lpo/rng.py",
        "lpo/run_dir.py",
        "lpo/prompts.py",
        "lpo/search_costs.py",
        "lpo/places.py",
        "lpo/preflight.py",
        "lpo/export_card.py",
        "lpo/export_plan.py",
    },
    {"lpo/diffusion.py", "lpo/losses.py", "lpo/ranks.py"},
    {"lpo/backbones", "lpo/data.py"},
    {"lpo/reward_model.py", "lpo/lrm_files.py", "lpo/calibration.py"},
    {
        "lpo/selection.py",
        "lpo/sampling.py",
        "lpo/rollout.py",
        "lpo/trace.py",
        "lpo/evaluation.py",
        "lpo/lrm_init.py",
        "lpo/lrm_start.py",
        "lpo/noisy_pairs.py",
        "lpo/scorers.py",
        "lpo/search.py",
    },
    {"lpo/lrm_trainer.py", "lpo/lpo_trainer.py", "lpo/lpo_metrics.py", "lpo/training.py", "lpo/warmup.py",
     "lpo/warmup_pictures.py"},
    {"lpo/export_names.py", "lpo/export_base.py"},
    {"lpo/export_layers.py", "lpo/export_metadata.py", "lpo/export.py", "lpo/export_cli.py",
     "lpo/model_check.py", "lpo/gaps_cli.py"},
    {"lpo/commands.py", "lpo/sample_commands.py", "lpo/cli_help.py", "lpo/__main__.py"},
]


def floor(path: Path) -> int | None:
    name = str(path.relative_to(ROOT))
    for level, members in enumerate(ORDER):
        if name in members or any(name.startswith(f"{member}/") for member in members):
            return level
    return None


def test_floors_inside_lpo():
    wrong = []
    for path in files("lpo"):
        for name in imports(path):
            target = local_module(name)
            if target is None or floor(path) is None or floor(target) is None:
                continue
            if floor(target) > floor(path):
                wrong.append(f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}")
    assert wrong == []


def test_every_file_of_lpo_has_a_floor():
    outside = {"lpo/__init__.py"}
    without = {str(p.relative_to(ROOT)) for p in files("lpo") if floor(p) is None and "scenes" not in p.parts}
    assert without == outside


def sentences(path: Path) -> list[str]:
    """What a file's errors for people say, each value as {}."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        kind = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if kind in ("ConfigError", "DataError", "TrainingError") and node.args:
            words = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            found.append("".join(str(word.value) if isinstance(word, ast.Constant) else "{}" for word in words))
    return found


def test_what_a_person_is_told_is_a_sentence():
    """It begins with a capital, a value, or the name of a setting, and ends with a full stop."""
    names = {"sample", "trace", "timesteps"}
    for config in (*CONFIGS.values(), Search):
        names |= {field.name for field in dataclasses.fields(config)}
    told = [one for folder in ("lpo", "app") for path in files(folder) for one in sentences(path)]
    assert len(told) > 150
    starts = [one for one in told if one[0].islower() and one.split()[0] not in names]
    assert (starts, [one for one in told if one[-1] not in ".?}"]) == ([], [])
