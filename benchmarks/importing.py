"""How fast and in how much memory a parquet file of any size is imported: synthetic Pick-a-Pic rows, measured.

    python -m benchmarks.importing --rows 2000 --size 512 --group 1000
    python -m benchmarks.importing --rows 400 --group 400 --kb 1500 --codec snappy      one page of 600 MB a column

Writes a file of `--rows` rows in row groups of `--group` (HF `datasets` writes 100 to 1000; up to 1,024 rows of a group
are one page), imports it in a process of its own into an empty lab, kills that process once half-way, and lets another
one finish; then exports the study as parquet and as zip. The peaks are of resident memory as the kernel saw it (VmHWM).
Pictures are noise over a gradient, about as many bytes as a JPEG of that size, filled up with noise to `--kb`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = 500

IMPORTER = """
import json, sys, time
import storage
from storage import exchange
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) // 1024
store = storage.open(sys.argv[1])
before, started = memory("VmRSS"), time.monotonic()
for state in exchange.import_data(store, sys.argv[2]):
    print(json.dumps({"done": state["done"], "rows": state["done"] - state["resumed"], "pairs": state["pairs"],
                      "duplicates": state["duplicates"], "seconds": time.monotonic() - started,
                      "cpu": time.process_time(), "before": before, "peak": memory("VmHWM")}), flush=True)
"""


def picture(draw: np.random.Generator, size: int) -> bytes:
    """A JPEG with the bytes of a photograph: a gradient under coarse noise."""
    coarse = Image.fromarray(draw.integers(0, 255, (size // 16, size // 16, 3), np.uint8)).resize((size, size))
    fine = draw.normal(0, 14, (size, size, 3))
    pixels = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


EXPORTER = """
import json, sys, time
import storage
from storage import exchange
store, started = storage.open(sys.argv[1]), time.monotonic()
write = exchange.export_parquet if sys.argv[2].endswith("parquet") else exchange.export_jsonl
for state in write(store, 1, sys.argv[2]):
    pass
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
print(json.dumps({"done": state["done"], "seconds": time.monotonic() - started, "peak": peak}))
"""


def write(path: Path, rows: int, size: int, group: int, kb: int = 0, codec: str = "none") -> None:
    """Rows with pictures of their own; a few hundred different drawings get different last bytes, which is quicker."""
    draw = np.random.default_rng(0)
    drawn = [picture(draw, size) for _ in range(24)]
    drawn = [each + draw.bytes(max(0, kb * 1024 - len(each))) for each in drawn]
    schema = pa.schema(
        [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()),
         ("label_1", pa.float64()), ("has_label", pa.bool_()), ("user_id", pa.int64()), ("ranking_id", pa.int64())]
    )  # fmt: skip
    with pq.ParquetWriter(path, schema, compression=codec) as writer:
        for start in range(0, rows, group):
            batch = []
            for n in range(start, min(rows, start + group)):
                label = (1.0, 0.0, 0.5)[n % 3]
                sides = [drawn[(n + side) % len(drawn)] + f"{n}.{side}".encode() for side in (0, 1)]
                batch.append(
                    {"caption": f"prompt {n % PROMPTS}", "jpg_0": sides[0], "jpg_1": sides[1], "label_0": label,
                     "label_1": 1.0 - label, "has_label": True, "user_id": n % 50, "ranking_id": n}
                )  # fmt: skip
            writer.write_table(pa.Table.from_pylist(batch, schema=schema), row_group_size=group)


def run(lab: Path, path: Path, until: int | None = None) -> dict:
    """Imports in a process of its own, killed with SIGKILL after row `until`; returns its last report."""
    command = [sys.executable, "-c", IMPORTER, str(lab), str(path)]
    state: dict = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            state = json.loads(line)
            if until is not None and state["done"] >= until:
                process.kill()
                break
    return state


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.importing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the file, two pictures each")
    parser.add_argument("--size", type=int, default=512, help="pixels of a picture's side")
    parser.add_argument("--group", type=int, default=1000, help="rows of one row group")
    parser.add_argument("--kb", type=int, default=0, help="fill pictures up to this many KB")
    parser.add_argument("--codec", default="none", choices=("none", "snappy", "zstd", "gzip"), help="compression")
    parser.add_argument("--dir", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(dir=arguments.dir, prefix="importing-"))
    try:
        path = folder / "rows.parquet"
        write(path, arguments.rows, arguments.size, arguments.group, arguments.kb, arguments.codec)
        print(f"{arguments.rows} rows of {arguments.size} px, {path.stat().st_size / 2**20:.0f} MB, "
              f"row groups of {arguments.group}, {os.cpu_count()} cores")  # fmt: skip
        half = run(folder / "lab", path, until=arguments.rows // 2)
        started = time.monotonic()
        rest = run(folder / "lab", path)
        for name, state in (("first half, then kill -9", half), ("the rest", rest)):
            cpu = 1000 * state["cpu"] / state["rows"]
            print(f"{name}: {state['rows'] / state['seconds']:.1f} rows/s, {cpu:.0f} ms of processor time a row, "
                  f"peak {state['peak']} MB resident ({state['before']} MB before the import)")  # fmt: skip
        print(f"in all {rest['done']} rows, {rest['pairs']} pairs, {rest['duplicates']} done twice; "
              f"the second process took {time.monotonic() - started:.0f} s")  # fmt: skip
        for name in ("out.parquet", "out.zip"):
            command = [sys.executable, "-c", EXPORTER, str(folder / "lab"), str(folder / name)]
            out = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
            print(f"exported to {name}: {out['done'] / out['seconds']:.0f} rows/s, peak {out['peak']} MB resident")
        return 0 if rest["done"] == rest["pairs"] == arguments.rows and rest["duplicates"] == 0 else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    raise SystemExit(main())
