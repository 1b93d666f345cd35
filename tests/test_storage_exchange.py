"""Export and import: nothing is lost, nothing is doubled, nothing hostile gets in."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_lab import add_pairs, answer, answered_study, everything, foreign, last, meaning, write_parquet

import storage
from storage import exchange, labels
from storage.exchange import ExchangeError
from storage.exchange.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(store):
    return answered_study(store)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_a_study_goes_out_and_comes_back_whole(store, study, other, tmp_path, name):
    done = last(exchange.export_jsonl(store, study.id, tmp_path / name))
    assert (done["done"], done["labels"]) == (8, 11)
    state = last(exchange.import_data(other, tmp_path / name))
    assert (state["total"], state["done"], state["pairs"], state["labels"]) == (8, 8, 8, 11)
    assert state["rejected"] == {} and state["unlabelled"] == 2
    copy = labels.get_study(other, state["study_id"])
    assert (copy.name, copy.question, copy.salt, copy.settings) == ("Taste", "Which?", "pepper", {"a": 1})
    assert meaning(other, copy.id, history=True) == meaning(store, study.id, history=True)
    for key in ("target", "weight", "split", "prompt"):
        assert [line[key] for line in labels.training_pairs(other, copy.id)] == [
            line[key] for line in labels.training_pairs(store, study.id)
        ]
    provenance = [row["provenance"] for row in everything(other, copy.id, "pictures")]
    assert provenance == [row["provenance"] for row in everything(store, study.id, "pictures")]

    again = last(exchange.import_data(other, tmp_path / name))
    assert (again["study_id"], again["pairs"], again["labels"], again["duplicates"]) == (copy.id, 0, 0, 8)


def test_home_again_doubles_nothing_and_another_study_gets_a_copy(store, study, tmp_path):
    last(exchange.export_jsonl(store, study.id, tmp_path / "out"))
    home = last(exchange.import_data(store, tmp_path / "out"))
    assert (home["study_id"], home["duplicates"], home["labels"]) == (study.id, 8, 0)
    elsewhere = labels.create_study(store, "Elsewhere", salt="other salt")
    for expected in (11, 0):
        state = last(exchange.import_data(store, tmp_path / "out", study_id=elsewhere.id))
        assert (state["pairs"], state["labels"]) == (0, expected)
    assert meaning(store, elsewhere.id) == meaning(store, study.id)


def test_an_export_is_never_half_there(store, study, tmp_path):
    steps = exchange.export_jsonl(store, study.id, tmp_path / "out.zip")
    next(steps)
    steps.close()
    assert list(tmp_path.glob("*out*")) == []
    last(exchange.export_jsonl(store, study.id, tmp_path / "out.zip"))
    with pytest.raises(ExchangeError, match="exists already"):
        next(exchange.export_jsonl(store, study.id, tmp_path / "out.zip"))


@pytest.mark.parametrize("name", ["out", "out.zip", "out.parquet"])
def test_a_stopped_import_goes_on_where_it_was(store, other, tmp_path, name, monkeypatch):
    """What was done is not even read again; the report counts all of it, as if nothing had happened."""
    big = labels.create_study(store, "Big")
    anna = labels.annotator(store, "Anna")
    for pair in add_pairs(store, big, 23):
        answer(store, big, anna, pair.id)
    export = exchange.export_parquet if name.endswith("parquet") else exchange.export_jsonl
    last(export(store, big.id, tmp_path / name))
    for done in (10, 20):
        steps = exchange.import_data(other, tmp_path / name)
        state = next(steps)
        assert (state["done"], state["pairs"], state["duplicates"], state["resumed"]) == (done, done, 0, done - 10)
        steps.close()
    reads = []
    check = exchange.take._file
    monkeypatch.setattr(exchange.take, "_file", lambda *given: reads.append(given[2]) or check(*given))
    state = last(exchange.import_data(other, tmp_path / name))
    assert (state["done"], state["pairs"], state["duplicates"], state["labels"]) == (23, 23, 0, 23)
    assert len(reads) == 6
    assert len(labels.list_studies(other)) == 1
    assert last(exchange.import_data(other, tmp_path / name))["duplicates"] == 23  # finished: a new import, all known


KILLED = """
import os, sys, time, storage
from storage import exchange
store = storage.open(sys.argv[1])
for state in exchange.import_data(store, sys.argv[2]):
    print(state["done"], flush=True)
    if state["done"] >= 40:
        time.sleep(600)  # it never comes to its end, however late it is killed
"""


def test_kill_9_in_the_middle_doubles_nothing_and_loses_no_reason(other, tmp_path):
    rows = [foreign(n, caption=None if n % 7 == 3 else f"prompt {n % 4}", label_0=0.7 if n % 11 == 5 else 1.0)
            for n in range(60)]  # fmt: skip
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    whole = last(exchange.import_data(other, path))
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.kill()
    killed = storage.open(tmp_path / "killed")
    state = last(exchange.import_data(killed, path))
    for key in ("done", "pairs", "labels", "duplicates", "unlabelled", "rejected", "examples"):
        assert state[key] == whole[key], key
    assert state["resumed"] >= 20 and sum(state["rejected"].values()) > 10
    told = list(exchange.rejected_rows(killed, state["import_id"]))
    assert told == list(exchange.rejected_rows(other, whole["import_id"]))
    assert Counter(reason for _, reason in told) == state["rejected"]
    assert [f"row {row}: {reason}" for row, reason in told][:10] == state["examples"][:10]
    killed.close()


def test_the_same_file_twice_at_a_time_is_imported_once(tmp_path, other, monkeypatch):
    """Three at once, each with its own connections, and one that gives up half-way: every row once, nobody fails."""
    monkeypatch.setattr("storage.exchange.take.WAIT_SECONDS", 0.02)
    path = write_parquet(tmp_path / "a.parquet", [foreign(n) for n in range(25)])
    first = exchange.import_data(other, path)
    assert next(first)["done"] == 10
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(list, exchange.import_data(storage.open(other.data_dir), path)) for _ in range(3)]
        waits = next(exchange.import_data(other, path))
        assert waits["waiting"] and (waits["done"], waits["total"], waits["import_id"]) == (0, 25, None)
        first.close()  # stopped: another one goes on behind its tenth row
        states = [run.result() for run in runs]
    ends = sorted((run[-1] for run in states), key=lambda state: state["import_id"])
    assert all(end["finished"] and not end["waiting"] and end["done"] == 25 for end in ends)
    assert ends[0]["resumed"] == 10 and ends[0]["pairs"] + sum(ends[0]["rejected"].values()) == 25
    assert [end["pairs"] for end in ends[1:]] == [0, 0] and labels.counts(other, 1)["pairs"] == ends[0]["pairs"]
    assert len(labels.list_studies(other)) == 1


def test_the_command_line_imports_exports_and_says_why(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", [foreign(0), foreign(1, caption=None), foreign(2)])
    lab = ["--data-dir", str(tmp_path / "lab")]
    assert main(["import", str(path), *lab, "--base", "owner/sd15", "--rejected", str(tmp_path / "why.csv")]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 rows, 2 new pairs, 2 new labels, 0 already here, 1 rejected" in said and "study 1" in said
    assert (tmp_path / "why.csv").read_text().splitlines() == ["row,reason", "2,the row has no caption"]
    for name in ("out.zip", "out.parquet", "out"):
        assert main(["export", "--study", "1", "--out", str(tmp_path / name), *lab]) == 0
        assert (tmp_path / name).exists()
    capsys.readouterr()
    for wrong in (["import", str(tmp_path / "gone.zip")], ["export", "--study", "9", "--out", str(tmp_path / "x")]):
        assert main([*wrong, *lab]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: There is no") and error.count("\n") == 1


@pytest.mark.parametrize("base", ["sd15", "", "./model", "/no/model", "a/b/c", "owner/", "official"])
def test_a_base_that_no_model_has_is_refused_before_anything_is_made(tmp_path, capsys, base):
    path = write_parquet(tmp_path / "a.parquet", [foreign(0)])
    lab = ["--data-dir", str(tmp_path / "lab")]
    assert main(["import", str(path), *lab, "--base", base]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: There is no model {base!r}") and said.count("\n") == 1
    assert labels.list_studies(storage.open(tmp_path / "lab")) == []


def test_paths_that_cannot_be_written_are_refused_before_the_import(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", [foreign(0)])
    for flag, wrong in (("--rejected", tmp_path / "gone" / "x.csv"), ("--rejected", tmp_path), ("--data-dir", path)):
        assert main(["import", str(path), "--data-dir", str(tmp_path / "lab"), flag, str(wrong)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "rows" not in said.out


@pytest.mark.parametrize("text", ["{0}\n{0}", "{0}\n{0}\n", "\n{0}\n\n  \n{0}\n \n", "\ufeff{0}\r\n{0}\n  "])
def test_rows_are_counted_as_they_are_read(tmp_path, other, text):
    (tmp_path / "a.jsonl").write_text(text.replace("{0}", '{"prompt": 1}'), encoding="utf-8", newline="")
    state = last(exchange.import_data(other, tmp_path / "a.jsonl"))
    assert (state["done"], state["total"], state["rejected"]) == (2, 2, {"the line has no prompt": 2})
