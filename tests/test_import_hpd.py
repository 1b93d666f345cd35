"""HPDv2: both annotation layouts, streamed, with every pair, tie and annotator, and every fault counted."""

import json
import zipfile
from itertools import combinations

import pytest
from storage_lab import everything, last, picture_bytes

import storage
from storage import exchange, labels
from storage.exchange import ExchangeError, hpd_in

TRAIN = {"prompt": "a red boat", "image_path": ["0.png", "1.png"], "human_preference": [1, 0]}


@pytest.fixture
def folder(tmp_path):
    """Nine pictures in test/, four of them also beside the file."""
    root = tmp_path / "HPDv2"
    (root / "test").mkdir(parents=True)
    for number in range(9):
        (root / "test" / f"{number}.png").write_bytes(picture_bytes(number))
        if number < 4:
            (root / f"{number}.png").write_bytes(picture_bytes(number))
    return root


def write(folder, entries, name="train.json"):
    (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder / name


def answers(store, study_id) -> dict[tuple[str, str, str], str]:
    """{(prompt, first, second: names of files): annotator and choice}."""
    files = {}
    for row in everything(store, study_id, "pictures"):
        files[row["prompt"], row["hash"]] = row["provenance"]["file"]
    return {
        (row["annotator"], row["prompt"], files[row["prompt"], row["first"]], files[row["prompt"], row["second"]]): row[
            "choice"
        ]
        for row in everything(store, study_id)
    }


def test_train_pairs_with_a_tie_and_the_older_key(store, folder):
    entries = [
        TRAIN,
        {**TRAIN, "prompt": "a blue boat", "human_preference": [0, 1]},
        {"prompt": "a boat", "file_path": ["2.png", "3.png"], "human_preference": [1, 1], "user_hash": "ab"},
    ]
    state = last(exchange.import_data(store, write(folder, entries), base="sd15"))
    assert (state["total"], state["done"], state["pairs"], state["labels"]) == (3, 3, 3, 3)
    assert answers(store, state["study_id"]) == {
        ("HPD", "a red boat", "0.png", "1.png"): "first",
        ("HPD", "a blue boat", "0.png", "1.png"): "second",
        ("HPD user ab", "a boat", "2.png", "3.png"): "tie",
    }
    again = last(exchange.import_data(store, folder / "train.json", base="sd15"))
    assert (again["duplicates"], again["pairs"], again["labels"]) == (3, 0, 0)


def test_a_ranking_becomes_all_its_pairs_with_a_label_of_every_annotator(store, folder):
    ranks = {"ann": [3, 0, 1, 2, 8, 4, 5, 6, 7], "bob": [0, 0, 2, 3, 4, 5, 6, 7, 8]}
    entry = {
        "prompt": "a boat", "image_path": [f"{n}.png" for n in range(9)], "rank": [1] * 9,
        "raw_annotations": [{"rank": rank, "user_hash": who} for who, rank in ranks.items()],
    }  # fmt: skip
    write(folder, [entry], "test.json")
    state = last(exchange.import_data(store, folder))  # a folder: its own .json, pictures in test/
    assert (state["total"], state["pairs"], state["labels"]) == (36, 36, 72)
    found = answers(store, state["study_id"])
    for who, rank in ranks.items():
        for a, b in combinations(range(9), 2):
            wanted = "tie" if rank[a] == rank[b] else "first" if rank[a] < rank[b] else "second"
            assert found[f"HPD user {who}", "a boat", f"{a}.png", f"{b}.png"] == wanted
    assert sum(choice == "tie" for choice in found.values()) == 1


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("text", "no prompt"),
        ({**TRAIN, "prompt": None}, "no prompt"),
        ({"prompt": "x", "human_preference": [1, 0]}, "does not name 2 to"),
        ({**TRAIN, "image_path": ["0.png"]}, "does not name 2 to"),
        ({**TRAIN, "human_preference": [1]}, "not one number for each"),
        ({**TRAIN, "human_preference": [True, False]}, "not one number for each"),
        ({**TRAIN, "human_preference": "first"}, "not one number for each"),
        ({**TRAIN, "raw_annotations": 5}, "not a list of objects"),
        ({**TRAIN, "image_path": ["0.png", "gone.png"]}, "a picture is missing"),
        ({**TRAIN, "image_path": ["0.png", "../test/1.png"]}, "leads outside"),
        ({**TRAIN, "image_path": ["0.png", 5]}, "does not name both"),
        ({**TRAIN, "image_path": ["0.png", "0.png"]}, "same file"),
    ],
)
def test_what_cannot_be_taken_is_counted(store, folder, wrong, reason):
    path = write(folder, [TRAIN, wrong, {**TRAIN, "prompt": "after"}])
    state = last(exchange.import_data(store, path))
    assert (state["done"], state["pairs"]) == (3, 2)
    ((found, times),) = state["rejected"].items()
    assert reason in found and times == 1


def test_entries_without_a_preference_are_unlabelled(store, folder):
    path = write(folder, [{"prompt": "a boat", "image_path": ["0.png", "1.png", "2.png"]}])
    state = last(exchange.import_data(store, path))
    assert (state["pairs"], state["labels"], state["unlabelled"]) == (3, 0, 3)


def test_small_blocks_give_the_same_entries(store, folder, monkeypatch):
    """Elements and even letters that are cut by the end of a block, and white space anywhere."""
    entries = [{**TRAIN, "prompt": f"ein grünes Boot № {n} " + "é" * n} for n in range(30)]
    path = write(folder, json.dumps(entries, ensure_ascii=False, indent=3))
    monkeypatch.setattr(hpd_in, "BLOCK", 7)
    with hpd_in.Source(path) as source:
        assert list(source._entries("train.json")) == entries
        assert source.total() == 30


def test_a_stopped_import_goes_on_inside_a_ranking(store, folder):
    entry = {"prompt": "a boat", "image_path": [f"{n}.png" for n in range(9)], "rank": list(range(9))}
    path = write(folder, [TRAIN, entry], "test.json")
    steps = exchange.import_data(store, path)
    assert next(steps)["done"] == 10
    steps.close()
    state = last(exchange.import_data(store, path))
    assert (state["resumed"], state["done"], state["pairs"], state["labels"]) == (10, 37, 37, 37)


def test_a_broken_file_keeps_what_came_before_and_a_zip_is_taken(store, folder, tmp_path):
    text = json.dumps([{**TRAIN, "prompt": f"boat {n}"} for n in range(5)])
    path = write(folder, text[: text.rindex('{"prompt"') + 15])
    with pytest.raises(ExchangeError, match=r"train\.json is damaged .*what came before"):
        last(exchange.import_data(store, path))
    with zipfile.ZipFile(tmp_path / "hpd.zip", "w") as out:
        out.writestr("test.json", text)
        for number in range(2):
            out.writestr(f"test/{number}.png", picture_bytes(number))
    fresh = storage.open(tmp_path / "fresh")
    state = last(exchange.import_data(fresh, tmp_path / "hpd.zip"))
    assert (state["pairs"], state["labels"]) == (5, 5)
    assert labels.get_study(fresh, state["study_id"]).name == "hpd"
    fresh.close()
