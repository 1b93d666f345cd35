"""Behaves towards its run folder as `python -m lpo train-lrm` does, in milliseconds a step and without torch.

The learning rate says how it behaves: 0.5 bad input, 0.25 a crash, anything else trains: for as many steps as it is
told, or until there is a file `enough` in the run folder. Of several processes that a launcher starts, the first does
the work.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("kind")
parser.add_argument("--config")
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--resume", action="store_true")
arguments = parser.parse_args()
run = arguments.run_dir
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))

rank = int(os.environ.get("RANK", "0"))
if rank:
    (run / f"threads-{rank}.txt").write_text(os.environ["OMP_NUM_THREADS"])
    while not stop and not (run / "result.json").exists():
        time.sleep(0.02)
    while stop and not (run / "state.json").exists():  # nobody leaves before all is saved
        time.sleep(0.02)
    sys.exit(3 if stop else 0)

config = json.loads((run / "config.json" if arguments.resume else Path(arguments.config)).read_text())
(run / "config.json").write_text(json.dumps(config))
if config["lr"] == 0.5:
    (run / "log.txt").write_text("error: The model folder /nowhere does not exist; give another one.\n")
    sys.exit(2)
if config["lr"] == 0.25:
    sys.exit("out of luck")
state = run / "state.json"
first = json.loads(state.read_text()) if state.exists() else 0
with open(run / "starts.txt", "a") as file:
    file.write(f"{first}\n")
for step in range(first + 1, config["steps"] + 1):
    time.sleep(0.02)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "total": config["steps"], "seconds": 0.0, "left_s": 1.0}) + "\n")
    if stop:
        state.write_text(json.dumps(step))
        with open(run / "log.txt", "a") as file:
            file.write(f"stopped after step {step}; continue with --resume\n")
        sys.exit(3)
    if (run / "enough").exists():
        break
for name in ("step-000001", "final"):
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lrm.json").write_text("{}")
(run / "result.json").write_text(json.dumps({"format_version": 1, "steps": step}))
