"""Trainings: one child process `python -m lpo ...` per job, watched through the files of its run folder. On several
devices the child is the launcher of one such process for each.

The child outlives its worker, and a new worker finds it again: by (pid, start time), or by the run folder on its
command line. How it ended is read from its exit code or, when somebody else started it, from what it left behind.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from app import jobs
from app.devices import device_count
from app.lab import ROOT
from app.worker_device import training_threads
from app.worker_inputs import prepare
from app.worker_task import Stopped, Task, TrainingError, Vanished
from lpo.run_dir import STOPPED, write_json
from storage import checkpoints
from storage import jobs as queue
from storage.models import Checkpoint

COMMAND = [sys.executable, "-m", "lpo"]
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0",
            "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
POLL_SECONDS = 0.3
SAVE_SECONDS = 120.0  # how long a child may take to save itself; then it is killed and resumed from its last state
RESUME = "continue with --resume"  # how its log then ends
NAMES = {"train-lrm": "LRM", "train-lpo": "LPO"}


def run(task: Task) -> dict:
    """Trains until the end, from the start or from where the run folder is. Returns what result.json says.

    On an accelerator it makes room for what goes first, saved and resumed as by the buttons (worker_turns.py).
    """
    turns, again = task.worker.turns, False
    adopted = task.job.pid != os.getpid()  # a worker that claims a job writes its own pid first
    child, process, code = find_child(task) if adopted else None, None, None
    while True:
        said = last_line(task.folder / "log.txt")
        if not adopted and not (task.folder / "result.json").exists():
            turns.enter(task, again)
            process = start(task)
            child = psutil.Process(process.pid)
        if child is None:
            break
        turns.hand_over(task, child.pid)
        queue.set_process(task.store, task.job.id, task.worker.name, child.pid)
        made_room = watch(task, child, process)
        code = None if process is None else exit_code(task, process, said)
        if not made_room or task.stopping or not goes_on(task, code):
            break
        turns.leave()
        queue.set_process(task.store, task.job.id, task.worker.name, os.getpid())
        adopted, again, child, process = False, True, None, None
    register(task)
    return outcome(task, code)


def goes_on(task: Task, code: int | None) -> bool:
    """Whether a child that was asked to make room has saved itself, or ended before it could listen."""
    if (task.folder / "result.json").exists():
        return False
    killed = code is None or code < 0  # None: somebody else's child, of which only the files speak
    return code == STOPPED or (killed and not last_line(task.folder / "log.txt").startswith("error: "))


def find_child(task: Task) -> psutil.Process | None:
    """The job's child that another worker started, if it still runs."""
    if queue.process_alive(task.job):
        return psutil.Process(task.job.pid)
    # The last worker may have died between starting the child and writing its pid down.
    for process in psutil.process_iter(["cmdline"]):
        if str(task.folder) in (process.info["cmdline"] or []):
            return process
    return None


def start(task: Task) -> subprocess.Popen:
    """Writes what the run needs, then starts the child, or starts it again with --resume."""
    folder, kind = task.folder, task.job.kind
    arguments = [kind, "--run-dir", str(folder)]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        config = prepare(task)
        write_json(folder / "request.json", config)
        arguments += ["--config", str(folder / "request.json")]
    about = folder / "job.json"
    if not about.exists():
        write_json(about, {"number": next_number(task), "threads": training_threads()})
    processes = min(task.job.config.get(jobs.PROCESSES, 1), device_count(task.store))
    # The same again on resuming: bit for bit.
    threads = str(max(1, json.loads(about.read_text())["threads"] // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [*command(processes), *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def command(processes: int) -> list[str]:
    """How lpo is started in one process, or by a launcher in several that train together (lpo/ranks.py)."""
    python, *program = COMMAND
    return COMMAND if processes == 1 else [python, *LAUNCHER, "--num_processes", str(processes), *program]


def watch(task: Task, child: psutil.Process, process: subprocess.Popen | None) -> bool:
    """Follows the child to its end: progress for the page, and SIGTERM when the job is to stop or to make room. Returns
    whether it made room; for that it may take its time, since a killed child loses what it has not saved."""
    told = made_room = False
    since: float | None = None  # when it was to stop
    while process.poll() is None if process is not None else is_running(child):
        step, total = last_step(task.folder)
        if total:
            task.say(step / total, "saving" if told else f"step {step} of {total}")
        if not told and (task.stopping or task.worker.turns.wanted()):
            told, made_room = True, not task.stopping
            for one in ranks_of(child) or [child]:
                send(one, signal.SIGTERM)
        if task.stopping:
            since = since or time.monotonic()
            if time.monotonic() - since > SAVE_SECONDS:
                for one in [*ranks_of(child), child]:
                    send(one, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    task.beat()
    return made_room


def ranks_of(child: psutil.Process) -> list[psutil.Process]:
    """The processes that a launcher started; none for a training in one process. They are told to stop themselves,
    since their launcher would kill them 30 seconds after it is told."""
    try:
        return child.children() if LAUNCHER[1] in child.cmdline() else []
    except psutil.NoSuchProcess:
        return []


def exit_code(task: Task, process: subprocess.Popen, said: str) -> int:
    """The exit code of lpo. Its launcher returns 1 whatever its processes returned: then the log knows, whose last line
    was `said` before they were started."""
    last = last_line(task.folder / "log.txt")
    if process.returncode != 1 or LAUNCHER[1] not in process.args:
        return process.returncode
    if last != said and last.startswith("error: "):
        return 2
    if task.stopping or (last != said and last.endswith(RESUME)):
        return STOPPED
    # of the process that ended first, as the launcher's last table says
    causes = re.findall(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", tail(task.folder / "output.txt"), re.DOTALL)
    return int(causes[-1]) if causes else 1


def is_running(child: psutil.Process) -> bool:
    """Whether exactly this process (not another one with its pid) still works."""
    try:
        return child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(child: psutil.Process, number: signal.Signals) -> None:
    try:
        child.send_signal(number)
    except psutil.NoSuchProcess:
        print(f"child {child.pid} had just ended", flush=True)


def outcome(task: Task, code: int | None) -> dict:
    """What the run came to. `code` is the exit code, None if another worker started the child.

    Raises Stopped, Vanished (it may be tried again) or TrainingError.
    """
    result = task.folder / "result.json"
    if result.exists():
        return {**json.loads(result.read_text()), "run_dir": str(task.folder)}
    if code == STOPPED or (task.stopping and (code is None or code < 0)):
        raise Stopped
    output = task.folder / "output.txt"  # a refusal before the run began is in it only
    ends = [last_line(task.folder / "log.txt"), last_line(output)]
    if code == 2:  # a launcher talks on after the sentence
        ends += tail(output).splitlines()[::-1]
    for line in ends:
        if line.startswith("error: "):
            raise TrainingError(line.removeprefix("error: "))
    if code is None:
        raise Vanished("The training process ended without a word, as on a restart of the machine.")
    if code == -signal.SIGKILL:
        raise TrainingError(
            "The system killed the training, most likely because memory ran out; choose a smaller batch and resume."
        )
    said = last_line(output) or "nothing"
    raise TrainingError(f"The training ended with exit code {code} (its last words: {said[:300]}); see its log.")


def register(task: Task) -> list[Checkpoint]:
    """Makes every checkpoint of the run one that can be chosen; `final` is the one to take by default."""
    kind = "lrm" if task.job.kind == "train-lrm" else "adapter"
    mark = "lrm.json" if kind == "lrm" else "adapter.json"
    folder = task.folder / "checkpoints"
    found = sorted(path.parent for path in folder.glob(f"*/{mark}"))
    if not found:
        return []
    number = json.loads((task.folder / "job.json").read_text())["number"]
    meta = {"number": number, "config": json.loads((task.folder / "config.json").read_text())}
    parent = None
    if kind == "adapter":
        meta["policy"] = task.job.config.get("policy", {"base": "scenes", "adapters": []})
        parent = parent_of(task, meta["policy"])
    last = last_step(task.folder)[0]
    rows = []
    for path in found:
        final = path.name == "final"
        step = last if final else int(path.name.removeprefix("step-"))
        rows.append(
            checkpoints.add_checkpoint(
                task.store,
                kind=kind,
                name=f"{NAMES[task.job.kind]} {number}" + ("" if final else f", step {step}"),
                path=path,
                parent_id=parent,
                study_id=task.job.study_id,
                job_id=task.job.id,
                step=step,
                meta={**meta, "final": final},
            )
        )
    return rows


def parent_of(task: Task, policy: dict) -> int | None:
    """The checkpoint of the adapter that this one was trained on top of."""
    paths = [adapter["path"] for adapter in policy.get("adapters", [])]
    rows = checkpoints.list_checkpoints(task.store, "adapter", include_hidden=True)
    return next((row.id for row in rows if paths and row.path == paths[-1]), None)


def next_number(task: Task) -> int:
    """LRM 1, LRM 2, ...: counted up for ever, so that a name never means two things."""
    key = f"last number of {task.job.kind}"
    number = checkpoints.get_setting(task.store, key, 0) + 1
    checkpoints.set_setting(task.store, key, number)
    return number


def last_step(folder: Path) -> tuple[int, int]:
    """(step, total) of the newest metrics line; (0, 0) before there is one."""
    try:
        row = json.loads(last_line(folder / "metrics.jsonl"))
        return row["step"], row["total"]
    except (ValueError, KeyError):  # no line yet, or one that is just being written
        return 0, 0


def last_line(path: Path) -> str:
    """The last non-empty line of a text file; empty if there is none."""
    lines = tail(path).strip().splitlines()
    return lines[-1].strip() if lines else ""


def tail(path: Path) -> str:
    """The end of a text file; empty if there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16384))
        return file.read().decode("utf-8", "replace")
