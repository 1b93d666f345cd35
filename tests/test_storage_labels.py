"""The life of a label: the queue, votes and undo, repeats, threads, training pairs, agreement."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import evalica
import numpy as np
import pandas as pd
import pytest
from sqlalchemy import text
from storage_lab import add_pairs, add_rows, answer, picture_bytes

from lpo.data import read_pairs
from lpo.scenes import world
from storage import labels, media, numbers
from storage.labels import LabelError
from storage.studies import REPEAT_BLOCK


@pytest.fixture
def study(store):
    return labels.create_study(store, "Taste")


@pytest.fixture
def anna(store):
    return labels.annotator(store, "Anna")


def ids(items):
    return [item["pair_id"] for item in items]


def rows(store, query="SELECT * FROM preference ORDER BY id"):
    with store.reader() as session:
        return [dict(row) for row in session.execute(text(query)).mappings()]


# --- prompts, splits, pairs


@pytest.mark.parametrize("text_", ["A red  circle.", "a RED circle", "  ﬁne Étoile . ", "ends with two..", "Straße"])
def test_the_split_is_the_one_of_scenes(text_):
    assert labels.normalise(text_) == world.normalise(text_)
    assert labels.split_of(text_, "scenes") == world.split_of(text_, "scenes")


def test_the_split_ignores_spelling_and_holds_out_a_fifth():
    for twin in ("a red circle", "A  RED circle.", "\ta red\u00a0circle"):
        assert labels.split_of(twin, "salt") == labels.split_of("a red circle", "salt")
    heldout = sum(labels.split_of(f"prompt {number}", "s") == "heldout" for number in range(5000))
    assert 900 < heldout < 1100


def test_prompts_are_kept_letter_by_letter_and_found_again(store, study):
    texts = ["A red circle.", "a red circle", "A red circle."]
    first, second, third = labels.add_prompts(store, study.id, texts)
    assert (first.id, first.text) == (third.id, "A red circle.")
    assert second.id != first.id and second.key == first.key
    assert len(labels.study_prompts(store, study.id)) == 2


@pytest.mark.parametrize("bad", ["", "   ", "x" * 2001, "half \ud800"])
def test_bad_prompts_get_a_sentence(store, study, bad):
    with pytest.raises(LabelError, match="prompt"):
        labels.add_prompts(store, study.id, [bad])


def test_annotators_keep_their_kind(store, anna):
    assert labels.annotator(store, "  Anna ").id == anna.id
    with pytest.raises(LabelError, match="belongs to a human"):
        labels.annotator(store, "Anna", kind="simulated")
    with pytest.raises(LabelError, match="characters"):
        labels.annotator(store, "")


def test_a_study_name_is_taken_once(store, study):
    with pytest.raises(LabelError, match="already a study named 'Taste'"):
        labels.create_study(store, "Taste")


def test_the_same_two_pictures_are_one_pair_in_any_order(store, study):
    (pair,) = add_pairs(store, study, 1)
    again = labels.add_pair(store, study.id, pair.prompt_id, pair.second_id, pair.first_id, "import")
    assert again.id == pair.id and again.first_id == pair.first_id
    with pytest.raises(LabelError, match="same file"):
        labels.add_pair(store, study.id, pair.prompt_id, pair.first_id, pair.first_id, "queue")
    with pytest.raises(LabelError, match="two pictures that the lab has"):
        labels.add_pair(store, study.id, pair.prompt_id, pair.first_id, 999, "queue")


def test_one_picture_may_have_two_origins_but_one_file(store, study):
    data = picture_bytes(1)
    first = media.add_picture(store, data, provenance={"seed": 1})
    same = media.add_picture(store, data, provenance={"seed": 1})
    other = media.add_picture(store, data, provenance={"seed": 2})
    assert first.id == same.id != other.id and first.hash == other.hash
    assert len([path for path in store.media.root.rglob("*") if path.is_file()]) == 1


# --- the queue


def test_the_queue_is_stable_and_leaves_out_what_was_answered_or_given(store, study, anna):
    pairs = add_rows(store, study, 12)
    queue = ids(labels.next_pairs(store, study.id, anna.id, 5))
    assert queue == [pair.id for pair in pairs[:5]] == ids(labels.next_pairs(store, study.id, anna.id, 5))
    answer(store, study, anna, queue[0])
    assert ids(labels.next_pairs(store, study.id, anna.id, 2, exclude=queue[1:3])) == [pairs[3].id, pairs[4].id]
    ben = labels.annotator(store, "Ben")
    assert ids(labels.next_pairs(store, study.id, ben.id, 1)) == [pairs[0].id]
    other = labels.create_study(store, "Another question")
    assert labels.next_pairs(store, other.id, anna.id, 5) == []


def test_what_the_page_gets_tells_nothing_of_the_origin(store, study, anna):
    add_rows(store, study, 1)
    (item,) = labels.next_pairs(store, study.id, anna.id)
    assert set(item) == {
        "pair_id", "prompt_id", "prompt", "first", "first_width", "first_height", "second", "second_width",
        "second_height", "left",
    }  # fmt: skip


def test_sides_are_stable_and_balanced(store, study, anna):
    add_rows(store, study, 100)
    sides = [item["left"] for item in labels.next_pairs(store, study.id, anna.id, 100)]
    assert sides == [item["left"] for item in labels.next_pairs(store, study.id, anna.id, 100)]
    assert 30 < Counter(sides)["first"] < 70


def test_the_queue_survives_undo_after_a_long_answered_head(store, study, anna):
    pairs = add_rows(store, study, 30)
    for pair in pairs[:25]:
        answer(store, study, anna, pair.id)
        labels.next_pairs(store, study.id, anna.id, 2)
    fresh = [pair.id for pair in pairs[25:]]
    assert [each for each in ids(labels.next_pairs(store, study.id, anna.id, 30)) if each in fresh] == fresh
    for number in range(3):
        labels.undo(store, study.id, anna.id, f"undo-{number}")
    back = [pair.id for pair in pairs[22:]]
    assert [each for each in ids(labels.next_pairs(store, study.id, anna.id, 30)) if each in back] == back


# --- votes and undo


def test_a_retry_makes_no_second_label(store, study, anna):
    (pair,) = add_rows(store, study, 1)
    first = answer(store, study, anna, pair.id, key="same")
    assert answer(store, study, anna, pair.id, key="same") == first
    assert len(rows(store)) == 1
    with pytest.raises(LabelError, match="belongs to another answer"):
        answer(store, study, anna, pair.id, choice="second", key="same")
    with pytest.raises(LabelError, match="belongs to another answer"):
        answer(store, study, labels.annotator(store, "Ben"), pair.id, key="same")


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"choice": "both"}, "is not an answer"),
        ({"left": "up"}, "is not a side"),
        ({"pair_id": 999}, "does not ask"),
        ({"study_id": 999}, "does not ask"),
        ({"annotator_id": 999}, "annotator is not known"),
        ({"client_key": ""}, "client key"),
        ({"revokes": 1}, "earlier answer of your own"),
    ],
)
def test_bad_votes_get_a_sentence_and_leave_no_row(store, study, anna, wrong, sentence):
    (pair,) = add_rows(store, study, 1)
    good = {
        "study_id": study.id, "pair_id": pair.id, "annotator_id": anna.id, "choice": "first", "left": "first",
        "milliseconds": 5, "client_key": "k",
    }  # fmt: skip
    with pytest.raises(LabelError, match=sentence):
        labels.vote(store, **{**good, **wrong})
    assert rows(store) == []


def test_undo_takes_back_one_answer_at_a_time_and_restores_the_pair(store, study, anna):
    pairs = add_rows(store, study, 3)
    for pair in pairs[:2]:
        answer(store, study, anna, pair.id)
    assert labels.undo(store, study.id, anna.id, "u1")["pair_id"] == pairs[1].id
    assert labels.undo(store, study.id, anna.id, "u1")["pair_id"] == pairs[1].id  # a retry
    assert [row["pair_id"] for row in labels.effective(store, study.id)] == [pairs[0].id]
    assert labels.undo(store, study.id, anna.id, "u2")["pair_id"] == pairs[0].id
    assert labels.undo(store, study.id, anna.id, "u3") is None
    assert labels.effective(store, study.id) == []
    assert ids(labels.next_pairs(store, study.id, anna.id, 3)) == [pair.id for pair in pairs]
    answer(store, study, anna, pairs[0].id, choice="tie")
    assert [row["choice"] for row in labels.effective(store, study.id)] == ["tie"]
    assert len(rows(store)) == 5
    undone = rows(store)[2]
    assert (undone["choice"], undone["revokes"]) == (None, 2)


def test_undo_is_one_annotators_own(store, study, anna):
    ben = labels.annotator(store, "Ben")
    (pair,) = add_rows(store, study, 1)
    answer(store, study, anna, pair.id)
    assert labels.undo(store, study.id, ben.id, "u1") is None
    with pytest.raises(LabelError, match="key belongs to"):
        answer(store, study, anna, pair.id, key="v")
        labels.undo(store, study.id, anna.id, "v")


def test_a_changed_answer_revokes_the_old_one(store, study, anna):
    (pair,) = add_rows(store, study, 1)
    first = answer(store, study, anna, pair.id)
    changed = answer(store, study, anna, pair.id, choice="tie", revokes=first.id)
    assert [row["id"] for row in labels.effective(store, study.id)] == [changed.id]
    with pytest.raises(LabelError, match="already taken back"):
        answer(store, study, anna, pair.id, choice="second", revokes=first.id)
    labels.undo(store, study.id, anna.id, "u")
    assert labels.effective(store, study.id) == []


def test_simulated_labels_are_marked_for_ever(store, study, anna):
    judge = labels.annotator(store, "judge", kind="simulated")
    (pair,) = add_pairs(store, study, 1)
    answer(store, study, judge, pair.id)
    answer(store, study, anna, pair.id, choice="second")
    assert [row["simulated"] for row in labels.effective(store, study.id)] == [True, False]
    assert [line["target"] for line in labels.training_pairs(store, study.id)] == [0.5]
    assert [line["target"] for line in labels.training_pairs(store, study.id, include_simulated=False)] == [0.0]
    assert [line["target"] for line in labels.training_pairs(store, study.id, annotators=[judge.id])] == [1.0]


def test_ten_threads_lose_and_double_nothing(store, study):
    pairs = add_rows(store, study, 12)
    people = [labels.annotator(store, f"person {number}") for number in range(10)]
    start = threading.Barrier(10)

    def work(number: int) -> list[int]:
        start.wait()
        made = []
        for pair in pairs:
            key = f"{number}-{pair.id}"
            twice = [answer(store, study, people[number], pair.id, key=key).id for _ in range(2)]  # every vote retried
            assert twice[0] == twice[1]
            made.append(twice[0])
        return made

    with ThreadPoolExecutor(10) as pool:
        made = [row for each in pool.map(work, range(10)) for row in each]
    assert len(set(made)) == 120 == len(rows(store)) == len(labels.effective(store, study.id))


def test_ten_threads_with_one_key_make_one_label(store, study, anna):
    (pair,) = add_rows(store, study, 1)
    start = threading.Barrier(10)

    def work(_number: int) -> int:
        start.wait()
        return answer(store, study, anna, pair.id, key="the same request").id

    with ThreadPoolExecutor(10) as pool:
        assert len(set(pool.map(work, range(10)))) == 1
    assert len(rows(store)) == 1


def test_ten_threads_undoing_take_back_ten_answers(store, study, anna):
    for pair in add_rows(store, study, 15):
        answer(store, study, anna, pair.id)
    with ThreadPoolExecutor(10) as pool:
        back = list(pool.map(lambda n: labels.undo(store, study.id, anna.id, f"u{n}")["pair_id"], range(10)))
    assert len(set(back)) == 10 and len(labels.effective(store, study.id)) == 5


# --- repeats


def label_all(store, study, who, choose=lambda pair_id, again: "first", limit=10_000):
    """Answer the whole queue as a page does; returns the pair ids in the order shown."""
    order = []
    while len(order) < limit and (item := next(iter(labels.next_pairs(store, study.id, who.id)), None)):
        order.append(item["pair_id"])
        answer(store, study, who, item["pair_id"], choose(item["pair_id"], order.count(item["pair_id"]) > 1))
    return order


def test_one_pair_in_twenty_comes_twice_and_not_too_soon(store, study, anna):
    add_rows(store, study, 100)
    order = label_all(store, study, anna)
    twice = [pair for pair, times in Counter(order).items() if times == 2]
    marked = {row["pair_id"] for row in rows(store, "SELECT pair_id FROM study_pair WHERE repeat")}
    assert len(marked) == 100 // REPEAT_BLOCK and set(twice) <= marked and len(twice) >= 4
    assert max(Counter(order).values()) == 2
    for pair in twice:
        first, second = (place for place, each in enumerate(order) if each == pair)
        assert second - first > labels.REPEAT_GAP
    assert {row["pair_id"] for row in rows(store) if row["repeat"]} == set(twice)


def test_a_second_answer_is_a_row_of_its_own_and_the_later_one_counts(store, study, anna):
    add_rows(store, study, 60)
    label_all(store, study, anna, lambda _pair, again: "second" if again else "first")
    again = [row for row in rows(store) if row["repeat"]]
    assert again
    effective = {row["pair_id"]: row for row in labels.effective(store, study.id)}
    assert len(effective) == 60
    assert all(effective[row["pair_id"]]["choice"] == "second" for row in again)
    found = labels.agreement(store, study.id)["self"]
    assert found == {"n": len(again), "agree": 0, "percent": 0.0}


def test_undoing_a_repeat_leaves_the_first_answer_and_asks_again(store, study, anna):
    add_rows(store, study, 60)
    label_all(store, study, anna, limit=20)
    while not rows(store)[-1]["repeat"]:
        label_all(store, study, anna, lambda _pair, again: "first", limit=1)
    repeated = rows(store)[-1]["pair_id"]
    labels.undo(store, study.id, anna.id, "u0")
    answer(store, study, anna, repeated, "second")
    assert rows(store)[-1]["repeat"]
    assert labels.undo(store, study.id, anna.id, "u")["pair_id"] == repeated
    effective = {row["pair_id"]: row["choice"] for row in labels.effective(store, study.id)}
    assert effective[repeated] == "first"
    assert labels.next_pairs(store, study.id, anna.id)[0]["pair_id"] == repeated


def test_an_answer_from_a_second_window_is_no_repeat(store, study, anna):
    pairs = add_rows(store, study, 20)
    for pair in pairs:
        answer(store, study, anna, pair.id)
        answer(store, study, anna, pair.id, choice="second")
    assert not any(row["repeat"] for row in rows(store))
    assert {row["choice"] for row in labels.effective(store, study.id)} == {"second"}
    assert labels.agreement(store, study.id)["self"]["n"] == 0


def test_skipped_pairs_are_not_repeated(store, study, anna):
    add_rows(store, study, 60)
    order = label_all(store, study, anna, lambda _pair, _again: "skip")
    assert len(order) == len(set(order)) == 60


# --- what the labels say together


def test_training_pairs_are_soft_weighted_split_and_readable(store, study, tmp_path):
    people = [labels.annotator(store, name) for name in ("a", "b", "c")]
    pairs = add_pairs(store, study, 12, prompts=4)
    say = {0: "first first second", 1: "tie", 2: "second", 3: "both_bad", 4: "skip first", 5: "tie first skip"}
    for number, pair in enumerate(pairs):
        for who, choice in zip(people, say.get(number, "first").split(), strict=False):
            answer(store, study, who, pair.id, choice)
    lines = list(labels.training_pairs(store, study.id))
    targets = {int(line["id"]): line["target"] for line in lines}
    wanted = {0: 2 / 3, 1: 0.5, 2: 0.0, 4: 1.0, 5: 0.75}
    assert targets == {pair.id: wanted.get(n, 1.0) for n, pair in enumerate(pairs) if n != 3}
    prompts = Counter(line["prompt"] for line in lines)
    for split in ("train", "heldout"):
        part = [line for line in lines if line["split"] == split]
        if not part:
            continue
        assert np.mean([line["weight"] for line in part]) == pytest.approx(1.0)
        products = [line["weight"] * prompts[line["prompt"]] for line in part]
        assert products == pytest.approx([products[0]] * len(part))
    assert all(line["split"] == labels.split_of(line["prompt"], study.salt) for line in lines)

    import json

    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_pairs(path)
    assert [(pair.id, pair.target, pair.split) for pair in read] == [(x["id"], x["target"], x["split"]) for x in lines]
    assert all(pair.first.is_file() and pair.second.is_file() for pair in read)


def test_agreement_between_annotators_against_evalica(store, study):
    people = [labels.annotator(store, f"p{number}") for number in range(4)]
    pairs = add_rows(store, study, 30)
    random = np.random.default_rng(0)
    table = np.full((4, 30), None, dtype=object)
    for place, pair in enumerate(pairs):
        truth = random.choice(["first", "second", "tie", "both_bad"])
        for number, who in enumerate(people):
            if random.random() < 0.6:
                choice = truth if random.random() < 0.7 else random.choice(["first", "second", "skip"])
                answer(store, study, who, pair.id, choice)
                table[number, place] = None if choice == "skip" else choice
    found = labels.agreement(store, study.id)["between"]
    assert found["alpha"] == pytest.approx(evalica.alpha(pd.DataFrame(table)).alpha, abs=1e-9)
    couples = [
        table[a, place] == table[b, place]
        for place in range(30)
        for a in range(4)
        for b in range(a)
        if table[a, place] and table[b, place]
    ]
    assert (found["n"], found["agree"]) == (len(couples), sum(couples))
    assert found["percent"] == pytest.approx(100 * np.mean(couples))


@pytest.mark.parametrize(
    "values, apart, alpha", [({}, {}, None), ({"a": 2}, {"2": 0}, None), ({"a": 1, "b": 1}, {"2": 2}, 0.0)]
)
def test_alpha_at_its_edges(values, apart, alpha):
    assert numbers.krippendorff_alpha(values, apart) == alpha


def test_agreement_of_an_empty_study(store, study):
    found = labels.agreement(store, study.id)
    assert found["self"] == {"n": 0, "agree": 0, "percent": None}
    assert found["between"] == {"n": 0, "agree": 0, "percent": None, "alpha": None, "pairs": 0, "annotators": 0}


def test_counts_and_progress(store, study, anna):
    pairs = add_pairs(store, study, 10)
    for pair, choice in zip(pairs, ("first", "tie", "skip", "both_bad", "second"), strict=False):
        answer(store, study, anna, pair.id, choice)
    labels.undo(store, study.id, anna.id, "u")
    found = labels.counts(store, study.id)
    assert (found["pairs"], found["labels"]) == (10, 4)
    usable = [line["split"] for line in labels.training_pairs(store, study.id)]
    assert (found["train"], found["heldout"]) == (usable.count("train"), usable.count("heldout"))
    assert found["train"] + found["heldout"] == 2
    assert found["choices"] == {"first": 1, "tie": 1, "skip": 1, "both_bad": 1}
    assert found["annotators"] == [{"id": anna.id, "name": "Anna", "kind": "human", "labels": 4}]
    shown = labels.progress(store, study.id, anna.id)
    assert (shown["today"], shown["labels"], shown["left"]) == (4, 4, 6)
    assert shown["pace"] > 0


def test_unknown_studies_get_a_sentence(store):
    for ask in (labels.counts, labels.agreement, labels.effective, labels.training_pairs, labels.get_study):
        with pytest.raises(LabelError, match="no study 7"):
            ask(store, 7)
