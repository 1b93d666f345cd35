"""What a training is given: its frozen config, and beside it in the run folder the snapshot of labels (pairs.jsonl) or
the prompts. Labels that are given later, and studies that change, do not reach it any more."""

import json
from collections import Counter

from app import jobs
from app.worker_task import Task, TrainingError
from lpo.run_dir import write_json
from storage import answers, filters, labels


def prepare(task: Task) -> dict:
    """The frozen config with its inputs: the snapshot of labels, or the prompts, written into the run folder."""
    config, folder, study_id = jobs.settings(task.job.config), task.folder, task.job.study_id
    if config.get("device", "auto") == "auto":
        config["device"] = task.device
    if study_id is None:
        return config
    if task.job.kind == "train-lrm":
        config["pairs"], written = str(folder / "pairs.jsonl"), Counter()
        with open(config["pairs"], "w") as file:
            for line in answers.training_pairs(task.store, study_id):
                file.write(json.dumps(line) + "\n")
                written[line["split"]] += 1
        if not written["train"]:
            raise TrainingError(
                "There is no label to train on yet; answer some pairs in the Label tab (ties count, skips do not)."
            )
        filtered = filters.describe(filters.active(task.store, study_id))
        write_json(folder / "snapshot.json", {"format_version": 1, "pairs": written.total(), "filter": filtered})
        return config
    for field, split in (("prompts", "train"), ("eval_prompts", "heldout")):
        texts = [prompt.text for prompt in labels.study_prompts(task.store, study_id, split)]
        if texts and not config.get(field):
            config[field] = str(folder / f"{field}.json")
            write_json(folder / f"{field}.json", texts)
    if not config.get("prompts"):
        raise TrainingError("This study has no prompts to train on; add some in the Label tab first.")
    return config
