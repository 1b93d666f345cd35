"""Pick-a-Pic parquet out and in: its columns, its faults, and the memory that it takes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_lab import answered_study, everything, foreign, last, meaning, picture_bytes, write_parquet

from storage import exchange, labels
from storage.exchange import ExchangeError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(store):
    return answered_study(store)


def test_pick_a_pic_columns_go_out_and_come_back(store, study, other, tmp_path):
    done = last(exchange.export_parquet(store, study.id, tmp_path / "out.parquet"))
    assert done["done"] == 8 == done["total"]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    wanted = (
        "are_different, best_image_uid, caption, created_at, has_label, image_0_uid, image_0_url, image_1_uid, "
        "image_1_url, jpg_0, jpg_1, label_0, label_1, model_0, model_1, ranking_id, user_id, num_example_per_prompt"
    )
    assert ", ".join(list(table[0])[:18]) == wanted
    schema = pq.read_schema(tmp_path / "out.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]  # what `datasets` goes by
    assert list(features) == schema.names and {each["_type"] for each in features.values()} == {"Value"}
    for name, dtype in (("jpg_0", "binary"), ("label_0", "float64"), ("caption", "string"), ("user_id", "int64"),
                        ("has_label", "bool"), ("created_at", "timestamp[us]")):  # fmt: skip
        assert features[name]["dtype"] == dtype
    lines = {line["id"]: line for line in labels.effective(store, study.id)}
    for row in table:
        choice = lines[row["ranking_id"]]["choice"]
        soft = {"first": (1.0, 0.0), "second": (0.0, 1.0)}.get(choice, (0.5, 0.5))
        assert (row["label_0"], row["label_1"]) == soft
        assert row["has_label"] == (choice not in ("skip", "both_bad"))
        best = {"first": row["image_0_uid"], "second": row["image_1_uid"], "tie": "tie"}.get(choice, "")
        assert row["best_image_uid"] == best and row["model_0"] == "scenes"
        assert store.media.path(row["image_0_uid"]).read_bytes() == row["jpg_0"]
    per_prompt = Counter(row["caption"] for row in table)
    assert all(row["num_example_per_prompt"] == per_prompt[row["caption"]] for row in table)

    mine = labels.create_study(other, "Mine", salt="pepper")
    state = last(exchange.import_data(other, tmp_path / "out.parquet", study_id=mine.id))
    assert (state["total"], state["labels"], state["rejected"]) == (8, 8, {})
    assert meaning(other, mine.id) == meaning(store, study.id)
    again = last(exchange.import_data(other, tmp_path / "out.parquet", study_id=mine.id))
    assert (again["labels"], again["duplicates"]) == (0, 8)


def test_foreign_pick_a_pic_rows_and_their_faults(other, tmp_path):
    rows = [
        foreign(0),
        foreign(1, label_0=0.5, label_1=0.5, user_id=8),
        foreign(2, has_label=False),
        foreign(3, caption=None),
        foreign(4, jpg_0=None),
        foreign(5, jpg_1=b"no picture"),
        foreign(6, label_0=0.7, label_1=0.3),
        foreign(7, jpg_1=picture_bytes(140, ending="JPEG")),
        foreign(0),
        foreign(8, jpg_0=None, image_0_url="https://example.org/a.png"),
    ]
    path = write_parquet(tmp_path / "train-0001.parquet", rows)
    state = last(exchange.import_data(other, path, base="sd15"))
    assert (state["done"], state["pairs"], state["labels"], state["duplicates"]) == (10, 3, 2, 1)
    assert state["unlabelled"] == 1
    assert state["rejected"] == {
        "the row has no caption": 1,
        "a picture is missing": 1,
        "the second picture is not a readable PNG, JPEG or WebP picture; save it again as PNG.": 1,
        "label_0 and label_1 are not 1 and 0, 0 and 1, or 0.5 and 0.5": 1,
        "both pictures are the same file": 1,
        "a picture is given by its URL only, and nothing is fetched from the network": 1,
    }
    assert len(state["examples"]) == 6 and state["examples"][0].startswith("row 4: ")
    assert labels.get_study(other, state["study_id"]).base == "sd15"
    assert {who.name for who in labels.list_annotators(other)} == {"Pick-a-Pic user 7", "Pick-a-Pic user 8"}
    pictures = everything(other, state["study_id"], "pictures", origin="import")
    assert len(pictures) == 6 and pictures[0]["provenance"]["model"] in ("SDXL", "SD2")


def test_a_folder_of_parquet_and_wrapped_pictures(other, tmp_path):
    (tmp_path / "parts").mkdir()
    for part in range(2):
        row = foreign(part)
        row["jpg_0"] = {"bytes": row["jpg_0"], "path": None}
        write_parquet(tmp_path / "parts" / f"{part}.parquet", [row])
    state = last(exchange.import_data(other, tmp_path / "parts"))
    assert (state["total"], state["pairs"]) == (2, 2)


def test_an_edition_without_pictures_is_counted_and_fetches_nothing(other, tmp_path):
    """Pick-a-Pic is also given without jpg columns: every row is refused with its reason, the file is not."""
    row = {"caption": "a cat", "label_0": 1.0, "label_1": 0.0, "image_0_url": "https://a", "image_1_url": "https://b"}
    state = last(exchange.import_data(other, write_parquet(tmp_path / "urls.parquet", [row, row])))
    assert state["rejected"] == {"a picture is given by its URL only, and nothing is fetched from the network": 2}
    assert state["pairs"] == 0


def test_a_swapped_pair_turns_its_answers(store, other, tmp_path):
    flipped = foreign(0, label_0=0.0, label_1=1.0, user_id=8)
    flipped["jpg_0"], flipped["jpg_1"] = flipped["jpg_1"], flipped["jpg_0"]
    path = write_parquet(tmp_path / "swap.parquet", [foreign(0), flipped])
    state = last(exchange.import_data(other, path))
    assert (state["pairs"], state["labels"]) == (1, 2)
    assert [row["choice"] for row in labels.effective(other, state["study_id"])] == ["first", "first"]


def test_a_parquet_without_the_columns_is_refused(other, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"caption": "x", "score": 1}])
    with pytest.raises(ExchangeError, match="lacks the column jpg_0"):
        last(exchange.import_data(other, path))


def test_a_damaged_parquet_keeps_what_came_before(other, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([foreign(n) for n in range(40)]), path, row_group_size=10, compression="none")
    data = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(2).column(1)
    start = middle.dictionary_page_offset or middle.data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(ExchangeError, match="is damaged"):
        last(exchange.import_data(other, path))
    assert labels.counts(other, labels.list_studies(other)[0].id)["pairs"] >= 10


def test_an_export_writes_large_pictures_in_small_row_groups(store, study, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.exchange.parquet_out.BYTES", 1)
    done = last(exchange.export_parquet(store, study.id, tmp_path / "x.parquet"))
    metadata = pq.ParquetFile(tmp_path / "x.parquet").metadata
    assert metadata.num_rows == done["done"] == metadata.num_row_groups > 1
    monkeypatch.setattr("storage.exchange.jsonl_out.MOST_PICTURES", 1)
    with pytest.raises(ExchangeError, match="at most 1 pictures; export as parquet, or to a folder"):
        last(exchange.export_jsonl(store, study.id, tmp_path / "x.zip"))
    assert not (tmp_path / "x.zip").exists()


MEASURE = """
import resource, sys, storage
from storage import exchange
store = storage.open(sys.argv[1])
list(exchange.import_data(store, sys.argv[2] + "/small.parquet"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
*_, state = exchange.import_data(store, sys.argv[2] + "/big.parquet")
print(state["pairs"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_follows_the_batch_and_not_the_file(tmp_path):
    """48 MB of pictures in one single row group, the worst that a writer can do; 10 rows or 20 MB are in hand."""
    padding = os.urandom(2**20)  # behind the end of a picture: read and stored, quick to decode

    def row(number: int) -> dict:
        given = foreign(number)
        return {**given, "jpg_0": given["jpg_0"] + padding, "jpg_1": given["jpg_1"] + padding}

    write_parquet(tmp_path / "small.parquet", [row(0)])
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(24)]), tmp_path / "big.parquet", row_group_size=24)
    assert (tmp_path / "big.parquet").stat().st_size > 46 * 2**20
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "lab"), str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    pairs, megabytes = map(int, out.split())
    assert pairs == 23 and megabytes < 40
