"""What the pages cost when a study holds a million labels: seconds and memory of every call, each in its own process.

    python -m benchmarks.many_labels --labels 1000000 [--dir FOLDER]

Writes the rows by SQL into an empty lab (no picture files: one stands for all), then calls what the tabs call, twice
each; a call is printed as first and second time, and the memory that it added at its peak.
"""

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import storage
from storage import labels

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, ANNOTATORS = 58_000, 5_000  # about as in Pick-a-Pic v1

FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {count}) INSERT INTO {into} FROM n
"""
TABLES = (
    ("{annotators}", """annotator (id, name, kind, created_at) SELECT i + 2, 'Pick-a-Pic user ' || i, 'human', 1e9"""),
    ("{prompts}", """prompt (id, text, "key") SELECT i + 1, 'a prompt of number ' || i, 'a prompt of number ' || i"""),
    ("{prompts}", """study_prompt (study_id, prompt_id, split)
        SELECT 1, i + 1, CASE WHEN i % 5 THEN 'train' ELSE 'heldout' END"""),
    ("2 * {labels}", """picture (id, hash, width, height, prompt_id, provenance, created_at)
        SELECT i + 1, printf('%064x', i), 512, 512, i / 2 % {prompts} + 1, '{{"imported": "x.parquet"}}', 1e9 + i"""),
    ("{labels}", """pair (id, prompt_id, first_id, second_id, origin, "key", created_at)
        SELECT i + 1, i % {prompts} + 1, 2 * i + 1, 2 * i + 2, 'import', printf('%032x', i), 1e9 + i"""),
    ("{labels}", """study_pair (study_id, pair_id, position, repeat) SELECT 1, i + 1, i, i % 20 = 0"""),
    ("{labels}", """preference (study_id, pair_id, annotator_id, choice, "left", milliseconds, created_at, client_key,
        simulated, repeat) SELECT 1, i + 1, i * 7 % {annotators} + 2,
        CASE i % 10 WHEN 0 THEN 'tie' WHEN 1 THEN 'skip' WHEN 2 THEN 'second' ELSE 'first' END, NULL, NULL, 1e9 + i,
        printf('%032x', i), 0, 0"""),
)  # fmt: skip

CALLS = {
    "Label: the next pair": "labels.next_pairs(store, 1, 1, 4)",
    "Label: today, pace, left": "labels.progress(store, 1, 1)",
    "Train: do the labels suffice": "numbers.counts(store, 1)",
    "Data: the numbers": "(stories.totals(store, 1), numbers.counts(store, 1), numbers.agreement(store, 1))",
    "Data: pairs, first page": "browse.pairs(store, F(study_id=1), 0, 18)",
    "Data: pairs, last page": "browse.pairs(store, F(study_id=1), browse.MOST // 18 - 1, 18)",
    "Data: pairs that hold a word": "browse.pairs(store, F(study_id=1, text='number 777'), 0, 18)",
    "Data: pairs without a label": "browse.pairs(store, F(study_id=1, choice='unlabelled'), 0, 18)",
    "Data: pairs that are ties": "browse.pairs(store, F(study_id=1, choice='tie'), 0, 18)",
    "Data: pictures, first page": "browse.pictures(store, F(study_id=1), 0, 48)",
    "Data: imported pictures": "browse.pictures(store, F(study_id=1, origin='import'), 0, 48)",
    "Data: labels, first page": "browse.labels(store, F(study_id=1), 0, 30)",
    "Data: labels, last page": "browse.labels(store, F(study_id=1), browse.MOST // 30 - 1, 30)",
    "Data: labels of held-out prompts": "browse.labels(store, F(study_id=1, split='heldout'), 0, 30)",
    "Data: labels of one annotator": "browse.labels(store, F(study_id=1, annotator_id=77), 0, 30)",
    "Data: what a blind vote hides": "browse.hidden(store)",
    "Training: the snapshot of labels": "sum(1 for _ in answers.training_pairs(store, 1))",
}

CALL = """
import json, sys, time
import storage
from storage import answers, browse, labels, media, numbers, stories
from storage.browse import Filters as F
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
media.Media.path = lambda self, digest: self.root / digest
store = storage.open(sys.argv[1])
labels.get_study(store, 1)
before, took = memory("VmRSS"), []
for _ in range(2):
    started = time.monotonic()
    eval(sys.argv[2])
    took.append(time.monotonic() - started)
print(json.dumps({"took": took, "mb": memory("VmHWM") - before}))
"""


def fill(folder: Path, count: int) -> None:
    """A lab with one study of `count` imported pairs with a label each, and one person who has not answered yet."""
    store = storage.open(folder)
    labels.create_study(store, "Imported", "sd15")
    labels.annotator(store, "me")
    store.close()
    sizes = {"labels": count, "prompts": min(PROMPTS, count), "annotators": min(ANNOTATORS, count)}
    with sqlite3.connect(folder / "lab.sqlite") as connection:
        for many, into in TABLES:
            connection.execute(FILL.format(count=many.format(**sizes), into=into.format(**sizes)))
    connection.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_labels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1_000_000, help="labels, and as many pairs")
    parser.add_argument("--dir", type=Path, help="a lab that an earlier run left here is used again")
    parser.add_argument("--only", default="", help="calls whose name holds this")
    arguments = parser.parse_args(argv)
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="labels-"))
    if not (folder / "lab.sqlite").exists():
        started = time.monotonic()
        fill(folder, arguments.labels)
        megabytes = (folder / "lab.sqlite").stat().st_size / 2**20
        print(f"{arguments.labels:,} labels written in {time.monotonic() - started:.0f} s, {megabytes:.0f} MB")
    print("| call | first, s | second, s | added at the peak, MB |\n|---|---|---|---|")
    for name, call in CALLS.items():
        if arguments.only in name:
            command = [sys.executable, "-c", CALL, str(folder), call]
            out = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
            print(f"| {name} | {out['took'][0]:.2f} | {out['took'][1]:.2f} | {out['mb']:.0f} |", flush=True)
    if arguments.dir is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
