"""The label routes without a browser: cookie, Origin, blindness, idempotence, undo, and sentences for what is wrong."""

import json
import re
from dataclasses import replace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import text as sql
from sqlmodel import select
from storage_lab import add_pairs

from app import label_routes
from app.security import ANNOTATOR_COOKIE
from storage import comparisons, labels
from storage import jobs as queue
from storage.models import ComparisonPair, Preference

ORIGIN = "http://127.0.0.1:7860"


@pytest.fixture
def study(lab, request):
    """A study of 5 pairs, or of as many as the test asks for."""
    made = labels.create_study(lab.store, "Tastes", question="Which <b>one</b>?")
    add_pairs(lab.store, made, getattr(request, "param", 5))
    return made


@pytest.fixture
def client(lab, study):
    app = FastAPI()
    app.include_router(label_routes.router(lab))
    with TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN}) as made:
        yield made


def body(client, study, /, **change) -> dict:
    """A vote on the first pair of the queue, valid but for `change`."""
    given = client.get("/api/pairs/next", params={"study": study.id, "n": 1}).json()
    item = given["pairs"][0]
    vote = {
        "study": study.id, "study_key": given["study_key"], "annotator": "Ada", "client_key": "key-00000001",
        "pair": item["pair"], "choice": "left", "left": item["left"], "milliseconds": 850,
    }  # fmt: skip
    return {**vote, **change}


def rows(lab) -> list[Preference]:
    with lab.store.reader() as session:
        return list(session.exec(select(Preference).order_by(Preference.id)).all())


def test_a_name_is_chosen_once_and_carried_by_a_strict_cookie(client, lab, study):
    assert client.get("/api/annotator").json() == {"name": None, "suggested": "me", "known": []}
    assert client.get("/api/pairs/next", params={"study": study.id}).status_code == 401
    answer = client.post("/api/annotator", json={"name": "  Ada   Lovelace "})
    assert answer.json() == {"name": "Ada Lovelace"}
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Ada" not in cookie.split(";")[0].split(".")[1]
    assert client.get("/api/annotator").json()["name"] == "Ada Lovelace"
    for name in ("", " ", "x" * 81):
        refused = client.post("/api/annotator", json={"name": name})
        assert refused.status_code == 400 and "80 characters" in refused.json()["error"]


def test_the_vote_route_checks_cookie_and_origin_itself(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    vote = body(client, study)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:7861"):
        assert client.post("/api/pairs/vote", json=vote, headers={"Origin": origin}).status_code == 403
        assert client.post("/api/annotator", json={"name": "Eve"}, headers={"Origin": origin}).status_code == 403
    del client.headers["Origin"]
    assert client.post("/api/pairs/vote", json=vote).status_code == 403
    client.headers["Origin"] = ORIGIN
    good = client.cookies.get(ANNOTATOR_COOKIE)
    forged = lab.signer.sign("Ada", purpose="login")
    for cookie in ("", "nonsense", good[:-2] + "xx", forged):
        client.cookies.set(ANNOTATOR_COOKIE, cookie, domain="127.0.0.1", path="/")
        assert client.post("/api/pairs/vote", json=vote).status_code == 401
    assert rows(lab) == []


def test_simulated_annotators_cannot_be_taken_over(client, lab, study):
    labels.annotator(lab.store, "judge", kind="simulated")
    refused = client.post("/api/annotator", json={"name": "judge"})
    assert refused.status_code == 400 and "simulated" in refused.json()["error"]
    client.cookies.set(ANNOTATOR_COOKIE, lab.signer.sign("judge"), domain="127.0.0.1", path="/")
    assert client.get("/api/pairs/next", params={"study": study.id}).status_code == 401


@pytest.mark.parametrize("study", [10], indirect=True)
def test_sides_become_pictures_on_the_server(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    expected = []
    for left, right in (("first", "second"), ("second", "first")):
        for choice, meant in (
            ("left", left),
            ("right", right),
            ("tie", "tie"),
            ("both_bad", "both_bad"),
            ("skip", "skip"),
        ):
            vote = body(client, study, choice=choice, left=left, client_key=f"key-{left}-{choice}")
            assert client.post("/api/pairs/vote", json=vote).status_code == 200
            expected.append((meant, left))
    assert [(row.choice, row.left) for row in rows(lab)] == expected


def test_a_retried_vote_is_one_label_and_undo_revokes_it(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    vote = body(client, study)
    answers = [client.post("/api/pairs/vote", json=vote).json() for _ in range(3)]
    assert [answer["saved"] for answer in answers] == ["key-00000001"] * 3
    assert answers[-1]["stats"] == {"today": 1, "labels": 1, "left": 4, "pace": None, "total": 1}
    undo = {name: vote[name] for name in ("study", "study_key", "annotator")} | {"client_key": "key-00000002"}
    for _ in range(2):
        taken = client.post("/api/pairs/undo", json=undo).json()
        assert taken["pair"]["pair"] == vote["pair"] and taken["stats"]["labels"] == 0
    assert [(row.choice, row.revokes) for row in rows(lab)] == [
        ("first" if vote["left"] == "first" else "second", None),
        (None, 1),
    ]
    nothing = client.post("/api/pairs/undo", json={**undo, "client_key": "key-00000003"}).json()
    assert nothing["pair"] is None


def test_a_vote_that_the_full_disk_refuses_is_sent_again(client, lab, study, monkeypatch):
    """503, not 400: with 400 the page would forget the vote."""
    client.post("/api/annotator", json={"name": "Ada"})
    vote = body(client, study)

    def full(*_, **__):
        with lab.store.session() as session:
            session.execute(sql("PRAGMA max_page_count = 1"))  # no page more than there are
            session.execute(sql("CREATE TABLE big AS SELECT randomblob(1000000)"))

    with monkeypatch.context() as patch:
        patch.setattr(labels, "vote", full)
        answer = client.post("/api/pairs/vote", json=vote)
    assert answer.status_code == 503
    sentence = r"Cannot write .* \(database or disk is full\); make room on that disk\."
    assert re.fullmatch(sentence, answer.json()["error"])
    assert rows(lab) == []
    lab.store.engine.dispose()  # and with it the connection that must not grow
    assert client.post("/api/pairs/vote", json=vote).status_code == 200
    assert len(rows(lab)) == 1


def test_votes_of_another_person_or_another_lab_are_kept_apart(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    vote = body(client, study)
    assert client.post("/api/pairs/vote", json={**vote, "study_key": "0" * 16}).status_code == 410
    client.post("/api/annotator", json={"name": "Bob"})
    refused = client.post("/api/pairs/vote", json=vote)
    assert refused.status_code == 409 and "Ada" in refused.json()["error"]
    assert rows(lab) == []


@pytest.mark.parametrize("study", [30], indirect=True)
def test_sides_are_randomised_and_stay_for_a_person(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    given = [client.get("/api/pairs/next", params={"study": study.id, "n": 30}).json()["pairs"] for _ in range(2)]
    assert given[0] == given[1]
    assert 6 <= sum(item["left"] == "first" for item in given[0]) <= 24
    shown = client.get("/api/pairs/next", params={"study": study.id, "n": 2, "exclude": str(given[0][0]["pair"])})
    assert [item["pair"] for item in shown.json()["pairs"]] == [item["pair"] for item in given[0][1:3]]


WRONG_VOTES = (
    {"choice": "first"}, {"choice": None}, {"left": "left"}, {"pair": 0}, {"pair": "one"}, {"pair": 10**30},
    {"pair": 999_999}, {"study": 77}, {"client_key": "x"}, {"client_key": "x" * 65}, {"milliseconds": -1},
    {"comparison": 5}, {"annotator": None},
)  # fmt: skip
WRONG_QUERIES = ({"n": 0}, {"n": 1000}, {"exclude": "1,a"}, {"exclude": "1" * 9000}, {"study": "x"})


def test_bad_requests_get_one_sentence(client, lab, study):
    client.post("/api/annotator", json={"name": "Ada"})
    answers = [client.post("/api/pairs/vote", json=body(client, study, **wrong)) for wrong in WRONG_VOTES]
    answers += [client.get("/api/pairs/next", params={"study": study.id, **wrong}) for wrong in WRONG_QUERIES]
    answers.append(client.post("/api/pairs/vote", content=b"{", headers={"content-type": "application/json"}))
    for answer in answers:
        assert answer.status_code == 400 and list(answer.json()) == ["error"]
        assert answer.json()["error"].rstrip(".").count(". ") == 0
    assert answers[-1].json()["error"].startswith("This request is wrong (json decode error")
    assert rows(lab) == []


def test_a_comparison_tells_nothing_but_pictures(client, lab, study):
    """No answer, header or id tells which policy made a picture; every answer looks like one of the label queue."""
    policies = [
        {"base": "scenes", "adapters": []},
        {"base": "scenes", "adapters": [{"path": "secret", "strength": 1.0}]},
    ]
    prompts = [f"prompt number {number}" for number in range(4)]
    made = comparisons.create_comparison(lab.store, study.id, *policies, prompts=prompts, seeds=[5, 6], votes=3)
    waiting = {"study": study.id, "comparison": made.id}
    client.post("/api/annotator", json={"name": "Ada"})
    assert client.get("/api/pairs/next", params=waiting).json()["state"] == "filling"
    for number, prompt in enumerate(prompts):
        for seed in (5, 6):
            sides = [Image.new("RGB", (16, 16), (number * 9, seed, shade)) for shade in (7, 90)]
            comparisons.add_comparison_pair(lab.store, made.id, prompt, seed, *sides, {"policy": "A"}, {"policy": "B"})
    comparisons.start_voting(lab.store, made.id)
    said = []
    for number in range(3):
        answer = client.get("/api/pairs/next", params=waiting)
        said += [answer.text, str(answer.headers)]
        given = answer.json()
        queue_item = client.get("/api/pairs/next", params={"study": study.id, "n": 1}).json()["pairs"][0]
        assert given["pairs"][0].keys() == queue_item.keys()
        item = given["pairs"][0]
        vote = {
            "study": study.id, "study_key": given["study_key"], "annotator": "Ada", "comparison": made.id,
            "client_key": f"blind-{number:04d}", "pair": item["pair"], "choice": "left", "left": item["left"],
            "milliseconds": 5,
        }  # fmt: skip
        answer = client.post("/api/pairs/vote", json=vote)
        said += [answer.text, str(answer.headers)]
        assert answer.json()["stats"] == {"votes": number + 1, "planned": 3}
    finished = client.get("/api/pairs/next", params=waiting).json()
    assert finished["state"] == "done" and finished["pairs"] == []
    for text in said:
        assert not any(word in text for word in ("secret", "policy", "a_is", "seed", "adapter", '"A"', '"B"'))
    # and `left` says nothing either: over pairs and annotators it is independent of which side policy a made
    with lab.store.reader() as session:
        sides = {row.pair_id: row.a_is for row in session.exec(select(ComparisonPair)).all()}
    assert len(sides) == 8 and [row.comparison_id for row in rows(lab)] == [made.id] * 3
    undo = {
        "study": study.id,
        "study_key": finished["study_key"],
        "annotator": "Ada",
        "comparison": made.id,
        "client_key": "undo-0001",
    }
    assert client.post("/api/pairs/undo", json=undo).json()["stats"]["votes"] == 2


def test_what_an_empty_queue_says(client, lab):
    """Filling while a job makes pairs, its sentence if it failed, stuck if nobody makes any, else ready."""
    empty = labels.create_study(lab.store, "Empty")
    client.post("/api/annotator", json={"name": "Ada"})

    def state() -> dict:
        return client.get("/api/pairs/next", params={"study": empty.id}).json()

    assert state()["state"] == "stuck" and "started with --no-workers" in state()["message"]
    job = queue.submit(lab.store, "pairs", "interactive", {}, study_id=empty.id)
    assert (state()["state"], state()["progress"]) == ("filling", None) and "--no-workers" in state()["message"]
    queue.claim(lab.store, "interactive", "worker")
    queue.heartbeat(lab.store, job.id, "worker", 0.25, "1 of 4 pairs")
    assert {name: state()[name] for name in ("state", "message", "progress")} == {
        "state": "filling", "message": "1 of 4 pairs", "progress": 0.25,
    }  # fmt: skip
    lab.settings = replace(lab.settings, workers=True)
    queue.fail(lab.store, job.id, "worker", "The model folder /x does not exist.")
    assert state()["state"] == "stuck" and "The model folder /x does not exist. Mend that" in state()["message"]
    queue.delete_job(lab.store, job.id)
    assert state()["state"] == "stuck" and "chosen another study" in state()["message"]  # the one of the fixture
    pair = add_pairs(lab.store, empty, 1)[0]
    given = state()
    assert given["state"] == "ready" and given["stats"]["left"] == 1
    assert given["pairs"][0]["pair"] == pair.id and json.dumps(given).count("media/") == 2
