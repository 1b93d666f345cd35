"""The pictures of a blind comparison: both policies, every prompt and seed of the plan, stored pair by pair.

The job's config: {"comparison_id"}. For Scenes the judge's score of every picture goes into the run folder's
judge.json, keyed by picture hash, which says nothing about who made it; the page reads it after the verdict only.
"""

import json

from PIL import Image

from app.worker_models import SAMPLER, device_of, draw, provenance
from app.worker_task import Stopped, Task
from app.worker_training import write_json
from storage import comparisons, studies

TOGETHER = 8


def run(task: Task) -> dict:
    """Draws what is missing, then opens the voting. Stopping loses at most the chunk in hand."""
    comparison_id = task.job.config["comparison_id"]
    row = comparisons.get_comparison(task.store, comparison_id)
    sampler = {**SAMPLER, **row.plan["sampler"]}
    scenes = studies.get_study(task.store, row.study_id).base == "scenes"
    total = len(row.plan["prompts"]) * len(row.plan["seeds"])
    while missing := comparisons.missing_pairs(task.store, comparison_id):
        task.say(1 - len(missing) / total, f"{total - len(missing)} of {total} pairs")
        task.give_way(("trace",))
        if task.stopping:
            raise Stopped
        models, chunk = task.worker.models, missing[:TOGETHER]
        models.breathe(task.store)
        rows = [(seed, prompt) for prompt, seed in chunk]
        first = draw(models.policy(row.policy_a, device_of(task)), rows, sampler)
        second = draw(models.policy(row.policy_b, device_of(task)), rows, sampler)
        for (prompt, seed), a, b in zip(chunk, first, second, strict=True):
            comparisons.add_comparison_pair(
                task.store,
                comparison_id,
                prompt,
                seed,
                a,
                b,
                provenance(row.policy_a, sampler, seed),
                provenance(row.policy_b, sampler, seed),
            )
        if scenes:
            judge(task, [(p, picture) for (p, _), *two in zip(chunk, first, second, strict=True) for picture in two])
    if row.state == "preparing":
        comparisons.start_voting(task.store, comparison_id)
    return {"comparison_id": comparison_id, "pairs": total}


def judge(task: Task, pictures: list[tuple[str, Image.Image]]) -> None:
    """Adds the judge's scores to judge.json, sorted by hash; prompts outside the world of Scenes have none."""
    from lpo.scenes.judge import judge as verdict

    path = task.folder / "judge.json"
    task.folder.mkdir(parents=True, exist_ok=True)
    scores = json.loads(path.read_text()) if path.exists() else {}
    for prompt, picture in pictures:
        digest = task.store.media.put_image(picture)[0]
        try:
            scores[digest] = verdict(picture, prompt).score
        except ValueError as error:
            print(f"no judgement of {prompt!r}: {error}", flush=True)
    write_json(path, dict(sorted(scores.items())))
