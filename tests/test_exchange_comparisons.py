"""Comparisons travel with a study: plan, sides, votes, verdict; a running one stays behind, a false one is refused."""

import json

import pytest
from PIL import Image
from storage_lab import last

from storage import comparisons, exchange, labels

POLICIES = {"base": "scenes", "adapters": []}, {"base": "scenes", "adapters": [{"path": "a", "strength": 1.0}]}


def compare(store, study, name: str, votes: int, seeds=(1, 2, 3)):
    """A comparison of two prompts by three seeds whose pictures depend on the name; `votes` answers by two people."""
    row = comparisons.create_comparison(
        store, study.id, *POLICIES, prompts=["a cat", "a dog"], seeds=list(seeds), votes=4, sampler={"steps": 3}
    )
    for number, (prompt, seed) in enumerate(comparisons.missing_pairs(store, row.id)):
        pictures = [Image.new("RGB", (8, 8), (20 * number, 40 * side, len(name))) for side in (0, 1)]
        comparisons.add_comparison_pair(store, row.id, prompt, seed, *pictures, {"policy": "a"}, {"policy": "b"})
    comparisons.start_voting(store, row.id)
    people = [labels.annotator(store, "Ada"), labels.annotator(store, "Ben")]
    for number in range(votes):
        who = people[number % 2]
        (item,) = comparisons.next_comparison_pairs(store, row.id, who.id, 1)
        labels.vote(
            store, study_id=study.id, pair_id=item["pair_id"], annotator_id=who.id, left=item["left"], milliseconds=5,
            choice=("first", "second", "tie", "both_bad")[number % 4], client_key=f"{name}-{number}",
        )  # fmt: skip
    return row


@pytest.fixture
def study(store):
    """One complete comparison (with an undone vote before it), an abandoned one of the same pictures, a running one."""
    study = labels.create_study(store, "Taste", salt="pepper")
    done = compare(store, study, "done", 3)
    ada = labels.annotator(store, "Ada")
    labels.undo(store, study.id, ada.id, "undo", comparison_id=done.id)
    for number in range(2):
        (item,) = comparisons.next_comparison_pairs(store, done.id, ada.id, 1)
        labels.vote(
            store, study_id=study.id, pair_id=item["pair_id"], annotator_id=ada.id, left="first", milliseconds=5,
            choice="first", client_key=f"again-{number}",
        )  # fmt: skip
    comparisons.complete(store, done.id)
    comparisons.abandon(store, compare(store, study, "twin", 2, seeds=(7, 8, 9)).id)
    compare(store, study, "open", 1)
    return study


def story(store, study_id) -> list:
    """What the study's finished comparisons say, without ids."""
    out = []
    for row in comparisons.list_comparisons(store, study_id):
        if row.state not in ("complete", "abandoned"):
            continue
        people = {who.id: who.name for who in labels.list_annotators(store)}
        result = comparisons.comparison_results(store, row.id)
        votes = [(v["prompt"], v["seed"], people[v["annotator_id"]], v["outcome"]) for v in result["votes"]]
        pairs = [(p["prompt"], p["seed"], p["a"], p["b"]) for p in comparisons.comparison_pairs(store, row.id)]
        totals = [result[name] for name in ("wins", "ties", "losses", "both_bad")]
        if row.state == "abandoned":  # counted anew each time, in the order of the rows here
            votes.sort()
        out.append((row.state, row.plan, row.policy_a, row.policy_b, row.seed, row.completed_at, totals, votes, pairs))
    return out


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_finished_comparisons_go_out_and_come_back(store, study, other, tmp_path, name):
    last(exchange.export_jsonl(store, study.id, tmp_path / name))
    state = last(exchange.import_data(other, tmp_path / name))
    assert state["rejected"] == {}
    told = story(store, study.id)
    assert [each[0] for each in told] == ["abandoned", "complete"]
    assert len(told[1][7]) == 4 and len(told[1][8]) == 6
    assert story(other, state["study_id"]) == told
    assert list(labels.training_pairs(other, state["study_id"])) != []
    again = last(exchange.import_data(other, tmp_path / name))
    assert (again["pairs"], again["labels"], again["rejected"]) == (0, 0, {})
    assert story(other, state["study_id"]) == told
    home = last(exchange.import_data(store, tmp_path / name))
    assert (home["pairs"], home["labels"]) == (0, 0) and story(store, study.id) == told
    assert len(comparisons.list_comparisons(store, study.id)) == 3


def test_two_comparisons_may_have_drawn_the_same_pictures(store, study, other, tmp_path):
    """As "done" again with the same seeds: pairs of the same key, each asked by its own comparison."""
    comparisons.abandon(store, compare(store, study, "abcd", 4).id)  # a name as long as "done": the same pictures
    last(exchange.export_jsonl(store, study.id, tmp_path / "out"))
    state = last(exchange.import_data(other, tmp_path / "out"))
    assert state["rejected"] == {}
    assert sorted(map(repr, story(other, state["study_id"]))) == sorted(map(repr, story(store, study.id)))


def test_a_running_comparison_does_not_travel(store, study, tmp_path):
    last(exchange.export_jsonl(store, study.id, tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["complete", "abandoned"]
    text = (tmp_path / "out" / "pairs.jsonl").read_text()
    assert "open-0" not in text and "done-0" in text


def test_a_killed_import_goes_on_and_gets_its_verdict(store, study, other, tmp_path):
    last(exchange.export_jsonl(store, study.id, tmp_path / "out"))
    steps = exchange.import_data(other, tmp_path / "out")
    state = next(steps)
    steps.close()
    assert {row.state for row in comparisons.list_comparisons(other, state["study_id"])} == {"abandoned"}
    state = last(exchange.import_data(other, tmp_path / "out"))
    assert state["resumed"] == 10
    assert story(other, state["study_id"]) == story(store, study.id)


@pytest.mark.parametrize(
    ("change", "reason", "states"),
    [
        ({"wins": 9}, "do not give the verdict", ["abandoned", "abandoned"]),
        ({"counted": []}, "do not give the verdict", ["abandoned", "abandoned"]),
        ({"state": "voting"}, "plan, policies, times", ["abandoned"]),
        ({"plan": {"votes": 0}}, "plan, policies, times", ["abandoned"]),
        ({"key": "x"}, "plan, policies, times", ["abandoned"]),
        ({"policy_a": "me"}, "plan, policies, times", ["abandoned"]),
        ({"completed_at": None}, "plan, policies, times", ["abandoned"]),
        ("no json", "not a JSON object", ["abandoned"]),
    ],
)
def test_a_false_comparison_is_refused_and_its_votes_stay_labels(store, study, other, tmp_path, change, reason, states):
    last(exchange.export_jsonl(store, study.id, tmp_path / "out"))
    path = tmp_path / "out" / "comparisons.jsonl"
    first, second = path.read_text().splitlines()
    first = change if isinstance(change, str) else json.dumps({**json.loads(first), **change})
    path.write_text(f"{first}\n{second}\n")
    state = last(exchange.import_data(other, tmp_path / "out"))
    ((found, times),) = state["rejected"].items()
    assert reason in found and times == 1
    assert [row.state for row in comparisons.list_comparisons(other, state["study_id"])] == states
    assert len(labels.effective(other, state["study_id"])) == len(labels.effective(store, study.id))
