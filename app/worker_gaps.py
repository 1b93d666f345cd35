"""Score gaps of imported labels, in the data lane: joined from a CSV, or computed by local scorers (torch only then).

The config is {"source": "csv", "upload", "name", "import_id"} or {"source": "scorers", "clip", "pick", "aesthetic",
"aesthetic_clip": local paths, empty for none}. A stopped or killed computation goes on behind the last scored label.
"""

import gc
import shutil

from app.worker_data import uploaded
from app.worker_task import Stopped, Task
from storage import StorageError, Unwritable, gaps

BATCH = 16  # labels, two pictures each
SCORERS = ("clip", "pick", "aesthetic", "aesthetic_clip")


def run(task: Task) -> dict:
    """The job's result: {gap_set_id, labels, ...}. Raises Stopped or a ValueError sentence."""
    return join(task) if task.job.config["source"] == "csv" else compute(task)


def join(task: Task) -> dict:
    """Joins an uploaded CSV; begun again from its top after a stop, since it takes seconds."""
    folder, path = uploaded(task.store, task.job.config)
    report: dict = {}
    try:
        for report in gaps.add_csv(task.store, task.job.config["import_id"], path):
            task.say(report["done"] / max(1, report["total"]), f"{report['done']:,} rows joined")
            if task.stopping and not report["finished"]:
                raise Stopped
    except Unwritable:
        raise
    except ValueError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return report


def compute(task: Task) -> dict:
    """Scores both pictures of every imported label."""
    from lpo.scorers import load_judges

    config, study_id = task.job.config, task.job.study_id
    turns = task.worker.turns

    def load(again: bool):
        turns.enter(task, again)
        task.say(None, "Loading the scorers")
        return load_judges(**{name: config.get(name, "") for name in SCORERS}, device=task.device)

    judges = load(again=False)
    name = f"{', '.join(judges.names)} (computed here, job {task.job.id[:6]})"
    found = gaps.unfinished(task.store, study_id, name)
    if found is None:
        about = {**{key: config.get(key, "") for key in SCORERS}, "columns": judges.names}
        found = gaps.new_set(task.store, study_id, name, about), 0
    gap_set, last = found
    total, done = gaps.count_to_score(task.store, study_id, 0), 0
    if total == 0:
        raise StorageError("This study has no labels of imported pairs; import some data first.")
    done = total - gaps.count_to_score(task.store, study_id, last)
    while rows := gaps.to_score(task.store, study_id, last, BATCH):
        if task.stopping:
            raise Stopped
        if turns.wanted():
            judges = None
            turns.leave()
            judges = load(again=True)
        scored = judges.gaps(rows)
        with task.store.session() as session:
            gaps.add_gaps(session, gap_set, scored)
        last, done = rows[-1]["label"], done + len(rows)
        task.say(done / total, f"{done:,} of {total:,} labels scored")
    gaps.finish_set(task.store, gap_set, {"labels": done})
    del judges
    gc.collect()
    return {"gap_set_id": gap_set, "labels": done, "finished": True}
