"""Data in and out without the page, while the lab runs or not:

    python -m storage.exchange import pickapic_v1/ --data-dir ~/lab --base sd15      (a folder of .parquet: one import)
    python -m storage.exchange import HPDv2/ --data-dir ~/lab --study 3
    python -m storage.exchange export --study 3 --out study.zip --data-dir ~/lab

A stopped or killed import goes on when the same command is given again. Exit codes: 0 done, 2 bad input (one sentence).
"""

import argparse
import csv
import sys
import time
from pathlib import Path

from ..db import Storage, StorageError, open_storage
from . import export_jsonl, export_parquet, import_data, rejected_rows

SAY_SECONDS = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m storage.exchange", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="read a file or folder into a study")
    bring.add_argument("path", type=Path, help=".parquet (or a folder of them), .zip, .jsonl, HPDv2's .json")
    bring.add_argument("--study", type=int, help="the study's number; without it, one named after the file")
    bring.add_argument("--base", default="scenes", help="base model of a study that is made")
    bring.add_argument("--rejected", type=Path, help="write row and reason of every rejected row to this CSV file")
    out = commands.add_parser("export", help="write a study to .zip, .parquet or a folder")
    out.add_argument("--study", type=int, required=True, help="the study's number")
    out.add_argument("--out", type=Path, required=True, help="a new file ending in .zip or .parquet, or a new folder")
    for command in (bring, out):
        command.add_argument("--data-dir", type=Path, required=True, help="the lab's data folder")
    arguments = parser.parse_args(argv)
    try:
        store = open_storage(arguments.data_dir)
        if arguments.command == "export":
            _export(store, arguments)
        else:
            _import(store, arguments.path, arguments)
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _import(store: Storage, path: Path, arguments: argparse.Namespace) -> None:
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
    if arguments.rejected is not None:
        with arguments.rejected.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "reason"))
            writer.writerows(rejected_rows(store, state["import_id"]))


def _export(store: Storage, arguments: argparse.Namespace) -> None:
    write = export_parquet if arguments.out.suffix == ".parquet" else export_jsonl
    *_, state = write(store, arguments.study, arguments.out)
    print(f"{state['done']} {'labels' if write is export_parquet else 'pairs'} in {state['path']}")


if __name__ == "__main__":
    raise SystemExit(main())
