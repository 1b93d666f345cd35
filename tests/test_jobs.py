"""What a button may do with a job, and what the page reads of one."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from app import jobs
from app.security import ANNOTATOR_COOKIE
from app.supervisor import BATCH, ENOUGH, FEW, FIRST_BATCH, Refill, pairs_left
from lpo.config import LRMConfig, to_dict
from storage import checkpoints, labels
from storage import jobs as queue
from storage.jobs import JobError
from storage.models import Pair, Picture, Prompt, StudyPair


def config(**changes) -> dict:
    return to_dict(LRMConfig(**changes))


def end(lab, job_id: str, how) -> None:
    """Claims the job as some worker and ends it by `how` (a function of storage.jobs)."""
    queue.claim(lab.store, queue.get(lab.store, job_id).lane, "w")
    how(lab.store, job_id, "w")


def test_kinds_have_lanes_and_unknown_ones_are_refused(lab):
    for kind, lane in (("trace", "interactive"), ("train-lrm", "training"), ("import", "data")):
        job_id = jobs.submit(lab, kind, config() if kind == "train-lrm" else {})
        assert jobs.describe(lab, job_id)["lane"] == lane
    with pytest.raises(JobError, match="'dance' is not a kind of job"):
        jobs.submit(lab, "dance", {})


def test_a_new_trace_supersedes_the_older_ones_of_its_line_only(lab):
    """One person's traces in Curves leave those in Compare, and another person's, alone."""
    page = SimpleNamespace(cookies={}, session_hash="ada")
    other = SimpleNamespace(cookies={}, session_hash="ben")
    named = SimpleNamespace(cookies={ANNOTATOR_COOKIE: lab.signer.sign("ada")}, session_hash="before")
    reloaded = SimpleNamespace(cookies=named.cookies, session_hash="after")
    assert jobs.trace_line(lab, "curves", named) == jobs.trace_line(lab, "curves", reloaded)

    def submit(tab, who, kind="trace"):
        return jobs.submit(lab, kind, {}, lab.current_study().id, supersedes=jobs.trace_line(lab, tab, who))

    first = submit("curves", page)
    queue.claim(lab.store, "interactive", "w")
    kept = [submit("compare", page), submit("curves", other), jobs.submit(lab, "pairs", {"count": 1})]
    second, third = submit("curves", page), submit("curves", page)
    states = {job: jobs.describe(lab, job)["state"] for job in (first, second, third, *kept)}
    assert [states[job] for job in (first, second, third)] == ["stopping", "cancelled", "queued"]
    assert {states[job] for job in kept} == {"queued"}


def test_stop_resume_duplicate_delete(lab):
    job_id = jobs.submit(lab, "train-lrm", config(steps=7))
    jobs.stop(lab, job_id)
    assert jobs.describe(lab, job_id)["state"] == "cancelled"
    jobs.resume(lab, job_id)
    assert jobs.describe(lab, job_id)["state"] == "queued"
    with pytest.raises(JobError, match="stop it before deleting"):
        jobs.delete(lab, job_id)
    copy = jobs.duplicate(lab, job_id)
    assert copy != job_id and jobs.describe(lab, copy)["config"]["steps"] == 7
    jobs.stop(lab, job_id)
    jobs.run_dir(lab, job_id).mkdir()
    assert "run folder are deleted" in jobs.delete(lab, job_id)
    assert not jobs.run_dir(lab, job_id).exists() and [row["id"] for row in jobs.list_jobs(lab)] == [copy]
    with pytest.raises(JobError, match="There is no job"):
        jobs.describe(lab, job_id)


def test_deleting_a_job_keeps_checkpoints_that_can_still_be_chosen(lab):
    job_id = jobs.submit(lab, "train-lrm", config())
    folder = jobs.run_dir(lab, job_id) / "checkpoints" / "final"
    folder.mkdir(parents=True)
    row = checkpoints.add_checkpoint(lab.store, kind="lrm", name="LRM 1", path=folder, job_id=job_id)
    end(lab, job_id, queue.finish)
    assert "1 of its checkpoints" in jobs.delete(lab, job_id) and folder.exists()
    assert checkpoints.get_checkpoint(lab.store, row.id).job_id is None


def test_describe_reads_the_run_folder(lab):
    job_id = jobs.submit(lab, "train-lpo", {"prompts": "p.json"})
    queue.claim(lab.store, "training", "w")
    folder = jobs.run_dir(lab, job_id)
    (folder / "samples" / "step_000010").mkdir(parents=True)
    (folder / "samples" / "step_000010" / "prompt0_seed0.png").touch()
    rows = [{"step": n, "total": 9, "left_s": 9.0 - n} for n in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "to')
    (folder / "log.txt").write_text("hello\n")
    job = jobs.describe(lab, job_id)
    assert (job["metrics"], job["left_s"], job["log"]) == (rows, 6.0, "hello\n")
    assert [(s["step"], s["prompt"]) for s in job["samples"]] == [(10, "prompt0_seed0")]
    json.dumps(job)


def test_a_huge_log_and_long_metrics_stay_small(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {n}\n" for n in range(200_000)))
    tail = jobs.read_tail(path)
    assert len(tail) <= jobs.TAIL_BYTES and tail.startswith("line ") and tail.endswith("line 199999\n")
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(10_001)))
    rows = jobs.read_metrics(path)
    assert len(rows) <= jobs.METRICS_ROWS + 1 and rows[-1] == {"step": 10_000}
    steps = [row["step"] for row in rows]
    assert len({b - a for a, b in pairwise(steps)}) == 1


def add_pairs(lab, count: int) -> None:
    study = lab.current_study()
    with lab.store.session() as session:
        prompt = Prompt(text=f"a prompt {count}", key="a prompt")
        picture = Picture(hash="0" * 64, width=8, height=8)
        session.add_all([prompt, picture])
        session.flush()
        before = session.query(StudyPair).count()
        for n in range(count):
            pair = Pair(
                prompt_id=prompt.id, first_id=picture.id, second_id=picture.id, origin="form", key=f"{count}-{n}"
            )
            session.add(pair)
            session.flush()
            session.add(StudyPair(study_id=study.id, pair_id=pair.id, position=before + n))


def queued_pairs(lab) -> list[dict]:
    return [row for row in jobs.list_jobs(lab) if row["kind"] == "pairs"]


def test_the_queue_fills_itself_small_batch_first(lab):
    refill = Refill(lab)
    refill.step()
    (job,) = queued_pairs(lab)
    assert job["config"]["count"] == FIRST_BATCH and job["config"]["policies"][0]["base"] == "scenes"
    refill.step()
    assert len(queued_pairs(lab)) == 1, "one at a time"
    add_pairs(lab, FIRST_BATCH)
    end(lab, job["id"], queue.finish)
    refill.step()
    (job,) = queued_pairs(lab)
    assert job["config"]["count"] == BATCH, "the finished job is forgotten, the next one is bigger"


def test_the_queue_stops_filling_when_there_is_enough(lab):
    add_pairs(lab, ENOUGH)
    assert pairs_left(lab.store, lab.current_study().id) == (ENOUGH, ENOUGH)
    Refill(lab).step()
    assert queued_pairs(lab) == []


@pytest.mark.parametrize(("left", "filled"), [(FEW, 0), (FEW - 1, 1)])
def test_filling_waits_for_a_training_unless_few_are_left(lab, left, filled):
    add_pairs(lab, left)
    jobs.submit(lab, "train-lrm", config())
    queue.claim(lab.store, "training", "w")
    Refill(lab).step()
    assert len(queued_pairs(lab)) == filled


def test_filling_gives_way_and_backs_off_after_a_failure(lab):
    refill = Refill(lab)
    trace = jobs.submit(lab, "trace", {}, lab.current_study().id)
    refill.step()
    assert queued_pairs(lab) == []
    end(lab, trace, queue.finish)
    refill.step()
    (job,) = queued_pairs(lab)
    end(lab, job["id"], lambda store, job_id, worker: queue.fail(store, job_id, worker, "no model"))
    refill.step()
    assert len(queued_pairs(lab)) == 1, "it waits before it tries again"
    other = labels.create_study(lab.store, "Another", base="scenes")
    lab.choose_study(other.id)
    refill.step()
    assert {each["study_id"] for each in queued_pairs(lab)} == {other.id, job["study_id"]}, "not for another base"


def test_filling_uses_the_whole_pause_of_a_training_that_made_room(lab):
    """Else it would come back for a few pairs every few minutes, and each time cost the training a save and a start."""
    add_pairs(lab, FEW + 1)
    jobs.submit(lab, "train-lrm", config())
    training = queue.claim(lab.store, "training", "w")
    queue.heartbeat(lab.store, training.id, "w", message="Waits for the GPU until no pairs are drawn")
    Refill(lab).step()
    assert len(queued_pairs(lab)) == 1


def test_filling_leaves_the_old_study_at_once_when_another_is_chosen(lab):
    refill = Refill(lab)
    refill.step()
    (old,) = queued_pairs(lab)
    queue.claim(lab.store, "interactive", "w")
    asked = jobs.submit(lab, "pairs", {"count": 1}, lab.current_study().id)
    other = labels.create_study(lab.store, "Another", base="scenes")
    lab.choose_study(other.id)
    refill.step()
    assert queue.get(lab.store, old["id"]).state == "stopping"
    assert queue.get(lab.store, asked).state == "queued", "what a person has asked for stays"
    queue.finish(lab.store, old["id"], "w")
    end(lab, asked, queue.finish)
    refill.step()
    (new,) = [job for job in queued_pairs(lab) if job["state"] == "queued"]
    assert (new["study_id"], new["config"]["count"]) == (other.id, FIRST_BATCH)
