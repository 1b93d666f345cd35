"""`python -m lpo gaps`: score gaps of a file of pairs by local scorers, as a CSV with the official columns.

    python -m lpo gaps --pairs pairs.jsonl --clip models/clip-vit-large-patch14 --aesthetic head.safetensors --out g.csv

Row n belongs to line n, so `python -m storage.exchange gaps` joins it to an import of the same file. A stopped or
killed run goes on behind its last row. Imports no torch until it runs.
"""

from __future__ import annotations

import argparse
import csv
from itertools import islice
from pathlib import Path

from lpo.config import ConfigError
from lpo.places import pairs_file
from lpo.run_dir import require_writable

HELP = "score both pictures of every pair with CLIP, PickScore or an aesthetic head, and write the gaps"
COLUMNS = {"aesthetic": "aesthetic_gap", "clip": "clipscore_gap", "vqa": "vqascore_gap", "pick": "pickscore_gap"}
HEAD = ("different_flag", *COLUMNS.values())
BATCH = 16  # pairs scored at a time


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("gaps", help=HELP, description=HELP)
    parser.add_argument("--pairs", required=True, metavar="FILE.jsonl", help="pairs as train-lrm reads them")
    parser.add_argument("--out", required=True, metavar="FILE.csv", help="where they go; an unfinished file goes on")
    parser.add_argument("--clip", default="", metavar="DIR", help="folder of a CLIP model")
    parser.add_argument("--pick", default="", metavar="DIR", help="PickScore with tokenizer and preprocessor")
    parser.add_argument("--aesthetic", default="", metavar="FILE", help="aesthetic head (.safetensors or .pth)")
    parser.add_argument("--aesthetic-clip", default="", metavar="DIR", help="its CLIP-L model, if it is not --clip")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def run(args: argparse.Namespace) -> int:
    """Writes the CSV: 1 in different_flag where one picture is preferred, 0 for a tie; the gap is the preferred one's
    score minus the other's, of a tie the first minus the second. Raises ConfigError or DataError with one sentence."""
    require_writable(args.out)
    pairs_file(args.pairs)
    from lpo.data import read_pairs
    from lpo.scorers import load_judges

    out, pairs = Path(args.out), read_pairs(args.pairs)
    done = _rows(out)
    if done > len(pairs):
        raise ConfigError(f"{out} has {done} rows already, {args.pairs} only {len(pairs)} pairs; choose another --out.")
    judges = load_judges(clip=args.clip, pick=args.pick, aesthetic=args.aesthetic,
                         aesthetic_clip=args.aesthetic_clip, device=args.device)  # fmt: skip
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not out.stat().st_size:
            writer.writerow(HEAD)
        rest = islice(pairs, done, None)
        while batch := list(islice(rest, BATCH)):
            rows = [
                {"label": None, "choice": "tie" if pair.target == 0.5 else "first" if pair.target > 0.5 else "second",
                 "prompt": pair.prompt, "first": pair.first, "second": pair.second} for pair in batch
            ]  # fmt: skip
            for found in judges.gaps(rows):
                writer.writerow([int(not found["tie"]), *(found.get(column, "") for column in COLUMNS)])
            file.flush()
            done += len(batch)
            print(f"{done} of {len(pairs)} pairs", flush=True)
    print(out)
    return 0


def _rows(path: Path) -> int:
    """How many rows an earlier run has written; a last one without its end is cut off. Raises ConfigError for another
    file."""
    if not path.exists() or not path.stat().st_size:
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole.partition("\n")[0] != ",".join(HEAD):
        raise ConfigError(f"{path} is not an unfinished file of gaps; choose another --out.")
    if whole != text:
        path.write_text(whole, encoding="utf-8", newline="")
    return whole.count("\n") - 1
