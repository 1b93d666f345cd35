"""Comparisons as the page plans, shows and judges them; the secret is tested from the page's side."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from app import choices, comparisons
from app.comparisons import Side
from app.tabs import compare_form, compare_panel, search_form
from storage import checkpoints, jobs, labels, studies
from storage import comparisons as stored

BASE = {"base": "scenes", "adapters": []}


@pytest.fixture
def study(lab, store):
    row = studies.create_study(store, "Scenes", salt="scenes")
    studies.add_prompts(store, row.id, [f"a red ball number {i}" for i in range(150)])
    return row


@pytest.fixture
def run(store, study, tmp_path):
    """Three checkpoints of one run, the last one trained furthest."""
    job = jobs.submit(store, "train-lpo", "training", {}, study_id=study.id)
    return [
        checkpoints.add_checkpoint(
            store,
            kind="adapter",
            name=f"LPO 1, step {step}",
            path=tmp_path / f"step-{step:06d}",
            study_id=study.id,
            job_id=job.id,
            step=step,
            meta={"policy": BASE},
        )
        for step in (20, 40, 60)
    ]


@pytest.fixture
def voter(store):
    return studies.annotator(store, "Ada")


def sampled(lab, comparison_id: int) -> None:
    """What the job does, with flat pictures: policy a's are dark, policy b's bright."""
    for number, (prompt, seed) in enumerate(stored.missing_pairs(lab.store, comparison_id)):
        dark, bright = (Image.new("RGB", (16, 16), (shade, number % 256, number // 256)) for shade in (10, 240))
        stored.add_comparison_pair(
            lab.store, comparison_id, prompt, seed, dark, bright, {"made by": "a"}, {"made by": "b"}
        )
    stored.start_voting(lab.store, comparison_id)


def brightness(lab, digest: str) -> int:
    with Image.open(lab.store.media.path(digest)) as picture:
        return picture.getpixel((0, 0))[0]


def answer(lab, comparison_id: int, voter, count: int, wanted: str) -> None:
    """`count` votes for the policy `wanted` ("a", "b") or the choice "tie" or "skip", told by the pictures alone."""
    row = stored.get_comparison(lab.store, comparison_id)
    for item in stored.next_comparison_pairs(lab.store, comparison_id, voter.id, count):
        first_is_a = brightness(lab, item["first"]) < 100
        choice = wanted if wanted in ("tie", "skip") else "first" if first_is_a == (wanted == "a") else "second"
        labels.vote(
            lab.store,
            study_id=row.study_id,
            pair_id=item["pair_id"],
            annotator_id=voter.id,
            choice=choice,
            left=item["left"],
            milliseconds=500,
            client_key=f"vote {comparison_id} {item['pair_id']}",
        )


def new(lab, run, **options) -> int:
    return comparisons.create(lab, Side("base"), Side(str(run[-1].id)), **{"count": 6, **options})


def test_a_plan_draws_heldout_prompts_and_new_seeds(lab, run):
    rows = [stored.get_comparison(lab.store, new(lab, run, seeds=2)) for _ in range(2)]
    heldout = {row.text for row in studies.study_prompts(lab.store, rows[0].study_id, "heldout")}
    for row in rows:
        assert set(row.plan["prompts"]) <= heldout and len(row.plan["prompts"]) == 6
        assert row.plan["votes"] == 12 and not row.plan["peeking"]
        assert row.plan["sampler"] == {"steps": 20, "guidance_scale": 5.0, "eta": 0.0}
    assert rows[0].plan["seeds"] != rows[1].plan["seeds"]
    assert (rows[0].policy_a, rows[0].policy_b["adapters"][0]["path"]) == (BASE, run[-1].path)
    job = jobs.list_jobs(lab.store, kinds=("compare",))[0]
    assert job.config == {"comparison_id": rows[1].id}
    assert comparisons.compare_job(lab, rows[1].id) == job.id
    assert comparisons.latest(lab).id == rows[1].id


def test_stacks_strengths_and_names(lab, run):
    policy = comparisons.policy_of(lab, Side(str(run[0].id), 0.5, str(run[2].id), 1.5))
    assert [(each["path"], each["strength"]) for each in policy["adapters"]] == [(run[0].path, 0.5), (run[2].path, 1.5)]
    assert comparisons.policy_name(lab, policy) == "LPO 1, step 20 × 0.5 + LPO 1, step 60 × 1.5"
    assert comparisons.policy_name(lab, BASE) == "base"
    row = SimpleNamespace(policy_a=BASE, policy_b=BASE)
    assert comparisons.names(lab, row) == ("base (A)", "base (B)")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 150}, "150 prompts are asked for, but the study has"),
        ({"seeds": 0}, "Seeds of each prompt are 0; choose 1 to 16"),
        ({"votes": 7}, "7 votes cannot be taken from 6 prompts x 1 seeds"),
        ({"sampler": {"steps": 0}}, "steps"),
        ({"own_prompts": "\n".join(str(i) for i in range(300)), "seeds": 16}, "4800|too many"),
    ],
)
def test_bad_plans_are_one_sentence(lab, run, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        new(lab, run, **options)
    assert stored.list_comparisons(lab.store) == []


def test_equal_and_missing_policies(lab, run):
    with pytest.raises(ValueError, match="Both sides are the same policy"):
        comparisons.create(lab, Side("base"), Side("base"))
    with pytest.raises(ValueError, match="is gone; choose another"):
        comparisons.create(lab, Side("base"), Side("999"))


def test_own_prompts(lab, run):
    row = stored.get_comparison(lab.store, new(lab, run, own_prompts=" a cat \n\na dog\na cat\n"))
    assert row.plan["prompts"] == ["a cat", "a dog"] and row.plan["votes"] == 2


def test_a_fixed_vote_from_sampling_to_verdict(lab, run, voter):
    comparison_id = new(lab, run, count=10)
    face = compare_panel.face(lab, comparison_id, None)
    assert "waiting for a lab that runs with its workers" in face["title"]
    sampled(lab, comparison_id)
    job_folder = lab.store.runs_dir / comparisons.compare_job(lab, comparison_id)
    job_folder.mkdir(parents=True)
    voting = compare_panel.face(lab, comparison_id, None)
    for drawn in (face, voting):  # nothing of another comparison is left standing
        assert {"voting", "picker", "standing", "told", "sure", "out", "words", "pictures", "resume"} <= set(drawn)
    row = stored.get_comparison(lab.store, comparison_id)
    hashes = {
        item[side]
        for item in stored.next_comparison_pairs(lab.store, comparison_id, voter.id, 99)
        for side in ("first", "second")
    }
    assert len(hashes) == 20
    (job_folder / comparisons.JUDGE_FILE).write_text(json.dumps({h: brightness(lab, h) / 255 for h in hashes}))
    # nothing that the page gets before the verdict has a picture in it, let alone who made it
    assert not [h for h in hashes if h in repr(voting)]
    assert comparisons.judged(lab, row) == {}
    with pytest.raises(ValueError, match="verdict of this comparison is not out yet"):
        comparisons.rows(lab, row)
    with pytest.raises(ValueError, match="verdict of this comparison is not out yet"):
        comparisons.peek(lab, row)
    answer(lab, comparison_id, voter, 9, "b")
    assert "9 of 10 votes" in compare_panel.face(lab, comparison_id, None)["standing"]
    assert stored.get_comparison(lab.store, comparison_id).state == "voting"
    answer(lab, comparison_id, voter, 1, "a")
    out = compare_panel.face(lab, comparison_id, voting["drawn"])
    row = stored.get_comparison(lab.store, comparison_id)
    assert row.state == "complete" and set(out) == set(face)
    html, shown = out["words"], out["pictures"]
    assert "evidence that LPO 1, step 60 is preferred to base" in html.lower() or "Evidence" in html
    assert all(brightness(lab, each["a"]) == 10 and brightness(lab, each["b"]) == 240 for each in shown["rows"])
    assert sorted(each["vote"] for each in shown["rows"]) == ["a"] + ["b"] * 9
    assert "is -0.902" in html  # (10 - 240) / 255
    assert comparisons.verdict_words(lab, row) == "LPO 1, step 60 preferred (90%)"
    # the votes are labels of the study
    assert {pair.pair_id for pair in labels_of(lab, row)} == {v["pair_id"] for v in row.result["votes"]}


def labels_of(lab, row):
    from sqlmodel import select

    from storage.models import Preference

    with lab.store.reader() as session:
        return session.exec(select(Preference).where(Preference.study_id == row.study_id)).all()


def test_peeking_tells_how_it_stands_but_not_for_whom(lab, run, voter):
    texts = []
    for winner in ("a", "b"):
        comparison_id = new(lab, run, count=12, peeking=True)
        sampled(lab, comparison_id)
        answer(lab, comparison_id, voter, 12, winner)
        row = stored.get_comparison(lab.store, comparison_id)
        texts.append(comparisons.peek(lab, row))
        stored.complete(lab.store, comparison_id)
        row = stored.get_comparison(lab.store, comparison_id)
        result = comparisons.summary(row, stored.comparison_results(lab.store, row.id))
        assert result.method == "peeking" and result.decided
        assert (result.rate == 1.0) == (winner == "a")
    assert texts[0] == texts[1]
    assert "one of the two is preferred" in texts[0]
    assert "LPO" not in texts[0] and "base" not in texts[0]


def test_peeking_bets_on_complete_prompts(lab, run, voter):
    comparison_id = new(lab, run, count=3, seeds=2, peeking=True)
    sampled(lab, comparison_id)
    answer(lab, comparison_id, voter, 6, "a")
    row = stored.get_comparison(lab.store, comparison_id)
    result = comparisons.summary(row, stored.comparison_results(lab.store, row.id))
    assert (result.wins, result.prompts, result.counted) == (6, 3, 3)


def test_skips_do_not_block_the_verdict(lab, run, voter):
    comparison_id = new(lab, run, count=4)
    sampled(lab, comparison_id)
    answer(lab, comparison_id, voter, 1, "skip")
    with pytest.raises(ValueError, match="0 of 4 planned votes"):
        stored.complete(lab.store, comparison_id)
    answer(lab, comparison_id, voter, 9, "b")
    face = compare_panel.face(lab, comparison_id, None)
    assert "3 of 4 votes, 1 pairs were skipped" in face["standing"]
    assert stored.complete(lab.store, comparison_id).result["losses"] == 3


def test_giving_up_blindness_is_recorded(lab, run, voter):
    comparison_id = new(lab, run)
    sampled(lab, comparison_id)
    answer(lab, comparison_id, voter, 2, "b")
    stored.abandon(lab.store, comparison_id)
    out = compare_panel.face(lab, comparison_id, None)
    row = stored.get_comparison(lab.store, comparison_id)
    assert "No verdict: blindness was given up after 2 of 6 votes." in out["words"]
    assert comparisons.verdict_words(lab, row) == "blindness given up, no verdict"
    assert "blindness given up" in out["listing"]
    assert sorted(each["vote"] for each in out["pictures"]["rows"]) == ["", "", "", "", "b", "b"]


def test_earlier_checkpoints_are_offered(lab, run, voter):
    policy = {"base": "scenes", "adapters": [{"path": run[2].path, "strength": 0.75}]}
    assert [row.step for row in comparisons.earlier_checkpoints(lab, policy)] == [40, 20]
    assert comparisons.earlier_checkpoints(lab, BASE) == []
    comparison_id = new(lab, run)
    row = stored.get_comparison(lab.store, comparison_id)
    a, strength_a, b, strength_b, words = compare_form.fill(lab, row, True)
    assert (a, strength_a, b, strength_b) == ("base", 1.0, str(run[1].id), 1.0)
    assert words.startswith("LPO 1, step 40 is an earlier checkpoint")
    assert compare_form.fill(lab, row, False)[2] == str(run[2].id)
    sampled(lab, comparison_id)
    answer(lab, comparison_id, voter, 6, "a")
    html = compare_panel.face(lab, comparison_id, None)["words"]
    assert "over-optimised" in html and "step 20, 40" in html


def test_a_search_is_a_policy_of_its_own(lab, run):
    best = search_form.add(lab, "base", "best-of-n", "scenes", 4, 0, 1000)
    steps = search_form.add(lab, str(run[2].id), "steps", "scenes", 3, 200, 900)
    assert [value for _, value in choices.sampling_policies(lab)[-2:]] == [steps, best]
    assert search_form.name_of(lab, steps) == "LPO 1, step 60 + steps × 3, t 200–900 (Scenes, as shipped)"
    assert [value for _, value in choices.policies(lab)] == ["base", *(str(r.id) for r in reversed(run))]
    searched = comparisons.policy_of(lab, Side(steps, 0.5))
    assert searched["search"] == {"method": "steps", "lrm": "scenes", "candidates": 3, "t_min": 200, "t_max": 900}
    assert searched["adapters"] == [{"path": run[2].path, "strength": 0.5}]
    with pytest.raises(ValueError, match="set eta above 0"):
        comparisons.create(lab, Side("base"), Side(steps), count=3)
    comparison_id = comparisons.create(lab, Side(best), Side(steps), count=3, sampler={"eta": 1.0})
    row = stored.get_comparison(lab.store, comparison_id)
    assert comparisons.names(lab, row) == (
        "base + best of 4 (Scenes, as shipped)",
        "LPO 1, step 60 + steps × 3, t 200–900 (Scenes, as shipped)",
    )
    choices.forget_searches(lab)
    assert choices.sampling_policies(lab) == choices.policies(lab)
    assert compare_form.fill(lab, row, False)[:4] == [best, 1.0, steps, 1.0]  # "Vote again" brings them back
    earlier = compare_form.fill(lab, row, True)[2]
    assert choices.split(earlier) == (str(run[1].id), choices.split(steps)[1])
    seconds = [compare_form.estimate(compare_form.HELD_OUT, 10, 1, "", "base", b) for b in ("base", best, steps)]
    assert len(set(seconds)) == 3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("base", "steps", None, 4, 0, 1000), "No LRM is chosen"),
        (("base", "steps", "scenes", None, 0, 1000), "candidates is empty"),
        (("base", "steps", "scenes", 1, 0, 1000), "nothing to choose from"),
        (("base", "steps", "scenes", 65, 0, 1000), "candidates is 65"),
        (("base", "steps", "scenes", 4, 900, 100), "t_min"),
        (("base", "steps", "77", 4, 0, 1000), "is gone"),
        (("77", "steps", "scenes", 4, 0, 1000), "is gone"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(lab, study, values, sentence):
    with pytest.raises(ValueError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        search_form.add(lab, *values)
    assert choices.sampling_policies(lab) == [("base", "base")]


def test_texts_are_escaped(lab, run, voter):
    comparison_id = new(lab, run, own_prompts="<script>alert(1)</script>")
    sampled(lab, comparison_id)
    answer(lab, comparison_id, voter, 1, "b")
    run[2].name = "x"
    checkpoints.add_checkpoint(lab.store, kind="adapter", name="<b>bold</b>", path=run[2].path)
    out = compare_panel.face(lab, comparison_id, None)
    assert "<b>bold" not in out["listing"] and "<b>bold" not in out["words"]
    assert "&lt;b&gt;bold" in out["listing"] and "&lt;b&gt;bold" in out["words"]


def test_form_sentences(lab, run):
    values = ["base", 1.0, "", 1.0, str(run[0].id), 1.0, "", 1.0]
    with pytest.raises(ValueError, match="no prompts of your own"):
        compare_form.create(lab, *values, compare_form.OWN, 30, " ", 1, compare_form.FIXED, 5, 20, 5.0, 0.0)
    with pytest.raises(ValueError, match="steps is empty"):
        compare_form.create(lab, *values, compare_form.HELD_OUT, 5, "", 1, compare_form.FIXED, 5, None, 5.0, 0.0)
    comparison_id = compare_form.create(
        lab, *values, compare_form.HELD_OUT, 5, "", 1, compare_form.PEEK, None, 12, 3.0, 1.0
    )
    plan = stored.get_comparison(lab.store, comparison_id).plan
    assert plan["peeking"] and plan["sampler"] == {"steps": 12, "guidance_scale": 3.0, "eta": 1.0}
    assert compare_form.estimate(compare_form.HELD_OUT, 30, 2, "").startswith("60 pairs to vote on")
