"""Turns on an accelerator, which is only a name here: nothing below needs a GPU, what is tested is who has it when.

The trainings are tests/fakes/lpo.py under real workers; the interactive lane is this process, or a worker in a thread.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, wait_for
from worker_lab import ENDLESS, TaskInHand, enough, trains

from app import jobs, training_html, worker, worker_gaps, worker_turns
from app.devices import AUTO, DEVICES, waits
from app.worker import Worker
from app.worker_task import Stopped
from app.worker_training import is_running
from lpo import scorers
from lpo.config import LRMConfig, to_dict
from storage import checkpoints, gaps, leases
from storage import jobs as queue

GPU = "cuda:0"


@pytest.fixture
def somebody():
    """Processes that do nothing: the pids of other workers. All are killed afterwards."""
    started = []

    def start() -> subprocess.Popen:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def training(lab, labelled_study, monkeypatch):
    """Starts a training job under a new worker process on a lab whose "auto" is a GPU: (job id, worker)."""
    checkpoints.set_setting(lab.store, AUTO, GPU)
    workers = []

    def start(job_id: str | None = None) -> tuple[str, subprocess.Popen]:
        job_id = job_id or jobs.submit(lab, "train-lrm", to_dict(LRMConfig(steps=ENDLESS)), labelled_study.id)
        command = [sys.executable, str(ROOT / "tests" / "fakes" / "worker.py"), "--lane", "training"]
        command += ["--data-dir", str(lab.store.data_dir), "--launcher", str(os.getpid())]
        workers.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))
        trains(lab, job_id)
        return job_id, workers[-1]

    yield start
    for process in workers:
        process.kill()
        process.wait()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(lab.store.runs_dir) in part for part in process.info["cmdline"] or []):
            process.kill()


@pytest.fixture
def request_(lab):
    """A request of the interactive lane, whose worker is this process."""
    task = TaskInHand(lab.store, jobs.submit(lab, "trace", {}, lab.current_study().id))
    task.device = "auto"
    return task


def child_of(lab, job_id: str) -> psutil.Process | None:
    """The process that trains, None while there is none."""
    for process in psutil.process_iter(["cmdline"]):
        if str(jobs.run_dir(lab, job_id)) in (process.info["cmdline"] or []):
            return process if is_running(process) else None
    return None


def take(store, lane: str, process, *devices: str, until: float = 0.0):
    """Who is in the way, None if the devices are now the lane's."""
    other = leases.take(store, leases.claim(lane, list(devices or [GPU]), process.pid), until)
    return other and other.lane


def test_one_process_has_a_device_and_who_waits_goes_in_the_order_of_the_lanes(store, somebody):
    one, two, three = somebody(), somebody(), somebody()
    assert take(store, "data", one) is None
    assert take(store, "training", two) == take(store, "interactive", three) == "data"
    assert leases.waiting(store, "data") == ["interactive", "training"]
    leases.release(store, "data", one.pid)
    assert take(store, "data", one) == take(store, "training", two) == "interactive", "it waits and goes before"
    assert take(store, "interactive", three) is None and take(store, "training", two) == "interactive"
    leases.release(store, "interactive", three.pid)
    assert take(store, "data", one) == "training" and take(store, "training", two) is None


def test_a_training_on_all_devices_waits_for_each_of_them(store, somebody):
    one, two = somebody(), somebody()
    assert take(store, "interactive", one, "cuda:1") is None
    assert take(store, "training", two, "cuda:0", "cuda:1") == "interactive"
    assert take(store, "interactive", one, "cuda:2") is None, "it has changed to another device"
    assert take(store, "training", two, "cuda:0", "cuda:1") is None


def test_a_killed_holder_frees_the_device_and_so_does_a_killed_waiter(store, somebody):
    one, two, three = somebody(), somebody(), somebody()
    assert take(store, "training", one) is None and take(store, "interactive", two) == "training"
    two.kill()
    two.wait()
    assert leases.waiting(store, "training") == []
    one.kill()  # a zombie from now on: nobody has waited for it
    wait_for(lambda: take(store, "data", three) is None, what="the device")


def test_a_claim_of_a_living_process_outlives_its_worker(store, somebody):
    worker, child, other = somebody(), somebody(), somebody()
    assert take(store, "training", worker) is None
    leases.hold(store, leases.claim("training", [GPU], child.pid))
    leases.release(store, "training", worker.pid)
    assert take(store, "data", other) == take(store, "training", worker) == "training"


def test_two_takers_at_once_never_both_win(store, somebody):
    """Threads of three lanes take and release as fast as they can."""
    inside, worst, over = [], [], time.monotonic() + 0.5

    def run(lane: str, process) -> None:
        while time.monotonic() < over or len(worst) < 10:
            if take(store, lane, process) is None:
                inside.append(lane)
                worst.append(len(inside))
                inside.remove(lane)
                leases.release(store, lane, process.pid)

    threads = [threading.Thread(target=run, args=(lane, somebody())) for lane in ("interactive", "training", "data")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) == 1


def test_a_request_goes_first_and_the_training_waits_and_goes_on(lab, training, request_):
    """Stopped and resumed by the buttons while it waits, and by itself when the device is free."""
    job_id, _ = training()
    turns = request_.worker.turns
    turns.enter(request_)
    assert child_of(lab, job_id) is None, "the training has left the device"
    assert request_.said[0][1] == "Waits for the GPU: the training makes room as soon as it has saved itself"
    wait_for(lambda: waits(jobs.describe(lab, job_id)["message"]), what="the training to wait")
    jobs.stop(lab, job_id)
    wait_for(lambda: jobs.describe(lab, job_id)["state"] == "stopped", what="the stop")
    assert not turns.waited_for()
    jobs.resume(lab, job_id)
    wait_for(turns.waited_for, what="the training to wait again")
    job = wait_for(lambda: waits(jobs.describe(lab, job_id)["message"]) and jobs.describe(lab, job_id))
    told = "Waits for the GPU until no pairs, curves or comparisons are drawn; goes on by itself then."
    assert training_html.state_words(job) == told and job["state"] == "running"
    row = training_html.list_html(lab, jobs.list_jobs(lab, lane="training"), job_id)
    assert ">waiting<" in row and " left<" not in row
    enough(lab, job_id)
    turns.leave()
    wait_for(lambda: jobs.describe(lab, job_id)["state"] == "done", what="the end of the training")
    done, job = len(job["metrics"]), jobs.describe(lab, job_id)
    assert [row["step"] for row in job["metrics"]] == list(range(1, done + 2))
    assert len((Path(job["run_dir"]) / "starts.txt").read_text().split()) == 2


def test_a_child_without_its_worker_has_the_device_until_the_next_worker_lets_it_make_room(lab, training, request_):
    """Then it goes on, and keeps the device for a while."""
    job_id, first = training()
    child = child_of(lab, job_id)
    first.kill()
    first.wait()
    assert take(lab.store, "data", psutil.Process()) == "training"
    leases.release(lab.store, "data", os.getpid())
    training(job_id)
    request_.worker.turns.enter(request_)
    assert not is_running(child)
    wait_for(request_.worker.turns.waited_for, what="the training to wait")
    request_.worker.turns.leave()
    wait_for(lambda: child_of(lab, job_id), what="the training")
    request_.stop_after = 2
    with pytest.raises(Stopped):
        request_.worker.turns.enter(request_)
    assert request_.said[-1][1] == "Waits for the GPU: the training makes room in about 5 min"
    assert child_of(lab, job_id) and leases.waiting(lab.store, "training") == []


def test_a_refused_training_does_not_keep_the_device(lab, somebody, monkeypatch):
    checkpoints.set_setting(lab.store, AUTO, GPU)
    lane = Worker(lab.store, "training")
    job_id = jobs.submit(lab, "train-lrm", to_dict(LRMConfig()), lab.current_study().id)
    lane.work(queue.claim(lab.store, "training", lane.name, os.getpid()))
    assert jobs.describe(lab, job_id)["error"].startswith("There is no label to train on yet")
    assert take(lab.store, "data", somebody()) is None


class Unloaded:
    """Models that were loaded, as the interactive lane keeps them."""

    unloaded = 0

    def breathe(self, store) -> None:
        """Nothing to set."""

    def unload(self) -> None:
        self.unloaded += 1


def test_the_idle_interactive_lane_gives_the_device_up_when_somebody_waits(lab, request_, somebody, monkeypatch):
    checkpoints.set_setting(lab.store, AUTO, GPU)
    monkeypatch.setattr(worker, "LINGER", 0.5)
    monkeypatch.setattr("app.worker_trace.run", lambda task: {})
    monkeypatch.setattr("app.worker_models.Models", Unloaded)
    monkeypatch.setattr("app.worker_device.report_devices", lambda store, device: None)
    lane = Worker(lab.store, "interactive")
    thread = threading.Thread(target=lane.run)
    thread.start()
    try:
        wait_for(lambda: jobs.describe(lab, request_.job.id)["state"] == "done", what="the request")
        time.sleep(0.8)
        assert lane.turns.devices == [GPU] and lane.models.unloaded == 0, "nobody waits, so the models stay loaded"
        waiter = somebody()
        assert take(lab.store, "training", waiter) == "interactive"
        wait_for(lambda: take(lab.store, "training", waiter) is None, what="the device")
        wait_for(lambda: lane.turns.devices == [], what="the lane to know that it has left")
        assert lane.models.unloaded == 1
    finally:
        lane.ending = True
        thread.join()


def test_score_gaps_make_room_between_two_batches_and_load_again(lab, somebody, monkeypatch):
    """Fake scorers: while the first batch is scored, a request comes; it is over when it has been waited for."""
    store, person, events = lab.store, somebody(), []
    job = jobs.submit(lab, "gaps", {"source": "scorers", "clip": "x"}, lab.current_study().id)
    task = TaskInHand(store, job)
    task.device = GPU

    class Judges:
        names = ("clip",)

        def gaps(self, rows):
            events.append(f"scored {rows[0]['label']}")
            if len(events) == 2:
                assert take(store, "interactive", person) == "data"
            return []

    def say(progress, message=None):
        if waits(message):
            events.append("waits")
            assert take(store, "interactive", person) is None
            leases.release(store, "interactive", person.pid)

    task.say = say
    monkeypatch.setattr(scorers, "load_judges", lambda *_, **__: events.append("loaded") or Judges())
    for name, value in {"count_to_score": 3, "to_score": None, "add_gaps": None, "finish_set": None}.items():
        monkeypatch.setattr(gaps, name, lambda *_, value=value: value)
    monkeypatch.setattr(gaps, "unfinished", lambda *_: (7, 0))
    monkeypatch.setattr(gaps, "to_score", lambda store, study, last, count: [{"label": last + 1}] if last < 3 else [])
    worker_gaps.compute(task)
    assert events == ["loaded", "scored 1", "waits", "loaded", "scored 2", "scored 3"]
    assert not task.worker.turns.wanted()
    assert task.worker.turns.devices == [GPU], "the worker leaves after the job"


def test_a_job_that_waits_lets_those_pass_that_need_no_device(lab, somebody, monkeypatch):
    checkpoints.set_setting(lab.store, AUTO, GPU)
    other = somebody()
    assert take(lab.store, "training", other) is None
    first = jobs.submit(lab, "gaps", {"source": "scorers", "clip": "x"}, lab.current_study().id)
    second = jobs.submit(lab, "export", {"format": "zip", "study_id": 1}, lab.current_study().id)
    monkeypatch.setattr("app.worker_data.run", lambda task: {"done": 1})
    monkeypatch.setattr(worker_gaps, "run", lambda task: task.worker.turns.enter(task) or {})
    lane = Worker(lab.store, "data")
    thread = threading.Thread(target=lambda: lane.work(queue.claim(lab.store, "data", lane.name, os.getpid())))
    thread.start()
    wait_for(lambda: jobs.describe(lab, second)["state"] == "done", what="the export")
    assert jobs.describe(lab, first)["message"] == "Waits for the GPU until the training ends; goes on by itself then"
    leases.release(lab.store, "training", other.pid)
    thread.join(90)
    assert jobs.describe(lab, first)["state"] == "done" and take(lab.store, "training", other) is None


def test_which_devices_a_job_takes_turns_on(lab):
    def devices(device: str, config: dict) -> list[str]:
        task = TaskInHand(lab.store, jobs.submit(lab, "trace", config, lab.current_study().id))
        task.device = device
        return worker_turns.devices_of(task)

    assert devices("auto", {}) == devices("cpu", {}) == [], "nobody has said yet that there is a GPU"
    checkpoints.set_setting(lab.store, AUTO, GPU)
    checkpoints.set_setting(lab.store, DEVICES, 2)
    assert devices("auto", {}) == devices("cuda", {"trace": {"device": "auto"}}) == [GPU]
    assert devices("auto", {"trace": {"device": "cpu"}}) == devices("cpu", {}) == []
    assert devices("cuda:1", {}) == devices("auto", {"device": "cuda:1"}) == ["cuda:1"]
    assert devices("auto", {"processes": 2}) == devices("auto", {"processes": 4}) == ["cuda:0", "cuda:1"]


def test_on_the_cpu_nothing_is_claimed(lab, request_):
    for device in ("auto", "cpu"):
        request_.device = device
        request_.worker.turns.enter(request_)
        request_.worker.turns.hand_over(request_, os.getpid())
    assert request_.said == [] and request_.worker.turns.devices == [] and not request_.worker.turns.wanted()
    assert checkpoints.get_setting(lab.store, "devices of interactive") is None
