"""Blind comparisons: nothing tells who made a picture before the verdict, and the plan is kept."""

import json
from collections import Counter

import pytest
from PIL import Image
from sqlalchemy import text
from storage_lab import add_pairs, answer, everything

from storage import browse, comparisons, exchange, labels
from storage.browse import Filters
from storage.labels import LabelError

PROMPTS = [f"a red circle number {number}" for number in range(6)]
A, B = {"policy": "secret adapter"}, {"policy": "plain base"}


@pytest.fixture
def study(store):
    return labels.create_study(store, "Taste")


@pytest.fixture
def anna(store):
    return labels.annotator(store, "Anna")


def plan(store, study, votes=12, seeds=(0, 1), **more):
    return comparisons.create_comparison(store, study.id, A, B, prompts=PROMPTS, seeds=list(seeds), votes=votes, **more)


def picture(policy: int, prompt: str, seed: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (policy * 100, PROMPTS.index(prompt) * 20, seed))


def fill(store, row):
    """Sample as the job does: policy a is always handed in first."""
    for prompt, seed in comparisons.missing_pairs(store, row.id):
        comparisons.add_comparison_pair(
            store, row.id, prompt, seed, picture(0, prompt, seed), picture(1, prompt, seed),
            {**A, "seed": seed}, {**B, "seed": seed},
        )  # fmt: skip
    return comparisons.start_voting(store, row.id)


def truth(store, row) -> dict[int, str]:
    with store.reader() as session:
        query = text("SELECT pair_id, a_is FROM comparison_pair WHERE comparison_id = :c")
        return dict(session.execute(query, {"c": row.id}).tuples().all())


def vote_all(store, study, row, who, prefer_a=lambda number: True):
    sides, number = truth(store, row), 0
    while items := comparisons.next_comparison_pairs(store, row.id, who.id):
        pair_id = items[0]["pair_id"]
        side = sides[pair_id] if prefer_a(number) else {"first": "second", "second": "first"}[sides[pair_id]]
        answer(store, study, who, pair_id, side)
        number += 1
    return number


def test_plans_are_checked(store, study):
    with pytest.raises(LabelError, match="plan 1 to 12 votes"):
        plan(store, study, votes=13)
    with pytest.raises(LabelError, match="at least one prompt"):
        plan(store, study, seeds=())
    with pytest.raises(LabelError, match="each named once"):
        plan(store, study, seeds=(1, 1))


def test_sampling_can_be_resumed_and_doubles_nothing(store, study):
    row = plan(store, study)
    assert comparisons.missing_pairs(store, row.id) == [(p, s) for p in PROMPTS for s in (0, 1)]
    for _ in range(2):
        comparisons.add_comparison_pair(
            store, row.id, PROMPTS[0], 0, picture(0, PROMPTS[0], 0), picture(1, PROMPTS[0], 0), A, B
        )
    assert len(comparisons.missing_pairs(store, row.id)) == 11
    with pytest.raises(LabelError, match="11 pairs of this comparison have no pictures"):
        comparisons.start_voting(store, row.id)
    assert fill(store, row).state == "voting"
    assert comparisons.comparison_progress(store, row.id) == {
        "state": "voting", "votes": 0, "planned": 12, "pairs": 12, "skipped": 0, "left": 12,
    }  # fmt: skip
    with pytest.raises(LabelError, match="only before the voting"):
        comparisons.add_comparison_pair(
            store, row.id, PROMPTS[0], 9, picture(0, PROMPTS[0], 9), picture(1, PROMPTS[0], 9), A, B
        )


def test_neither_ids_nor_order_tell_who_made_what(store, study, anna):
    """Over many pairs, policy a is first, has the smaller picture id, and is shown left about half of the time."""
    row = plan(store, study, votes=60, seeds=range(10))
    fill(store, row)
    with store.reader() as session:
        pairs = session.execute(
            text("""SELECT cp.a_is, pair.first_id < pair.second_id AS ordered FROM comparison_pair cp
                JOIN pair ON pair.id = cp.pair_id WHERE cp.comparison_id = :c"""),
            {"c": row.id},
        ).all()
    assert 13 < sum(pair.a_is == "first" for pair in pairs) < 47
    assert 13 < sum((pair.a_is == "first") == bool(pair.ordered) for pair in pairs) < 47
    sides = truth(store, row)
    shown = comparisons.next_comparison_pairs(store, row.id, anna.id, 60)
    assert 13 < sum(item["left"] == sides[item["pair_id"]] for item in shown) < 47
    assert [item["pair_id"] for item in shown] != sorted(item["pair_id"] for item in shown)


def test_nothing_tells_before_the_verdict(store, study, anna, tmp_path):
    add_pairs(store, study, 2)
    row = plan(store, study)
    fill(store, row)
    (item,) = comparisons.next_comparison_pairs(store, row.id, anna.id)
    (queued,) = labels.next_pairs(store, study.id, anna.id)
    assert item.keys() == queued.keys()
    answer(store, study, anna, item["pair_id"])
    hidden = set(truth(store, row))
    found = [
        labels.next_pairs(store, study.id, anna.id, 50), labels.effective(store, study.id),
        list(labels.training_pairs(store, study.id)), labels.counts(store, study.id), labels.agreement(store, study.id),
        *(everything(store, study.id, kind) for kind in ("pictures", "pairs", "labels")),
        comparisons.comparison_progress(store, row.id),
    ]  # fmt: skip
    told = json.dumps(found)
    assert "secret" not in told and "plain base" not in told and item["first"] not in told
    assert not hidden & {pair["pair_id"] for pair in labels.next_pairs(store, study.id, anna.id, 50)}
    for ask in (comparisons.comparison_results, comparisons.comparison_pairs):
        with pytest.raises(LabelError, match="planned votes"):
            ask(store, row.id)
    *_, last = exchange.export_jsonl(store, study.id, tmp_path / "out")
    assert last["done"] == 2 and "secret" not in (tmp_path / "out" / "pairs.jsonl").read_text()
    *_, last = exchange.export_parquet(store, study.id, tmp_path / "out.parquet")
    assert last["done"] == 0


def test_a_file_of_a_running_comparison_is_hidden_wherever_it_appears(store, study):
    """The base made the same picture for the label queue: its provenance there would give the side away."""
    from storage import media

    row = plan(store, study)
    fill(store, row)
    asked = labels.add_prompts(store, study.id, [PROMPTS[0]])[0]
    twin = media.add_picture(store, picture(1, PROMPTS[0], 0), prompt_id=asked.id, provenance=B)
    assert twin.id not in {each["id"] for each in everything(store, study.id, "pictures")}
    comparisons.abandon(store, row.id)
    assert twin.id in {each["id"] for each in everything(store, study.id, "pictures")}


def test_the_verdict_counts_the_planned_votes_by_prompt(store, study, anna):
    row = plan(store, study, votes=10)
    fill(store, row)
    with pytest.raises(LabelError, match="0 of 10 planned votes"):
        comparisons.complete(store, row.id)
    assert vote_all(store, study, row, anna, lambda number: number % 5 != 0) == 10
    done = comparisons.complete(store, row.id)
    assert (done.state, done.result["wins"], done.result["ties"], done.result["losses"]) == ("complete", 8, 0, 2)
    found = comparisons.comparison_results(store, row.id)
    assert found == done.result and len(found["votes"]) == 10
    assert {vote["prompt"] for vote in found["votes"]} <= set(PROMPTS)
    assert Counter(vote["outcome"] for vote in found["votes"]) == {"a": 8, "b": 2}
    who = comparisons.comparison_pairs(store, row.id)
    assert len(who) == 12
    for each in who:
        assert store.media.path(each["a"]).read_bytes() != store.media.path(each["b"]).read_bytes()
        with Image.open(store.media.path(each["a"])) as made:
            assert made.getpixel((5, 5))[0] == 0  # policy a painted without red
    assert comparisons.complete(store, row.id).completed_at == done.completed_at


def test_votes_are_preference_rows_and_pairs_join_the_queue_after_the_verdict(store, study, anna):
    row = plan(store, study)
    fill(store, row)
    vote_all(store, study, row, anna)
    assert labels.effective(store, study.id) == []
    comparisons.complete(store, row.id)
    effective = labels.effective(store, study.id)
    assert len(effective) == 12 and {label["comparison_id"] for label in effective} == {row.id}
    assert {line["split"] for line in labels.training_pairs(store, study.id)} <= {"train", "heldout"}
    assert labels.next_pairs(store, study.id, anna.id, 50) == []  # answered already
    ben = labels.annotator(store, "Ben")
    queue = labels.next_pairs(store, study.id, ben.id, 50)
    assert {item["pair_id"] for item in queue} == set(truth(store, row))
    late = answer(store, study, ben, queue[0]["pair_id"], "tie")  # an ordinary label now
    assert late.comparison_id is None
    assert comparisons.comparison_results(store, row.id)["wins"] == 12


def test_ties_both_bad_and_skip(store, study, anna):
    row = plan(store, study, votes=3)
    fill(store, row)
    pairs = [item["pair_id"] for item in comparisons.next_comparison_pairs(store, row.id, anna.id, 4)]
    for pair_id, choice in zip(pairs, ("tie", "skip", "both_bad"), strict=False):
        answer(store, study, anna, pair_id, choice)
    assert comparisons.comparison_progress(store, row.id)["votes"] == 2
    assert comparisons.comparison_progress(store, row.id)["skipped"] == 1
    answer(store, study, anna, pairs[3], truth(store, row)[pairs[3]])
    assert comparisons.next_comparison_pairs(store, row.id, anna.id) == []
    result = comparisons.complete(store, row.id).result
    assert (result["wins"], result["ties"], result["losses"], result["both_bad"]) == (1, 2, 0, 1)


def test_skipped_pairs_do_not_keep_the_verdict_back(store, study, anna):
    row = plan(store, study)
    fill(store, row)
    for number, item in enumerate(comparisons.next_comparison_pairs(store, row.id, anna.id, 12)):
        with pytest.raises(LabelError, match="of 12 planned"):
            comparisons.complete(store, row.id)
        answer(store, study, anna, item["pair_id"], "skip" if number < 2 else "tie")
    assert comparisons.comparison_progress(store, row.id)["left"] == 0
    assert comparisons.complete(store, row.id).result["ties"] == 10


def test_undo_stays_within_the_comparison_and_ends_with_the_verdict(store, study, anna):
    (queued,) = add_pairs(store, study, 1)
    answer(store, study, anna, queued.id)
    row = plan(store, study, votes=2)
    fill(store, row)
    vote_all(store, study, row, anna)
    back = labels.undo(store, study.id, anna.id, "u1", comparison_id=row.id)
    assert back["pair_id"] in truth(store, row)
    assert comparisons.comparison_progress(store, row.id)["votes"] == 1
    assert comparisons.next_comparison_pairs(store, row.id, anna.id)[0]["pair_id"] == back["pair_id"]
    assert labels.undo(store, study.id, anna.id, "u2")["pair_id"] == queued.id  # the label queue's own last answer
    vote_all(store, study, row, anna)
    comparisons.complete(store, row.id)
    with pytest.raises(LabelError, match="verdict of this comparison is out"):
        labels.undo(store, study.id, anna.id, "u3", comparison_id=row.id)
    assert labels.undo(store, study.id, anna.id, "u4") is None


def test_annotators_share_the_planned_votes(store, study, anna):
    ben = labels.annotator(store, "Ben")
    row = plan(store, study)
    fill(store, row)
    asked = []
    for number in range(12):
        who = (anna, ben)[number % 2]
        (item,) = comparisons.next_comparison_pairs(store, row.id, who.id)
        asked.append(item["pair_id"])
        answer(store, study, who, item["pair_id"])
    assert len(set(asked)) == 12  # a pair gets its second vote only when all have one
    assert len(comparisons.complete(store, row.id).result["votes"]) == 12


def test_a_repeated_comparison_asks_again(store, study, anna):
    first = plan(store, study)
    fill(store, first)
    vote_all(store, study, first, anna)
    comparisons.complete(store, first.id)
    second = plan(store, study)
    fill(store, second)
    assert vote_all(store, study, second, anna) == 12
    assert [row.id for row in comparisons.list_comparisons(store, study.id)] == [second.id, first.id]


def test_peeking_shows_outcomes_without_pairs(store, study, anna):
    row = plan(store, study, peeking=True)
    fill(store, row)
    (item,) = comparisons.next_comparison_pairs(store, row.id, anna.id)
    answer(store, study, anna, item["pair_id"], truth(store, row)[item["pair_id"]])
    found = comparisons.comparison_results(store, row.id)
    assert (found["wins"], len(found["votes"])) == (1, 1)
    assert "pair_id" not in found["votes"][0] and "seed" not in found["votes"][0]
    with pytest.raises(LabelError, match="told after the verdict"):
        comparisons.comparison_pairs(store, row.id)
    assert comparisons.complete(store, row.id).result["wins"] == 1  # a peeking plan may end at any time


def test_an_abandoned_comparison_frees_its_pairs(store, study, anna):
    row = plan(store, study)
    fill(store, row)
    (item,) = comparisons.next_comparison_pairs(store, row.id, anna.id)
    answer(store, study, anna, item["pair_id"])
    assert comparisons.abandon(store, row.id).state == "abandoned"
    assert len(labels.effective(store, study.id)) == 1
    assert len(labels.next_pairs(store, study.id, anna.id, 50)) == 11
    with pytest.raises(LabelError, match="only a running one"):
        comparisons.complete(store, row.id)


def test_the_very_same_picture_from_both_policies(store, study, anna):
    row = comparisons.create_comparison(store, study.id, A, A, prompts=PROMPTS[:1], seeds=[0], votes=1)
    same = picture(0, PROMPTS[0], 0)
    comparisons.add_comparison_pair(store, row.id, PROMPTS[0], 0, same, same, A, A)
    comparisons.start_voting(store, row.id)
    (item,) = comparisons.next_comparison_pairs(store, row.id, anna.id)
    answer(store, study, anna, item["pair_id"], "tie")
    assert comparisons.complete(store, row.id).result["ties"] == 1
    assert labels.next_pairs(store, study.id, labels.annotator(store, "Ben").id) == []
    assert next(labels.training_pairs(store, study.id))["target"] == 0.5


def test_unknown_comparisons_get_a_sentence(store):
    for ask in (comparisons.get_comparison, comparisons.complete, comparisons.missing_pairs):
        with pytest.raises(LabelError, match="no comparison 5"):
            ask(store, 5)


def test_browsing_filters_and_pages(store, study, anna):
    pairs = add_pairs(store, study, 10)
    judge = labels.annotator(store, "judge", "simulated")
    answer(store, study, anna, pairs[0].id, "tie")
    answer(store, study, judge, pairs[0].id)
    answer(store, study, anna, pairs[1].id)
    labels.undo(store, study.id, anna.id, "u")
    mine = {"store": store, "study_id": study.id}
    total, rows = browse.pairs(store, Filters(study_id=study.id), 2, 4)
    assert (total, len(rows)) == (10, 2)
    assert len(everything(**mine, kind="pairs", choice="unlabelled")) == 9
    assert len(everything(**mine, kind="pairs", text="NUMBER 3")) == 2
    assert len(everything(**mine, kind="pairs", text="%")) == 0
    assert len(everything(**mine, kind="pictures")) == 20
    assert len(everything(**mine, kind="pictures", origin="import")) == 0
    assert sum(len(everything(**mine, kind="pictures", split=split)) for split in ("train", "heldout")) == 20
    assert len(everything(**mine)) == 4
    (row,) = (each for each in everything(**mine) if each["kind"] == "simulated")
    assert (row["annotator"], row["choice"]) == ("judge", "first")
    (row,) = (each for each in everything(**mine) if each["status"] == "taken back")
    assert row["pair"] == pairs[1].id
