"""The compare job on a tiny model: same seeds for both, blind storage, resuming, provenance, the judge's file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worker_lab import TaskInHand

from app import comparisons, worker_compare
from app.worker_models import Models
from app.worker_task import Stopped
from lpo.backbones import load_policy
from lpo.config import Policy, from_dict
from lpo.sampling import sample
from storage import comparisons as stored
from storage import jobs, labels, studies
from storage.models import Picture

GOLDEN = Path(__file__).parent / "data" / "golden"
BASE = str(GOLDEN / "tiny_sd15")
POLICIES = (
    {"base": BASE, "adapters": []},
    {"base": BASE, "adapters": [{"path": str(GOLDEN / "lora_m1"), "strength": 2.0}]},
)
PROMPTS = ["a red circle", "a blue star", "a green heart", "a dog", "a cat"]
SAMPLER = {"steps": 2, "guidance_scale": 2.0, "eta": 0.0}
MODELS = Models()


def task_for(store, job, stop_after=None):
    return TaskInHand(store, job, MODELS, stop_after)


@pytest.fixture
def planned(store):
    study = studies.create_study(store, "Tiny", base=BASE)
    row = stored.create_comparison(
        store, study.id, *POLICIES, prompts=PROMPTS, seeds=[11, 12], votes=10, sampler=SAMPLER
    )
    return row, jobs.submit(store, "compare", "interactive", {"comparison_id": row.id}, study_id=study.id)


def pixels(store, digest: str) -> np.ndarray:
    with Image.open(store.media.path(digest)) as picture:
        return np.asarray(picture.convert("RGB"))


def test_both_policies_draw_what_sample_draws(store, planned):
    row, job = planned
    result = worker_compare.run(task_for(store, job))
    assert result == {"comparison_id": row.id, "pairs": 10}
    assert stored.get_comparison(store, row.id).state == "voting"
    stored.abandon(store, row.id)
    for side, policy in zip("ab", POLICIES, strict=True):
        backbone = load_policy(from_dict(Policy, policy), "cpu")
        wanted = {(PROMPTS[i], seed): np.asarray(p) for i, seed, p in sample(backbone, PROMPTS, [11, 12], **SAMPLER)}
        for pair in stored.comparison_pairs(store, row.id):
            got, drawn = pixels(store, pair[side]).astype(int), wanted[pair["prompt"], pair["seed"]].astype(int)
            assert np.abs(got - drawn).max() <= 1, (side, pair)  # batches of other sizes round differently
    assert any(pair["a"] != pair["b"] for pair in stored.comparison_pairs(store, row.id))


def test_sides_and_order_are_drawn_by_lot(store, planned):
    row, job = planned
    worker_compare.run(task_for(store, job))
    who = studies.annotator(store, "Ada")
    asked = stored.next_comparison_pairs(store, row.id, who.id, 20)
    stored.abandon(store, row.id)
    made_by_a = {pair["pair_id"]: pair["a"] for pair in stored.comparison_pairs(store, row.id)}
    sides = [item["first"] == made_by_a[item["pair_id"]] for item in asked]
    assert len(asked) == 10 and len(set(sides)) == 2
    with store.reader() as session:
        pictures = [session.get(Picture, i) for i in range(1, 21)]
    adapters = [bool(p.provenance["policy"]["adapters"]) for p in pictures]
    assert len(set(adapters[::2])) == 2  # nor does the order of the rows tell
    origin = next(p.provenance for p in pictures if p.provenance["policy"]["adapters"])
    assert len(origin["policy"]["adapters"][0]["hash"]) == 64
    assert {key: origin[key] for key in SAMPLER} == SAMPLER and origin["seed"] in (11, 12)


def test_stop_and_resume_doubles_nothing(store, planned):
    row, job = planned
    with pytest.raises(Stopped):
        worker_compare.run(task_for(store, job, stop_after=1))
    made = comparisons_made(store, row.id)
    assert 0 < made < 10
    assert stored.get_comparison(store, row.id).state == "preparing"
    task = task_for(store, job)
    worker_compare.run(task)
    assert comparisons_made(store, row.id) == 10
    assert (made / 10, f"{made} of 10 pairs") in task.said


def comparisons_made(store, comparison_id: int) -> int:
    return stored.comparison_progress(store, comparison_id)["pairs"]


def test_judge_scores_wait_for_the_verdict(lab, store, monkeypatch):
    """Only the drawing is replaced: the judge really looks at rendered Scenes."""
    from lpo.scenes import world

    rng = np.random.default_rng(2)
    scenes = {world.caption(scene, rng): scene for scene in (world.sample_scene(rng, objects=1) for _ in range(3))}

    def draw(task, policy, rows, sampler):
        right = bool(policy["adapters"])
        return [
            world.render(scenes[p] if right else world.hard_negative(scenes[p], rng)) if p in scenes else
            Image.new("RGB", (64, 64), (seed % 256, 40 if right else 90, 3))
            for seed, p in rows
        ]  # fmt: skip

    monkeypatch.setattr(worker_compare, "draw", draw)
    monkeypatch.setattr(worker_compare, "batch", lambda task, policy: 2)
    monkeypatch.setattr(worker_compare, "provenance", lambda policy, sampler, seed: {"seed": seed, "policy": policy})
    study = studies.create_study(store, "Scenes")
    policies = {"base": "scenes", "adapters": []}, {"base": "scenes", "adapters": [{"path": "x", "strength": 1.0}]}
    row = stored.create_comparison(
        store, study.id, *policies, prompts=[*scenes, "a tax return"], seeds=[1], votes=4, sampler=SAMPLER
    )
    job = jobs.submit(store, "compare", "interactive", {"comparison_id": row.id}, study_id=study.id)
    worker_compare.run(task_for(store, job))
    assert len(json.loads((store.runs_dir / job.id / comparisons.JUDGE_FILE).read_text())) == 6
    assert comparisons.judged(lab, stored.get_comparison(store, row.id)) == {}
    who = studies.annotator(store, "Ada")
    for item in stored.next_comparison_pairs(store, row.id, who.id, 4):
        labels.vote(store, study_id=study.id, pair_id=item["pair_id"], annotator_id=who.id, choice="tie",
                    left=item["left"], milliseconds=1, client_key=f"key {item['pair_id']}")  # fmt: skip
    row = stored.complete(store, row.id)
    shown = comparisons.rows(lab, row)
    assert all(r["judge_b"] > r["judge_a"] for r in shown["rows"] if r["prompt"] in scenes)
    assert [r["judge_a"] for r in shown["rows"] if r["prompt"] == "a tax return"] == [None]
    assert f"a clear difference: {shown['b']} does better" in comparisons.judge_words(shown)
