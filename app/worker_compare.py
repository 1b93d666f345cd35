"""Samples a comparison: both policies draw the same prompts with the same seeds, and their pictures go in blind.

Resumable at any pair: what is stored already is not sampled again. The judge's scores (Scenes only) lie in the run
folder under the pictures' hashes; nothing reads them before the verdict.
"""

import json

from PIL import Image

from app.comparisons import JUDGE_FILE
from app.worker_models import SAMPLER, batch, draw, provenance, spent
from app.worker_task import Stopped, Task
from lpo.scenes.judge import judge
from storage import comparisons as stored
from storage.media import write_atomically


def run(task: Task) -> dict:
    """Makes the pairs of {"comparison_id"} and opens the vote. Raises Stopped, ConfigError or LabelError."""
    comparison_id = task.job.config["comparison_id"]
    row = stored.get_comparison(task.store, comparison_id)
    policies, sampler = (row.policy_a, row.policy_b), {**SAMPLER, **row.plan["sampler"]}
    total = len(row.plan["prompts"]) * len(row.plan["seeds"])
    judging = all(policy["base"] == "scenes" for policy in policies)
    scores = _scores(task)
    task.say(0.0, "Loading the models")
    together = batch(task, row.policy_a)
    missing = stored.missing_pairs(task.store, comparison_id)
    while missing:  # a chunk at a time: between them others get their turn
        task.give_way(("trace",))
        if task.stopping:
            raise Stopped
        task.say(1 - len(missing) / total, f"{total - len(missing)} of {total} pairs")
        chunk, missing = missing[:together], missing[together:]
        rows = [(seed, prompt) for prompt, seed in chunk]
        made = [draw(task, policy, rows, sampler) for policy in policies]
        for (prompt, seed), *pictures in zip(chunk, *made, strict=True):
            origins = [provenance(policy, sampler, seed) for policy in policies]
            stored.add_comparison_pair(task.store, comparison_id, prompt, seed, *pictures, *origins)
            if judging:
                _judge(task, scores, prompt, pictures)  # after the files are written, in an order that tells nothing
        write_atomically(task.folder / JUDGE_FILE, json.dumps(scores).encode())
    stored.start_voting(task.store, comparison_id)
    result = {"comparison_id": comparison_id, "pairs": total}
    if any(policy.get("search") for policy in policies):
        result["takes"] = [spent(task, policy, sampler).in_words() for policy in policies]
    return result


def _judge(task: Task, scores: dict[str, float], prompt: str, pictures: list[Image.Image]) -> None:
    """Adds the judge's score in [0, 1] of each picture under its hash; a prompt outside the Scenes world has none."""
    for picture in pictures:
        try:
            score = judge(picture, prompt).score
        except ValueError:  # its sentence says that the prompt names nothing of this world
            return
        scores[task.store.media.put_image(picture)[0]] = score


def _scores(task: Task) -> dict[str, float]:
    """What an earlier, stopped run of this job has judged already."""
    path = task.folder / JUDGE_FILE
    return json.loads(path.read_text()) if path.exists() else {}
