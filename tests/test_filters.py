"""MPCF: the published rules against a row-by-row oracle; the CSV joined by row; filters that change no label."""

import csv
import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import text
from storage_lab import picture_bytes

from storage import StorageError, exchange, filters, gaps, labels, mpcf
from storage.mpcf import PRESETS, Gate, Rule, keeps

COLUMNS = ("different_flag", "aesthetic_gap", "clipscore_gap", "vqascore_gap")


def official(strategy: int, row: dict) -> bool:
    """The published rule, written out for one row of the CSV."""
    floor = {1: 0.0, 2: -0.5, 3: -1.0}[strategy]
    a, c, v = (row[name] for name in COLUMNS[1:])
    if row["different_flag"] == 1:
        return a > floor and c > 0 and v > 0
    return a < 0.2 and c < 0.03 and v < 0.07


def random_rows(count: int, seed: int = 3) -> list[dict]:
    """Rows around the thresholds, and exactly on them."""
    draw = random.Random(seed)
    edges = {"aesthetic_gap": (0.0, -0.5, -1.0, 0.2), "clipscore_gap": (0.0, 0.03), "vqascore_gap": (0.0, 0.07)}
    spread = {"aesthetic_gap": 1.0, "clipscore_gap": 0.05, "vqascore_gap": 0.1}
    return [
        {"different_flag": draw.randint(0, 1)}
        | {
            name: draw.choice(edges[name]) if draw.random() < 0.2 else draw.gauss(0.3 * spread[name], spread[name])
            for name in COLUMNS[1:]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_presets_are_the_published_rules(strategy):
    rows = random_rows(3000)
    ties = [row["different_flag"] == 0 for row in rows]
    scores = {key: [row[name] for row in rows] for key, name in gaps.CSV_COLUMNS.items()}
    kept = keeps(PRESETS[f"MPCF rule {strategy}"], ties, scores).tolist()
    assert kept == [official(strategy, row) for row in rows]
    assert 100 < sum(kept) < 2000


def test_gates_can_be_edited_and_a_missing_gap_never_passes():
    ties, scores = [False, False, True, True], {"clip": [0.5, math.nan, -0.9, 0.01], "pick": [-1.0, 2.0, 0.0, 0.0]}

    def kept(gates, **more) -> list[bool]:
        return keeps(Rule("mine", gates, **more), ties, scores).tolist()

    assert kept({}) == [True] * 4
    assert kept({"clip": Gate(True, 0.1, 0.03)}) == [True, False, True, True]
    assert kept({"clip": Gate(True, 0.1, 0.03)}, tie_distance=True) == [True, False, False, True]
    assert kept({"clip": Gate(True, 0.1, 0.03)}, keep_ties=False) == [True, False, False, False]
    assert kept({"clip": Gate(False), "pick": Gate(True, 0.0, 1.0)}) == [False, True, True, True]
    assert mpcf.words(PRESETS["MPCF rule 2"]) == (
        "aesthetic > -0.5, CLIP > 0, VQA > 0; ties aesthetic < 0.2, CLIP < 0.03, VQA < 0.07"
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Rule(" ", {}), "1 to 80 characters"),
        (lambda: Rule("x", {"beauty": Gate()}), "'beauty' is no score"),
        (lambda: Rule("x", {"clip": Gate(True, math.nan)}), "gate of CLIP is nan; it must be a number from -1000 to"),
        (lambda: Rule("x", {"clip": Gate(True, 0.0, 1e9)}), "must be a number"),
        (lambda: mpcf.from_json({"format_version": 99}), "update Preference Lab"),
    ],
)
def test_bad_rules_get_a_sentence(make, sentence):
    with pytest.raises(StorageError, match=sentence):
        make()


def test_rules_travel_as_json():
    rule = Rule("mine", {"pick": Gate(True, 0.5, 0.1)}, keep_ties=False, tie_distance=True)
    assert mpcf.from_json(json.loads(json.dumps(mpcf.to_json(rule)))) == rule


# --- a CSV joined to an import


@pytest.fixture
def imported(store, tmp_path):
    """(study, rows of the CSV): 40 Pick-a-Pic rows, every tenth without a caption, a tie wherever the CSV says so."""
    rows = random_rows(40, seed=5)
    table = []
    for number, row in enumerate(rows):
        soft = {1: (0.0, 1.0), 0: (0.5, 0.5)}[row["different_flag"]]
        table.append(
            {
                "caption": None if number % 10 == 9 else f"prompt {number % 12}", "jpg_0": picture_bytes(2 * number),
                "jpg_1": picture_bytes(2 * number + 1), "label_0": soft[0], "label_1": soft[1], "has_label": True,
                "user_id": 1, "ranking_id": number,
            }
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet")
    *_, state = exchange.import_data(store, tmp_path / "train.parquet", base="sd15")
    assert state["labels"] == 36
    return labels.get_study(store, state["study_id"]), rows


def write_csv(path, rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("", *columns), extrasaction="ignore")  # an index column, as pandas writes it
        writer.writeheader()
        writer.writerows({"": number, **row} for number, row in enumerate(rows))
    return path


def join(store, study, path):
    *_, state = gaps.add_csv(store, gaps.list_imports(store, study.id)[0].id, path)
    return state


def by_prompt(store, study) -> dict[str, list[dict]]:
    return {label["id"]: label for label in labels.effective(store, study.id)}


def test_the_csv_is_joined_by_row_and_the_filter_trains_what_the_rule_keeps(store, tmp_path, imported):
    study, rows = imported
    state = join(store, study, write_csv(tmp_path / "scores.csv", rows))
    assert (state["done"], state["labels"], state["disagree"]) == (40, 36, 0)
    before, everything = labels.effective(store, study.id), list(labels.training_pairs(store, study.id))
    with store.reader() as session:
        place = dict(session.execute(text('SELECT preference_id, "row" FROM import_row WHERE reason IS NULL')).all())
    pair_row = {str(label["pair_id"]): place[label["id"]] - 1 for label in before}
    applied = filters.apply(store, state["gap_set_id"], PRESETS["MPCF rule 2"])

    lines = list(labels.training_pairs(store, study.id))
    wanted = [x["id"] for x in everything if x["split"] == "heldout" or official(2, rows[pair_row[x["id"]]])]
    assert [line["id"] for line in lines] == wanted and 0 < len(wanted) < len(everything)
    assert {line["filter"] for line in lines} == {"MPCF rule 2"}
    assert "filter" not in everything[0]
    train = sum(line["split"] == "train" for line in lines)
    assert (applied.kept, applied.dropped) == (train, len(everything) - len(lines))
    found = labels.counts(store, study.id)
    assert (found["train"], found["filter"], found["filtered"]) == (train, "MPCF rule 2", applied.dropped)
    assert found["labels"] == 36

    after = labels.effective(store, study.id)  # not one label has changed
    assert [{**row, "dropped": 0} for row in after] == before
    assert filters.remove(store, study.id).id == applied.id
    assert list(labels.training_pairs(store, study.id)) == everything
    assert filters.active(store, study.id) is None and len(filters.history(store, study.id)) == 1
    assert filters.remove(store, study.id) is None


def test_weights_are_those_of_all_pairs_of_a_prompt(store, tmp_path, imported):
    """As in the official code: dropping one pair of a prompt does not make its other pairs heavier."""
    study, rows = imported
    state = join(store, study, write_csv(tmp_path / "scores.csv", rows))
    before = {line["id"]: line["weight"] for line in labels.training_pairs(store, study.id)}
    filters.apply(store, state["gap_set_id"], PRESETS["MPCF rule 3"])
    lines = [line for line in labels.training_pairs(store, study.id) if line["split"] == "train"]
    ratios = {round(line["weight"] / before[line["id"]], 9) for line in lines}
    assert len(ratios) == 1 and len({round(line["weight"], 9) for line in lines}) > 1
    assert sum(line["weight"] for line in lines) == pytest.approx(len(lines))


def test_a_new_filter_takes_the_place_of_the_old_one_and_the_preview_tells_it_before(store, tmp_path, imported):
    study, rows = imported
    state = join(store, study, write_csv(tmp_path / "scores.csv", rows))
    loaded = gaps.load(store, state["gap_set_id"])
    for name in ("MPCF rule 1", "MPCF rule 3"):
        told = filters.preview(loaded, PRESETS[name])
        applied = filters.apply(store, state["gap_set_id"], PRESETS[name])
        assert (applied.kept, applied.dropped) == (told["kept"], told["dropped"])
        assert told["chosen"][0] + told["ties"][0] == told["kept"]
        assert told["chosen"][1] + told["ties"][1] == told["kept"] + told["dropped"]
        assert told["kept"] + told["dropped"] + told["heldout"] == 36
    assert filters.active(store, study.id).name == "MPCF rule 3"
    shown = filters.examples(store, loaded, PRESETS["MPCF rule 3"], count=50)
    assert len(shown["kept"]) == applied.kept and len(shown["dropped"]) == applied.dropped
    assert all(each["missed"] for each in shown["dropped"]) and not any(each["missed"] for each in shown["kept"])
    assert store.media.path(shown["kept"][0]["first"]).exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:-1], "has 39 rows and the import of train.parquet has 40, so they cannot be joined by row"),
        (lambda rows: [*rows, rows[0]], "has 41 rows"),
        (lambda rows: [{**row, "clipscore_gap": "much"} for row in rows], "row 1: clipscore_gap is 'much'"),
        (lambda rows: [{**row, "different_flag": 2} for row in rows], "different_flag must be 1"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused_and_leaves_nothing(store, tmp_path, imported, change, sentence):
    study, rows = imported
    with pytest.raises(StorageError, match=sentence):
        join(store, study, write_csv(tmp_path / "scores.csv", change(rows)))
    with pytest.raises(StorageError, match="has no column vqascore_gap"):
        join(store, study, write_csv(tmp_path / "short.csv", rows, COLUMNS[:3]))
    (tmp_path / "long.csv").write_text(",".join(COLUMNS) + "\n" + "1," * 200_000)
    (tmp_path / "latin.csv").write_bytes(",".join(COLUMNS).encode() + b"\ncaf\xe9,1,1,1\n")
    (tmp_path / "nul.csv").write_bytes(",".join(COLUMNS).encode() + b"\n" + b"\0,1,1,1\n" * 40)
    (tmp_path / "zeros.csv").write_bytes(b"\0" * 5000)
    refused = {"long": "a line of more than 100 kB", "latin": "save it again as UTF-8", "nul": r"is '\\x00'; it must",
               "zeros": "has no column different_flag"}  # fmt: skip
    for name, words in refused.items():
        with pytest.raises(StorageError, match=words):
            join(store, study, tmp_path / f"{name}.csv")
    assert gaps.list_sets(store, study.id) == []


def test_a_csv_in_another_order_shows_in_the_ties(store, tmp_path, imported):
    study, rows = imported
    state = join(store, study, write_csv(tmp_path / "scores.csv", rows[::-1]))
    kept = [n for n in range(40) if n % 10 != 9]
    assert state["disagree"] == sum(rows[n]["different_flag"] != rows[39 - n]["different_flag"] for n in kept) > 5


def test_empty_cells_are_missing_gaps_and_gates_without_gaps_are_refused(store, tmp_path, imported):
    study, rows = imported
    bare = [{**row, "vqascore_gap": ""} for row in rows]
    state = join(store, study, write_csv(tmp_path / "scores.csv", bare))
    told = filters.preview(gaps.load(store, state["gap_set_id"]), PRESETS["MPCF rule 2"])
    assert told["kept"] == 0 and told["gates"]["vqa"]["missing"] == told["dropped"]
    with pytest.raises(StorageError, match="has no VQA gaps, so this gate would drop everything"):
        filters.apply(store, state["gap_set_id"], PRESETS["MPCF rule 2"])
    with pytest.raises(StorageError, match="has no PickScore gaps"):
        filters.apply(store, state["gap_set_id"], Rule("x", {"pick": Gate()}))
    rule = mpcf.without(PRESETS["MPCF rule 2"], ["vqa"])
    assert rule.active == ["aesthetic", "clip"]
    assert filters.apply(store, state["gap_set_id"], rule).kept > 0


def test_a_revoked_label_is_not_in_the_preview(store, tmp_path, imported):
    study, rows = imported
    state = join(store, study, write_csv(tmp_path / "scores.csv", rows))
    who = labels.list_annotators(store)[0]
    labels.undo(store, study.id, who.id, "undo-1")
    assert len(gaps.load(store, state["gap_set_id"]).labels) == 35


def test_the_command_line_joins_says_what_a_rule_keeps_applies_and_removes(store, tmp_path, imported, capsys):
    from storage.exchange.__main__ import main

    study, rows = imported
    lab = ["--study", str(study.id), "--data-dir", str(store.data_dir)]
    assert main(["filter", *lab]) == 2 and "has no score gaps" in capsys.readouterr().err
    bare = write_csv(tmp_path / "scores.csv", [{**row, "vqascore_gap": "", "pickscore_gap": 1} for row in rows])
    assert main(["gaps", str(bare), *lab]) == 0
    assert "36 labels of import 1 have gaps; 0 rows contradict" in capsys.readouterr().out
    assert main(["filter", *lab, "--rule", "MPCF rule 9"]) == 2 and "choose one of" in capsys.readouterr().err
    assert main(["filter", *lab]) == 0 and filters.active(store, study.id) is None
    said = capsys.readouterr().out
    assert main(["filter", *lab, "--apply"]) == 0
    on = filters.active(store, study.id)
    assert f"keeps {on.kept} labels, drops {on.dropped}" in said and "the VQA gate is off" in said
    assert "MPCF rule 2 is on." in capsys.readouterr().out
    assert main(["filter", *lab, "--remove"]) == 0 and filters.active(store, study.id) is None
    assert main(["gaps", str(bare), "--study", "9", "--data-dir", str(store.data_dir)]) == 2
