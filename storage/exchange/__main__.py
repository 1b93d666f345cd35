"""Data in and out without the page, while the lab runs or not:

    python -m storage.exchange import pickapic_v1/ --data-dir ~/lab      (a folder of .parquet: one import)
    python -m storage.exchange import HPDv2/ --data-dir ~/lab --study 3
    python -m storage.exchange export --study 3 --out study.zip --data-dir ~/lab
    python -m storage.exchange gaps scores.csv --study 3 --data-dir ~/lab           (joined to its newest import by row)
    python -m storage.exchange filter --study 3 --rule "MPCF rule 2" --data-dir ~/lab    (says what it keeps; --apply)

A stopped or killed import goes on when the same command is given again. Exit codes: 0 done, 2 bad input (one sentence).
"""

import argparse
import csv
import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

from .. import filters, gaps, mpcf
from ..db import Storage, StorageError, open_storage
from . import export_jsonl, export_parquet, import_data, rejected_rows

SAY_SECONDS = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m storage.exchange", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="read a file or folder into a study")
    bring.add_argument("path", type=Path, help=".parquet (or a folder of them), .zip, .jsonl, HPDv2's .json")
    bring.add_argument("--study", type=int, help="the study's number; without it, one named after the file")
    bring.add_argument("--base", default="scenes", help="base model of a study that is made: scenes, a folder, a "
                       ".safetensors file or a hub id as owner/name [default: scenes]")  # fmt: skip
    bring.add_argument("--rejected", type=Path, help="write row and reason of every rejected row to this CSV file")
    out = commands.add_parser("export", help="write a study to .zip, .parquet or a folder")
    out.add_argument("--study", type=int, required=True, help="the study's number")
    out.add_argument("--out", type=Path, required=True, help="a new file ending in .zip or .parquet, or a new folder")
    join = commands.add_parser("gaps", help="join a CSV of score gaps to a finished import, row by row")
    join.add_argument("path", type=Path, help="the CSV; docs/data.md names its columns")
    join.add_argument("--study", type=int, required=True, help="the study's number")
    join.add_argument("--import", dest="import_id", type=int, help="the import's number; without it, the newest one")
    sieve = commands.add_parser("filter", help="say what a rule keeps of the imported labels, apply or remove it")
    sieve.add_argument("--study", type=int, required=True, help="the study's number")
    sieve.add_argument("--rule", default=mpcf.DEFAULT, help=f"one of {', '.join(mpcf.PRESETS)} [default: %(default)s]")
    sieve.add_argument("--apply", action="store_true", help="from now on only what the rule keeps trains")
    sieve.add_argument("--remove", action="store_true", help="remove the filter: every label trains again")
    for command in (bring, out, join, sieve):
        command.add_argument("--data-dir", type=Path, required=True, help="the lab's data folder")
    arguments = parser.parse_args(argv)
    try:
        store = open_storage(arguments.data_dir)
        if arguments.command == "import":
            with _writing(arguments.rejected) as rejected:
                _import(store, arguments.path, arguments, rejected)
        else:
            {"export": _export, "gaps": _gaps, "filter": _filter}[arguments.command](store, arguments)
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename} cannot be used ({error.strerror}): choose another path.", file=sys.stderr)
        return 2
    return 0


def _writing(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Opened before an import that may take hours: a path that cannot be written is refused at once."""
    return nullcontext() if path is None else path.open("w", newline="", encoding="utf-8")


def _require_base(base: str) -> None:
    """Raises StorageError for what no model has as its name: neither scenes, nor on this machine, nor owner/name."""
    path = Path(base).expanduser()
    here = (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors")
    hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base)
    if not (base == "scenes" or here or hub):
        raise StorageError(
            f"There is no model {base!r}: --base is scenes, a diffusers folder, a .safetensors file or a hub id "
            "(owner/name), never the name of a preset."
        )


def _import(store: Storage, path: Path, arguments: argparse.Namespace, rejected: TextIO | None) -> None:
    if arguments.study is None:
        _require_base(arguments.base)
    said = 0.0
    state: dict = {}
    for state in import_data(store, path, arguments.study, arguments.base):
        if state["finished"] or time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            if state["waiting"]:
                print(f"{path.name}: waits for another import of the same file", flush=True)
                continue
            left = "" if state["left_s"] is None or state["finished"] else f", {state['left_s']:.0f} s left"
            print(f"{path.name}: {state['done']} of {state['total']} rows, {state['pairs']} new pairs, "
                  f"{state['labels']} new labels, {state['duplicates']} already here, "
                  f"{sum(state['rejected'].values())} rejected{left}", flush=True)  # fmt: skip
    for reason, count in state["rejected"].items():
        print(f"  {count} x {reason}")
    print(f"  study {state['study_id']}")
    if rejected is not None:
        writer = csv.writer(rejected)
        writer.writerow(("row", "reason"))
        writer.writerows(rejected_rows(store, state["import_id"]))


def _export(store: Storage, arguments: argparse.Namespace) -> None:
    write = export_parquet if arguments.out.suffix == ".parquet" else export_jsonl
    *_, state = write(store, arguments.study, arguments.out)
    print(f"{state['done']} {'labels' if write is export_parquet else 'pairs'} in {state['path']}")


def _gaps(store: Storage, arguments: argparse.Namespace) -> None:
    listed = gaps.list_imports(store, arguments.study)
    if arguments.import_id is None and not listed:
        raise StorageError(f"Study {arguments.study} has no finished import; import the pairs first.")
    number = listed[0].id if arguments.import_id is None else arguments.import_id
    *_, state = gaps.add_csv(store, number, arguments.path)
    print(f"{state['labels']} labels of import {number} have gaps; {state['disagree']} rows contradict their label")


def _filter(store: Storage, arguments: argparse.Namespace) -> None:
    if arguments.remove:
        removed = filters.remove(store, arguments.study)
        print("No filter was on." if removed is None else f"{removed.name} is removed: every label trains again.")
        return
    sets = gaps.list_sets(store, arguments.study)
    if not sets:
        raise StorageError(f"Study {arguments.study} has no score gaps; join a CSV with `gaps` first.")
    if arguments.rule not in mpcf.PRESETS:
        raise StorageError(f"There is no rule {arguments.rule!r}; choose one of {', '.join(mpcf.PRESETS)}.")
    missing = [column for column in mpcf.PRESETS[arguments.rule].active if column not in sets[0].config["columns"]]
    rule = mpcf.without(mpcf.PRESETS[arguments.rule], missing)
    found = filters.preview(gaps.load(store, sets[0].id), rule)
    print(f"{sets[0].name}: {rule.name} ({mpcf.words(rule)}) keeps {found['kept']} labels, drops {found['dropped']}; "
          f"{found['heldout']} held-out ones are not touched")  # fmt: skip
    for column in missing:
        print(f"  the {mpcf.WORDS[column]} gate is off: nobody computed these gaps")
    for column, gate in found["gates"].items():
        print(f"  {mpcf.WORDS[column]}: {gate['passed']} pass, {gate['alone']} dropped by it alone")
    if arguments.apply:
        print(f"{filters.apply(store, sets[0].id, rule).name} is on.")


if __name__ == "__main__":
    raise SystemExit(main())
