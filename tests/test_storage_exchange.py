"""Export and import: nothing is lost, nothing is doubled, nothing hostile gets in."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import text
from storage_lab import add_pairs, answer, everything, last, picture_bytes

import storage
from storage import exchange, labels
from storage.exchange import ExchangeError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(store):
    """A study with every kind of answer: changed, undone, skipped, simulated, disagreeing, unanswered pairs."""
    study = labels.create_study(store, "Taste", question="Which?", salt="pepper", settings={"a": 1})
    anna, judge = labels.annotator(store, "Anna"), labels.annotator(store, "judge", "simulated")
    pairs = add_pairs(store, study, 8)
    for pair, choice in zip(pairs, ("first", "second", "tie", "both_bad", "skip", "first"), strict=False):
        answer(store, study, anna, pair.id, choice)
    labels.undo(store, study.id, anna.id, "undo-1")
    first = labels.effective(store, study.id)[0]
    answer(store, study, anna, pairs[0].id, "second", revokes=first["id"])
    for pair in pairs[:3]:
        answer(store, study, judge, pair.id, "first")
    return study


def meaning(store, study_id, history=False):
    """What a study says, without ids."""
    names = {who.id: (who.name, who.kind) for who in labels.list_annotators(store)}
    lines = everything(store, study_id)
    effective = {row["id"] for row in labels.effective(store, study_id)}
    return Counter(
        (row["prompt"], row["first"], row["second"], row["choice"], row["left"], row["seconds"], row["annotator"],
         row["kind"], row["status"] if history else None, round(row["created_at"], 5))
        for row in lines
        if history or row["id"] in effective
    ), set(names.values())  # fmt: skip


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
import os, sys, storage
from storage import exchange
store = storage.open(sys.argv[1])
for state in exchange.import_data(store, sys.argv[2]):
    print(state["done"], flush=True)
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


def foreign(number: int, **more) -> dict:
    """A row as Pick-a-Pic itself has it."""
    return {
        "caption": "a cat", "jpg_0": picture_bytes(20 * number, ending="JPEG"),
        "jpg_1": picture_bytes(20 * number + 10, ending="JPEG"), "label_0": 1.0, "label_1": 0.0, "has_label": True,
        "user_id": 7, "ranking_id": number, "model_0": "SDXL", "model_1": "SD2", "image_0_url": "", **more,
    }  # fmt: skip


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


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


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.zip", b"PK\x03\x04 no", "of no known kind"),
        ("a.txt", b"hello", "of no known kind"),
        ("missing.zip", None, "There is no file"),
    ],
)
def test_wrong_files_get_a_sentence(other, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExchangeError, match=sentence):
        last(exchange.import_data(other, tmp_path / name))


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


# --- hostile archives


def archive(path, lines, files=(), study=None):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("pairs.jsonl", "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
        for name, data in files:
            out.writestr(name, data)
        if study is not None:
            out.writestr("study.json", study if isinstance(study, str) else json.dumps(study))
    return path


GOOD = [("a.png", picture_bytes(1)), ("b.png", picture_bytes(2))]
LINE = {"prompt": "a cat", "first": "a.png", "second": "b.png"}


def test_simple_lines_are_taken(other, tmp_path):
    lines = [
        {**LINE, "choice": "tie", "annotator": "Ben"},
        {**LINE, "prompt": "a dog", "target": 1},
        {**LINE, "prompt": "a cow", "target": 0.25},
        {**LINE, "prompt": "a hen"},
        {**LINE, "prompt": "a pig", "choice": "both_bad", "annotator": "robot", "simulated": True},
    ]
    path = archive(tmp_path / "mine.zip", lines, GOOD)
    state = last(exchange.import_data(other, path))
    assert (state["pairs"], state["labels"], state["unlabelled"]) == (4, 3, 1)
    assert state["rejected"] == {"target is not 1, 0.5 or 0: a soft label has no single annotator": 1}
    assert labels.get_study(other, state["study_id"]).name == "mine"
    assert {(who.name, who.kind) for who in labels.list_annotators(other)} == {
        ("Ben", "human"), ("import mine", "human"), ("robot", "simulated"),
    }  # fmt: skip
    (tmp_path / "flat").mkdir()
    for name, data in GOOD:
        (tmp_path / "flat" / name).write_bytes(data)
    (tmp_path / "flat" / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = last(exchange.import_data(other, tmp_path / "flat" / "mine.jsonl"))
    assert (again["pairs"], again["labels"], again["duplicates"]) == (0, 0, 4)


def test_a_training_snapshot_can_be_imported_only_from_inside(store, study, other, tmp_path):
    """pairs.jsonl of a run has absolute paths: they lead outside, and are counted."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in labels.training_pairs(store, study.id)))
    state = last(exchange.import_data(other, path))
    assert state["rejected"] == {"a picture's path leads outside of the import": 3}


def test_paths_never_leave_the_import(other, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture_bytes(9))
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, data in GOOD:
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(secret)
    names = ["../secret.png", str(secret), "sub/../../secret.png", "link.png", "..\\secret.png", "a.png\x00", "sub", ""]
    lines = [{**LINE, "prompt": name or "x", "second": name} for name in names]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = last(exchange.import_data(other, folder))
    assert state["pairs"] == 0 and sum(state["rejected"].values()) == len(names)
    assert [path for path in other.media.root.rglob("*") if path.is_file()] == []

    packed = archive(tmp_path / "evil.zip", lines, [*GOOD, ("../secret.png", b"x"), ("/etc/evil.png", b"x")])
    before = sorted(tmp_path.rglob("*"))
    state = last(exchange.import_data(other, packed))
    assert state["pairs"] == 0
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "other" not in path.parts] == []


@pytest.mark.parametrize(
    "line, reason",
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "no prompt"),
        ({**LINE, "prompt": ""}, "A prompt has 1 to 2000"),
        ({**LINE, "prompt": "x" * 3000}, "A prompt has 1 to 2000"),
        ('{"prompt": "\\ud800", "first": "a.png", "second": "b.png"}', "half of a character"),
        ({"prompt": "a cat"}, "does not name both"),
        ({**LINE, "first": ["a.png"]}, "does not name both"),
        ({**LINE, "first": "gone.png"}, "a picture is missing"),
        ({**LINE, "first": "bomb.png"}, "megapixels"),
        ({**LINE, "first": "text.png"}, "not a readable"),
        ({**LINE, "first": "huge.png"}, "larger than 1 MB"),
        ({**LINE, "second": "a.png"}, "the same file"),
        ({**LINE, "first_provenance": "me"}, "provenance"),
        ({**LINE, "first_provenance": {"x": "y" * 30000}}, "provenance"),
        ({**LINE, "labels": "first"}, "not a list"),
        ({**LINE, "labels": [{"choice": "first"}]}, "no annotator or no client key"),
        ({**LINE, "target": [1]}, "target is not"),
        ({**LINE, "target": True}, "target is not"),
        ('{"prompt": "' + "x" * (5 * 2**20) + '"}', "longer than 4 MB"),
    ],
)
def test_bad_lines_are_counted_with_their_reason(other, tmp_path, line, reason, monkeypatch):
    from test_storage_media import png

    monkeypatch.setattr("storage.exchange.files.MAX_BYTES", 2**20)
    files = [*GOOD, ("bomb.png", png(60000, 60000)), ("text.png", b"hello"), ("huge.png", b"\0" * 2**21)]
    path = archive(tmp_path / "a.zip", [{**LINE, "prompt": "before"}, line, {**LINE, "prompt": "after"}], files)
    state = last(exchange.import_data(other, path))
    assert state["pairs"] == 2
    ((found, times),) = state["rejected"].items()
    assert reason in found and times == 1


def label(**wrong) -> dict:
    return {"annotator": "Ben", "choice": "first", "client_key": "k", "created_at": 5.0, **wrong}


@pytest.mark.parametrize(
    "bad",
    [
        label(choice="best"), label(choice=None), label(choice=["first"]), label(left="up"), label(milliseconds=-1),
        label(milliseconds="5"), label(created_at=float("nan")), label(created_at=-1), label(annotator=""),
        label(annotator=5), label(annotator="\ud800"), label(client_key=""), label(client_key="x" * 300),
        label(kind="robot"), label(revokes="nowhere"), label(revokes=7), label(choice=None, revokes="nowhere"),
    ],
)  # fmt: skip
def test_bad_labels_are_counted_and_the_pair_is_kept(other, tmp_path, bad):
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [bad, label(client_key="good")]}], GOOD)
    state = last(exchange.import_data(other, path))
    assert (state["pairs"], state["labels"]) == (1, 1)
    ((reason, times),) = state["rejected"].items()
    assert reason.startswith("label: ") and times == 1


def test_an_import_cannot_undo_labels_of_other_pairs(store, study, tmp_path):
    victim = everything(store, study.id)[0]
    with store.reader() as session:
        key = session.execute(text("SELECT client_key FROM preference WHERE id = :i"), {"i": victim["id"]}).scalar()
    before = labels.effective(store, study.id)
    evil = label(choice=None, revokes=key, annotator="Eve")
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [evil]}], GOOD)
    state = last(exchange.import_data(store, path, study_id=study.id))
    assert state["labels"] == 0 and labels.effective(store, study.id) == before


def test_a_human_and_a_program_of_one_name_stay_apart(store, study, tmp_path):
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [label(annotator="Anna", kind="simulated")]}], GOOD)
    last(exchange.import_data(store, path, study_id=study.id))
    found = {who.name: who.kind for who in labels.list_annotators(store)}
    assert found["Anna"] == "human" and found["Anna (simulated)"] == "simulated"
    assert [row["simulated"] for row in labels.effective(store, study.id) if row["choice"] == "first"][-1]


@pytest.mark.parametrize(
    "about, sentence",
    [
        ({"format": "preference-lab", "format_version": 99, "name": "x"}, "update Preference Lab"),
        ({"format": "preference-lab", "format_version": "1"}, "update Preference Lab"),
        ({"format": "other"}, "not written by Preference Lab"),
        ({"format": "preference-lab", "format_version": 1, "name": 5}, "as texts"),
        ("[", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
    ],
)
def test_a_bad_study_file_is_refused(other, tmp_path, about, sentence):
    path = archive(tmp_path / "a.zip", [LINE], GOOD, study=about)
    with pytest.raises(ExchangeError, match=sentence):
        last(exchange.import_data(other, path))
    assert labels.list_studies(other) == []


def test_damaged_and_empty_archives(other, tmp_path):
    path = archive(tmp_path / "a.zip", [LINE], GOOD)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x89PNG")
    data[place + 20 : place + 40] = b"\0" * 20
    path.write_bytes(data)
    state = last(exchange.import_data(other, path))
    assert state["rejected"] == {"a file in the archive is damaged": 1}
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ExchangeError, match=r"no pairs\.jsonl"):
        last(exchange.import_data(other, tmp_path / "empty.zip"))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("pairs.jsonl", json.dumps(LINE) + "\n")
        out.writestr("a.png", b"\0" * (200 * 2**20))
        out.writestr("b.png", picture_bytes(1))
    (tmp_path / "bomb.zip").write_bytes(bomb.getvalue())
    state = last(exchange.import_data(other, tmp_path / "bomb.zip"))
    assert state["rejected"] == {"a picture is larger than 32 MB": 1}


def test_a_zip_with_too_many_files_is_refused_before_its_contents_are_read(other, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.exchange.files.MOST_CONTENTS", 500)
    for bits in (32, 64):
        path = tmp_path / f"{bits}.zip"
        with zipfile.ZipFile(path, "w") as out:
            monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2**16 if bits == 32 else 5)
            for number in range(12):
                out.writestr(f"{number}.png", b"x")
        with pytest.raises(ExchangeError, match=r"has more files than can be read from one zip \(about 400,000\)"):
            last(exchange.import_data(other, path))


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


def test_the_command_line_imports_exports_and_says_why(tmp_path, capsys):
    from storage.exchange.__main__ import main

    path = write_parquet(tmp_path / "a.parquet", [foreign(0), foreign(1, caption=None), foreign(2)])
    lab = ["--data-dir", str(tmp_path / "lab")]
    assert main(["import", str(path), *lab, "--base", "sd15", "--rejected", str(tmp_path / "why.csv")]) == 0
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
