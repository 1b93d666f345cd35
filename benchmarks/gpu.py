"""Every speed benchmark at full size on a GPU, in bfloat16, plain and compiled, beside the naive pattern.

    python -m benchmarks.gpu --sizes sd15 sdxl --out gpu-tables

Writes one JSON file a measurement and tables.md, ready for docs/performance.md, into --out. Each measurement is a
process of its own; one that fails (out of memory, most likely) is named in the tables, and the rest go on. Wants about
60 GB of GPU memory for both patterns at once; with less, add --no-naive, and a lower --micro-batch-size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.measure import MODELS
from benchmarks.models import SIZES
from lpo.config import PRESETS

# Official settings: prompts sampled and pairs trained together, and all pairs of 20 steps. The micro-batches are the
# presets' (same maths, less memory; benchmarks/activations.py).
MICRO = {name: PRESETS["train-lpo"][name]["micro_batch_size"] for name in ("sd15", "sdxl")}
TINY_SDXL = {"prompts": 4, "train-batch-size": 4, "kept": [28, 80], "batch-size": 8, "micro-batch-size": MICRO["sdxl"]}
SETTINGS = {"sdxl": TINY_SDXL | {"gradient-checkpointing": True}, "tiny-sdxl": TINY_SDXL}
OTHERS = {"prompts": 5, "train-batch-size": 10, "kept": [28, 100], "batch-size": 16, "micro-batch-size": MICRO["sd15"]}
LPO = ("prompts", "train-batch-size", "kept", "gradient-checkpointing", "micro-batch-size")
LRM = ("batch-size", "gradient-checkpointing")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["sd15", "sdxl"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", type=Path, default=MODELS, help="where the random-weight models are kept")
    parser.add_argument("--steps", type=int, default=20, help="fewer make a quick trial")
    parser.add_argument("--kept", type=int, nargs="+", help="pairs trained on, in place of the official numbers")
    parser.add_argument("--micro-batch-size", type=int, help="pairs in one forward of ours, in place of the presets'")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive pattern out")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled runs out")
    parser.add_argument("--no-memory", action="store_true")
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """(file name, module, flags) of every measurement."""
    found = []
    for size in arguments.sizes:
        setting = {**OTHERS, **SETTINGS.get(size, {})} | ({"kept": arguments.kept} if arguments.kept else {})
        common = {k: getattr(arguments, k) for k in ("device", "dtype", "repeats", "models")} | {"size": size}
        if arguments.no_memory:
            common["no-memory"] = True
        if arguments.micro_batch_size:
            setting["micro-batch-size"] = arguments.micro_batch_size
        lpo = {k: setting[k] for k in LPO if k in setting} | {"steps": arguments.steps}
        if arguments.no_naive:
            lpo["no-naive"] = True
        own = {
            "lpo_iteration": lpo,
            "lrm_step": {k: setting[k] for k in LRM if k in setting},
            "pictures": {"steps": arguments.steps},
        }
        for compiled in (False,) if arguments.no_compile else (False, True):
            for module, flags in own.items():
                name = f"{size}-{module}{'-compiled' * compiled}"
                found.append((name, f"benchmarks.{module}", as_flags({**common, **flags, "compile": compiled})))
    return found


def as_flags(values: dict) -> list[str]:
    """Command-line words: True is a flag, False is none, a list is several words."""
    words: list[str] = []
    for name, value in values.items():
        if value is False:
            continue
        words.append(f"--{name}")
        words += [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sections, failed = [], 0
    for name, module, flags in plan(arguments):
        out = arguments.out / f"{name}.json"
        command = [sys.executable, "-m", module, *flags, "--out", str(out)]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            failed += 1
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            sections.append(f"## {name}\n\nFailed: {last}\n")
        else:
            sections.append(import_module(module).report(json.loads(out.read_text())))
        (arguments.out / "tables.md").write_text("\n".join(sections))
    print(f"{arguments.out / 'tables.md'}; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
