"""Training jobs through real worker processes: progress, stop and resume, kill and adoption, and how failures read.

The trainings are tests/fakes/lpo.py: what is tested here is the care of processes, not what they compute.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, wait_for
from worker_lab import ENDLESS, enough, trains

from app import jobs, worker_device, worker_training
from app.worker_training import is_running
from lpo.config import ConfigError, LRMConfig, to_dict
from storage import checkpoints
from storage import jobs as queue
from storage.jobs import JobError

WORKER = [sys.executable, str(ROOT / "tests" / "fakes" / "worker.py")]


@pytest.fixture
def workers(store):
    """Starts training workers; all are killed afterwards, and so are their children."""
    started = []

    def start() -> subprocess.Popen:
        command = [*WORKER, "--lane", "training", "--data-dir", str(store.data_dir), "--launcher", str(os.getpid())]
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(store.runs_dir) in part for part in process.info["cmdline"] or []):
            process.kill()


def submit(lab, study, steps: int = 10, lr: float = 1e-3) -> str:
    return jobs.submit(lab, "train-lrm", to_dict(LRMConfig(steps=steps, lr=lr)), study.id)


def state(lab, job_id: str) -> str:
    return queue.get(lab.store, job_id).state


def until(lab, job_id: str, *states: str) -> dict:
    wait_for(lambda: state(lab, job_id) in states, what=f"{states} of {jobs.describe(lab, job_id)}")
    return jobs.describe(lab, job_id)


def test_a_training_runs_and_its_checkpoints_can_be_chosen(lab, labelled_study, workers):
    job_id = submit(lab, labelled_study)
    workers()
    job = until(lab, job_id, "done")
    assert job["progress"] == 1.0 and job["result"]["steps"] == 10 and len(job["metrics"]) == 10
    lines = [json.loads(line) for line in (Path(job["run_dir"]) / "pairs.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "heldout"} and all(line["target"] == 1.0 for line in lines)
    rows = checkpoints.list_checkpoints(lab.store, "lrm", job_id=job_id)
    assert {row.name for row in rows} == {"LRM 1", "LRM 1, step 1"}
    assert [row.name for row in rows if row.meta["final"]] == ["LRM 1"]
    assert (Path(job["run_dir"]) / "starts.txt").read_text() == "0\n"


def test_a_training_on_two_devices_stops_and_goes_on_on_one(lab, labelled_study, workers):
    config = to_dict(LRMConfig(steps=ENDLESS, lr=1e-3))
    with pytest.raises(JobError, match="2 devices are asked for, but this machine has 1"):
        jobs.submit(lab, "train-lrm", {**config, "processes": 2}, labelled_study.id)
    checkpoints.set_setting(lab.store, "devices", 2)
    job_id = jobs.submit(lab, "train-lrm", {**config, "processes": 2}, labelled_study.id)
    workers()
    folder = jobs.run_dir(lab, job_id)
    launcher = trains(lab, job_id)
    wait_for((folder / "threads-1.txt").exists, what="the second process")
    assert len(launcher.children()) == 2
    jobs.stop(lab, job_id)
    until(lab, job_id, "stopped")
    assert not launcher.is_running()
    assert json.loads((folder / "config.json").read_text())["steps"] == ENDLESS
    assert 2 * int((folder / "threads-1.txt").read_text()) <= max(2, worker_device.cores())
    checkpoints.set_setting(lab.store, "devices", 1)  # a GPU is gone
    (folder / "config.json").write_text(json.dumps({**config, "steps": len(jobs.describe(lab, job_id)["metrics"]) + 3}))
    jobs.resume(lab, job_id)
    job = until(lab, job_id, "done")
    first, second = map(int, (folder / "starts.txt").read_text().split())
    assert first == 0 and second > 0 and job["metrics"][-1]["step"] == second + 3


def test_what_a_launcher_returns_is_told_apart(tmp_path):
    class Launched:
        args, returncode = worker_training.command(2), 1

    class Job:
        folder, stopping = tmp_path, False

    table = "[1]:\n  exitcode  : -15 (pid: 7)\nRoot Cause (first observed failure):\n  exitcode  : {} (pid: 8)\n===\n"
    for words, root, said, code in (
        ("stopped after step 3; continue with --resume", 3, "", 3),
        ("error: The second GPU fell off the bus.", 2, "step 7", 2),
        ("step 7", -9, "step 6", -9),  # the system killed one for its memory
        ("error: of an earlier attempt", 1, "error: of an earlier attempt", 1),
    ):
        (tmp_path / "log.txt").write_text(words + "\n")
        (tmp_path / "output.txt").write_text(table.format(root))
        assert worker_training.exit_code(Job, Launched, said) == code


def test_two_trainings_never_run_at_once(lab, labelled_study, workers):
    first, second = submit(lab, labelled_study, steps=ENDLESS), submit(lab, labelled_study, steps=5)
    workers(), workers()
    trains(lab, first)
    for _ in range(10):
        time.sleep(0.05)
        assert (state(lab, first), state(lab, second)) == ("running", "queued")
    enough(lab, first)
    assert until(lab, second, "done")["started_at"] >= until(lab, first, "done")["finished_at"]


def test_stop_saves_and_resume_goes_on(lab, labelled_study, workers):
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    workers()
    trains(lab, job_id)
    jobs.stop(lab, job_id)
    job = until(lab, job_id, "stopped")
    done = len(job["metrics"])
    assert job["resumable"] and done > 0
    enough(lab, job_id)
    jobs.resume(lab, job_id)
    job = until(lab, job_id, "done")
    assert [row["step"] for row in job["metrics"]] == list(range(1, done + 2))


def test_a_killed_worker_loses_nothing(lab, labelled_study, workers):
    """The child goes on without its worker, and the next worker watches it to the end: it was started once only."""
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    worker = workers()
    child = trains(lab, job_id)
    worker.kill()
    worker.wait()
    seen = len(jobs.describe(lab, job_id)["metrics"])
    workers()
    wait_for(lambda: len(jobs.describe(lab, job_id)["metrics"]) > seen + 5, what="training without its worker")
    wait_for(lambda: queue.get(lab.store, job_id).worker.split()[1] != str(worker.pid), what="adoption")
    assert queue.get(lab.store, job_id).pid == child.pid
    enough(lab, job_id)
    job = until(lab, job_id, "done")
    assert [row["step"] for row in job["metrics"]] == list(range(1, len(job["metrics"]) + 1))
    assert (Path(job["run_dir"]) / "starts.txt").read_text() == "0\n"


def test_a_child_that_was_not_yet_written_down_is_found(lab, labelled_study, workers):
    """The worker may die between starting the child and recording its pid."""
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    worker = workers()
    child = trains(lab, job_id)
    worker.kill()
    worker.wait()
    with lab.store.session() as session:
        session.merge(queue.get(lab.store, job_id)).pid = worker.pid
    workers()
    wait_for(lambda: queue.get(lab.store, job_id).pid == child.pid, what="the child to be found")
    enough(lab, job_id)
    job = until(lab, job_id, "done")
    assert (Path(job["run_dir"]) / "starts.txt").read_text() == "0\n"


def test_worker_and_child_killed_together_resume(lab, labelled_study, workers):
    """As on a power cut: the job is queued again and goes on from what the run folder holds."""
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    worker = workers()
    child = trains(lab, job_id)
    worker.kill()
    worker.wait()
    child.kill()
    enough(lab, job_id)
    workers()
    assert len((Path(until(lab, job_id, "done")["run_dir"]) / "starts.txt").read_text().split()) == 2


def test_sigterm_to_the_worker_stops_the_job_resumably(lab, labelled_study, workers):
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    worker = workers()
    child = trains(lab, job_id)
    worker.terminate()
    assert worker.wait(90) == 0 and not is_running(child)
    job = jobs.describe(lab, job_id)
    assert (job["state"], job["resumable"]) == ("stopped", True) and "lab closed" in job["message"]


def test_a_worker_whose_launch_is_gone_ends_after_its_job(lab, labelled_study, tmp_path):
    """Started by a process that dies at once: the job in hand is finished, the next one is left alone."""
    first, second = submit(lab, labelled_study, steps=ENDLESS), submit(lab, labelled_study, steps=5)
    starter = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen({WORKER!r} + ['--lane', 'training', '--data-dir', {str(lab.store.data_dir)!r},"
        " '--launcher', str(os.getpid())], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], cwd=ROOT)
    trains(lab, first)
    (worker,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    enough(lab, first)
    until(lab, first, "done")
    wait_for(lambda: not is_running(worker), what="the worker's end")
    assert state(lab, second) == "queued"


@pytest.mark.parametrize(
    ("lr", "sentence"),
    [
        (0.5, "The model folder /nowhere does not exist; give another one."),
        (0.25, "The training ended with exit code 1 (its last words: out of luck); see its log."),
    ],
)
def test_a_failed_training_says_why_in_one_sentence(lab, labelled_study, workers, lr, sentence):
    job_id = submit(lab, labelled_study, lr=lr)
    workers()
    job = until(lab, job_id, "failed")
    assert job["error"] == sentence and job["resumable"]


def test_a_killed_child_is_called_memory(lab, labelled_study, workers):
    job_id = submit(lab, labelled_study, steps=ENDLESS)
    workers()
    trains(lab, job_id).kill()
    assert "memory ran out" in until(lab, job_id, "failed")["error"]


def test_no_labels_is_a_sentence(lab, workers):
    job_id = submit(lab, lab.current_study())
    workers()
    assert until(lab, job_id, "failed")["error"].startswith("There is no label to train on yet;")


def test_an_absurd_setting_never_becomes_a_job(lab):
    with pytest.raises(ConfigError, match="steps is 0"):
        jobs.submit(lab, "train-lrm", {"steps": 0})
    assert jobs.list_jobs(lab) == []


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 64])
def test_threads_never_exceed_the_cores(monkeypatch, cores):
    monkeypatch.setattr(worker_device, "cores", lambda: cores)
    monkeypatch.setattr(worker_device.os, "getloadavg", lambda: (cores, cores, cores))
    training, beside = worker_device.training_threads(), worker_device.interactive_threads(training=True)
    assert training >= 1 and beside >= 1 and training + beside <= max(2, cores)
    assert worker_device.interactive_threads(training=False) == cores
    monkeypatch.setattr(worker_device.os, "getloadavg", lambda: (3.0 * cores, cores, cores))
    assert worker_device.interactive_threads(training=False) == 1, "others overload the machine"
