"""The interactive and data lanes in this process, on the tiny golden model: pairs, comparisons, export, import."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from app import jobs, worker_models
from app.worker import Worker
from app.worker_models import Models
from lpo.backbones import load_policy
from lpo.config import Policy
from lpo.sampling import sample
from storage import comparisons, labels, media
from storage import jobs as queue

BASE = str(Path(__file__).parent / "data" / "golden" / "tiny_sd15")
POLICY = {"base": BASE, "adapters": []}
SAMPLER = {"steps": 2, "guidance_scale": 3.0, "eta": 0.5}
PROMPTS = ["a red circle", "two blue stars", "the sea"]


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture
def study(lab):
    study = labels.create_study(lab.store, "Tiny", base=BASE)
    labels.add_prompts(lab.store, study.id, PROMPTS)
    lab.choose_study(study.id)
    return study


@pytest.fixture
def worker(lab, models, monkeypatch):
    monkeypatch.setattr(worker_models, "interactive_threads", lambda training: 1)
    worker = Worker(lab.store, "interactive", "cpu")
    worker.models = models
    return worker


def work(worker, job_id: str) -> dict:
    """Lets the worker do its next job, which must be this one."""
    job = queue.claim(worker.store, worker.lane, worker.name)
    assert job.id == job_id
    worker.work(job)
    job = queue.get(worker.store, job_id)
    assert job.state == "done", job.error
    return job.result


def pairs(lab, study, **config) -> str:
    full = {"count": 4, "policies": [POLICY], "prompts": None, "origin": "queue", "sampler": SAMPLER, **config}
    return jobs.submit(lab, "pairs", full, study.id)


def pictures(lab, study) -> list[tuple]:
    """(prompt, seeds, pictures) of every pair in the queue, read through what the page gets."""
    who = labels.annotator(lab.store, "Ada")
    found = []
    for shown in labels.next_pairs(lab.store, study.id, who.id, 100):
        rows = [row for side in ("first", "second") for row in by_hash(lab, shown[side])]
        found.append((shown["prompt"], [row.provenance["seed"] for row in rows], rows))
    return found


def by_hash(lab, digest: str) -> list[media.Picture]:
    with lab.store.reader() as session:
        return list(session.exec(media.select(media.Picture).where(media.Picture.hash == digest)))


def test_pairs_cover_the_prompts_and_never_repeat_a_seed(lab, study, worker):
    work(worker, pairs(lab, study))
    work(worker, pairs(lab, study, count=2))
    found = pictures(lab, study)
    assert sorted(prompt for prompt, _, _ in found) == sorted(PROMPTS * 2)
    assert sorted((prompt, *seeds) for prompt, seeds, _ in found) == sorted(
        (p, s, s + 1) for p in PROMPTS for s in (0, 2)
    )
    provenance = found[0][2][0].provenance
    assert provenance["policy"] == POLICY and {k: provenance[k] for k in SAMPLER} == SAMPLER


def test_a_stored_picture_is_the_one_that_the_command_line_draws(lab, study, worker):
    work(worker, pairs(lab, study, prompts=["the sea"], count=1, origin="form"))
    ((_, seeds, rows),) = pictures(lab, study)
    backbone = load_policy(Policy(BASE), "cpu")
    for (_, seed, drawn), row in zip(sample(backbone, ["the sea"], seeds, **SAMPLER), rows, strict=True):
        with Image.open(lab.store.media.path(row.hash)) as stored:
            assert row.provenance["seed"] == seed and stored.tobytes() == drawn.tobytes()
            assert stored.info == {}, "a file must not tell what made it"


def test_two_policies_draw_one_side_each(lab, study, worker, tmp_path):
    adapter = tmp_path / "adapter"
    backbone = load_policy(Policy(BASE), "cpu")
    backbone.add_trainable_adapter(2, ("to_q",), 0)
    for parameter in backbone.trainable_parameters().values():
        parameter.data += 0.1
    backbone.save_adapter(adapter)
    tuned = {"base": BASE, "adapters": [{"path": str(adapter), "strength": 0.5}]}
    work(worker, pairs(lab, study, policies=[POLICY, tuned], count=1))
    ((_, _, rows),) = pictures(lab, study)
    used = {row.provenance["seed"]: row.provenance["policy"]["adapters"] for row in rows}
    assert used[0] == [] and used[1][0]["strength"] == 0.5 and len(used[1][0]["hash"]) == 64


def test_filling_gives_way_and_own_pairs_let_others_pass(lab, study, worker):
    first = pairs(lab, study, count=40)
    second = pairs(lab, study, prompts=["the sea"], count=1, origin="form")
    assert work(worker, first)["pairs"] == 0
    row = compare(lab, study)
    assert work(worker, second)["pairs"] == 1
    assert comparisons.get_comparison(lab.store, row.id).state == "voting", "done inside the other job"


def compare(lab, study):
    row = comparisons.create_comparison(
        lab.store, study.id, POLICY, POLICY, prompts=PROMPTS[:2], seeds=[7, 8], votes=4, sampler=SAMPLER
    )
    jobs.submit(lab, "compare", {"comparison_id": row.id}, study.id)
    return row


def test_a_comparison_opens_when_all_its_pictures_are_there(lab, study, worker):
    row = compare(lab, study)
    work(worker, jobs.list_jobs(lab)[0]["id"])
    assert comparisons.get_comparison(lab.store, row.id).state == "voting"
    comparisons.abandon(lab.store, row.id)
    told = comparisons.comparison_pairs(lab.store, row.id)
    assert [(pair["prompt"], pair["seed"]) for pair in told] == [(p, s) for p in PROMPTS[:2] for s in (7, 8)]
    assert all(pair["a"] == pair["b"] for pair in told), "the same policy and seed draw the same picture"


def test_a_stopped_comparison_goes_on_where_it_was(lab, study, worker, monkeypatch):
    row = compare(lab, study)
    job_id = jobs.list_jobs(lab)[0]["id"]
    monkeypatch.setattr("app.worker_compare.batch", lambda task, policy: 1)
    monkeypatch.setattr("app.worker_task.Task.stopping", property(lambda task: done(lab, row.id) == 2))
    worker.work(queue.claim(lab.store, "interactive", worker.name))
    assert queue.get(lab.store, job_id).state == "stopped"
    monkeypatch.setattr("app.worker_task.Task.stopping", False)
    jobs.resume(lab, job_id)
    work(worker, job_id)
    assert done(lab, row.id) == 4


def done(lab, comparison_id: int) -> int:
    return 4 - len(comparisons.missing_pairs(lab.store, comparison_id))


def test_a_missing_model_is_one_sentence(lab, study, worker):
    job_id = pairs(lab, study, policies=[{"base": "/nowhere", "adapters": []}])
    worker.work(queue.claim(lab.store, "interactive", worker.name))
    job = jobs.describe(lab, job_id)
    assert job["state"] == "failed" and job["error"].startswith("There is no model at /nowhere")


def test_what_nobody_foresaw_is_one_sentence_and_a_log(lab, study, worker, monkeypatch):
    monkeypatch.setattr("app.worker_pairs.choose", lambda *_: 1 / 0)
    job_id = pairs(lab, study)
    worker.work(queue.claim(lab.store, "interactive", worker.name))
    job = jobs.describe(lab, job_id)
    assert job["error"].startswith("The job failed unexpectedly (ZeroDivisionError")
    assert "Traceback" in job["log"] and "Traceback" not in job["error"]


def test_an_export_comes_back_as_an_import(lab, labelled_study):
    worker = Worker(lab.store, "data")
    for kind in ("zip", "parquet"):
        job_id = jobs.submit(lab, "export", {"format": kind, "study_id": labelled_study.id}, labelled_study.id)
        result = work(worker, job_id)
        file = jobs.run_dir(lab, job_id) / result["path"]
        assert file.stat().st_size == result["bytes"] and result["done"] == 2
        upload = lab.store.cache_dir / "uploads" / kind
        upload.mkdir(parents=True)
        shutil.copyfile(file, upload / file.name)
        other = labels.create_study(lab.store, f"Back from {kind}", base="scenes")
        config = {"upload": kind, "name": file.name, "study_id": other.id}
        tally = work(worker, jobs.submit(lab, "import", config, other.id))
        assert (tally["done"], tally["labels"], tally["rejected"]) == (2, 2, {}), json.dumps(tally)
        assert not upload.exists()
