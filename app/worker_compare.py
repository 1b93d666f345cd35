"""Samples a comparison: both policies draw the same prompts with the same seeds, and their pictures go in blind.

Resumable at any pair: what is stored already is not sampled again. The judge's scores (Scenes only) lie in the run
folder under the pictures' hashes; nothing reads them before the verdict.
"""

import json
from collections.abc import Iterator
from itertools import islice

from PIL import Image

from app.comparisons import JUDGE_FILE
from app.worker_models import provenance
from app.worker_task import Stopped, Task
from lpo.config import Policy, from_dict
from lpo.sampling import sample
from lpo.scenes.judge import judge
from storage import comparisons as stored
from storage.media import write_atomically

PAIRS_AT_ONCE = 8  # how many pairs lie between two looks at the stop button


def run(task: Task) -> dict:
    """Makes the pairs of {"comparison_id"} and opens the vote. Raises Stopped, ConfigError or LabelError."""
    comparison_id = task.job.config["comparison_id"]
    row = stored.get_comparison(task.store, comparison_id)
    policies = [from_dict(Policy, policy) for policy in (row.policy_a, row.policy_b)]
    missing = iter(stored.missing_pairs(task.store, comparison_id))
    total = len(row.plan["prompts"]) * len(row.plan["seeds"])
    scores = _scores(task)
    while chunk := list(islice(missing, PAIRS_AT_ONCE)):
        if task.stopping:
            raise Stopped
        made = [list(_draw(task, policy, chunk, row.plan["sampler"])) for policy in policies]
        for (prompt, seed), a, b in zip(chunk, *made, strict=True):
            origins = [provenance(task, policy, row.plan["sampler"], seed) for policy in policies]
            stored.add_comparison_pair(task.store, comparison_id, prompt, seed, a, b, *origins)
            if policies[0].base == policies[1].base == "scenes":
                _judge(task, scores, prompt, a, b)  # after the files are written, in an order that tells nothing
        write_atomically(task.folder / JUDGE_FILE, json.dumps(scores).encode())
        done = total - len(stored.missing_pairs(task.store, comparison_id))
        task.say(done / total, f"{done} of {total} pairs sampled")
    stored.start_voting(task.store, comparison_id)
    return {"comparison_id": comparison_id, "pairs": total}


def _draw(task: Task, policy: Policy, chunk: list[tuple[str, int]], sampler: dict) -> Iterator[Image.Image]:
    """One picture per (prompt, seed) of the chunk, in its order. Prompts of the same seed share a batch."""
    backbone = task.worker.models.policy(policy, task.device)
    pictures = {}
    for seed in dict.fromkeys(seed for _, seed in chunk):
        prompts = [prompt for prompt, own in chunk if own == seed]
        for index, _, picture in sample(backbone, prompts, [seed], **sampler):
            pictures[prompts[index], seed] = picture
    return (pictures[each] for each in chunk)


def _judge(task: Task, scores: dict[str, float], prompt: str, *pictures: Image.Image) -> None:
    """Adds the judge's score in [0, 1] of each picture under its hash; a prompt outside the Scenes world has none."""
    for picture in pictures:
        try:
            score = judge(picture, prompt).score
        except ValueError:  # the sentence says that the prompt names nothing of this world
            return
        scores[task.store.media.put_image(picture)[0]] = score


def _scores(task: Task) -> dict[str, float]:
    """What an earlier, stopped run of this job has judged already."""
    path = task.folder / JUDGE_FILE
    return json.loads(path.read_text()) if path.exists() else {}
