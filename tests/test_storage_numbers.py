"""A study in numbers: the sum that is carried along is the sum that a fresh count gives, whatever happens between."""

import random
from collections import Counter

import pytest
from storage_lab import add_pairs, add_rows, answer
from test_storage_comparisons import fill, plan, vote_all

import storage
from storage import browse, labels, numbers, stories
from storage.answers import moment
from storage.models import Setting


def fresh(store, study) -> Counter:
    with store.reader() as session:
        return +numbers._sum(session, study.id, moment(session, study.id))


@pytest.mark.parametrize("worth, many", [(0, 1000), (3, 4)])
def test_numbers_carried_along_are_those_of_a_fresh_count(store, monkeypatch, worth, many):
    monkeypatch.setattr(numbers, "WORTH_KEEPING", worth)
    monkeypatch.setattr(numbers, "MANY", many)
    study, other = labels.create_study(store, "Taste"), labels.create_study(store, "Other")
    people = [labels.annotator(store, name) for name in ("a", "b", "c")]
    pairs, draw = add_rows(store, study, 25), random.Random(worth + many)
    add_rows(store, other, 25)
    row = plan(store, study, votes=4)
    fill(store, row)
    for step in range(50):
        who, pair = draw.choice(people), draw.choice(pairs)
        mine = [x for x in labels.effective(store, study.id) if (x["pair_id"], x["annotator_id"]) == (pair.id, who.id)]
        choice = draw.choice(["first", "second", "tie", "skip", "both_bad"])
        if draw.random() < 0.2:
            labels.undo(store, study.id, who.id, f"u{step}")
        elif not mine or mine[0]["comparison_id"] is None:
            answer(store, study, who, pair.id, choice, revokes=mine[0]["id"] if mine else None)
        if draw.random() < 0.1:
            answer(store, other, who, pair.id, "tie")
        if step == 35:
            vote_all(store, study, row, people[0])  # its verdict brings four votes into the numbers
        if draw.random() < 0.5:
            assert +numbers.refresh(store, study.id) == fresh(store, study), step
    monkeypatch.setattr(store.media, "path", lambda digest: digest)  # these pictures have no files
    count, each = labels.counts(store, study.id), labels.effective(store, study.id)
    assert count["labels"] == len(each) and count["choices"] == Counter(x["choice"] for x in each)
    lines = Counter(line["split"] for line in labels.training_pairs(store, study.id))
    assert (count["train"], count["heldout"]) == (lines["train"], lines["heldout"])
    assert {x["id"]: x["labels"] for x in count["annotators"]} == Counter(x["annotator_id"] for x in each)


def test_numbers_of_another_version_are_counted_again(store):
    study, anna = labels.create_study(store, "Taste"), labels.annotator(store, "Anna")
    answer(store, study, anna, add_rows(store, study, 1)[0].id)
    assert labels.counts(store, study.id)["labels"] == 1
    with store.session() as session:
        row = session.get(Setting, f"numbers of study {study.id}")
        row.value = {**row.value, "format_version": 0, "sum": {"labels": 7}}
    assert labels.counts(store, study.id)["labels"] == 1


def test_of_many_the_newest_are_shown(store, monkeypatch):
    monkeypatch.setattr(browse, "MOST", 5)
    study, anna = labels.create_study(store, "Taste"), labels.annotator(store, "Anna")
    pairs = add_rows(store, study, 8)
    for pair in pairs:
        answer(store, study, anna, pair.id)
    for look in (browse.pairs, browse.labels):
        total, rows = look(store, browse.Filters(study_id=study.id), 1, 3)
        assert total == 6 and [row.get("pair", row["id"]) for row in rows] == [pair.id for pair in pairs[4:1:-1]]
    assert browse.labels(store, browse.Filters(text="number 2", split="any"), 0, 9)[0] == 2


def test_disk_use_of_many_pictures_is_told_from_some(store, monkeypatch):
    add_pairs(store, labels.create_study(store, "Taste"), 25)
    exact = stories.disk_use(store)["pictures"]
    assert exact == sum(path.stat().st_size for path in store.media.root.rglob("*") if path.is_file())
    monkeypatch.setattr(stories, "ENOUGH_FILES", 20)
    assert stories.disk_use(store)["pictures"] == pytest.approx(exact, rel=0.3)


def test_the_benchmark_of_many_labels_measures_a_lab_of_its_own(tmp_path, capsys):
    from benchmarks.many_labels import main

    assert main(["--labels", "300", "--dir", str(tmp_path / "lab"), "--only", "do the labels suffice"]) == 0
    assert "| Train: do the labels suffice |" in capsys.readouterr().out
    assert labels.counts(storage.open(tmp_path / "lab"), 1)["labels"] == 300
