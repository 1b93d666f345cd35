"""Pairs to label: two pictures of one prompt from different seeds, stored as soon as they are drawn.

The job's config: {"count", "policies": one or two, "prompts": texts or None for the study's own, "origin": "queue" or
"form", "sampler": {steps, guidance_scale, eta}}. With two policies the first draws the first picture.
"""

import hashlib

from sqlalchemy import text

from app.worker_models import SAMPLER, batch, draw, provenance
from app.worker_task import Stopped, Task
from storage import jobs as queue
from storage import labels, media
from storage.models import Prompt


class PairsError(ValueError):
    """Why no pairs can be made, in one sentence."""


def run(task: Task) -> dict:
    """Makes the pairs. Pairs for the queue give way to any other request: they are asked for again anyway."""
    config = task.job.config
    sampler = {**SAMPLER, **config.get("sampler", {})}
    chosen = choose(task, config.get("prompts"), config["count"])
    made, together = 0, max(1, batch(task, config["policies"][0]) // 2)
    while made < len(chosen):  # a chunk at a time: between them other requests get their turn
        task.say(made / len(chosen), f"{made} of {len(chosen)} pairs")
        if config.get("origin") == "queue" and (task.stopping or others_wait(task)):
            break
        task.give_way(("trace", "compare"))
        if task.stopping:
            raise Stopped
        chunk = chosen[made : made + together]
        store_pairs(task, chunk, config["policies"], sampler, config.get("origin", "form"))
        made += len(chunk)
    return {"pairs": made}


def choose(task: Task, texts: list[str] | None, count: int) -> list[tuple[Prompt, int]]:
    """(prompt, first seed) of every pair to make: prompts with the fewest pictures first, seeds never used before.

    Among equals the order is a fixed shuffle, so that the pairs at hand are a fair sample of the prompts. A job that
    is resumed counts the pairs that it made already.
    """
    study_id = task.job.study_id
    if texts is None:
        prompts = labels.study_prompts(task.store, study_id)
    else:
        prompts = labels.add_prompts(task.store, study_id, texts)
    if not prompts:
        raise PairsError("This study has no prompts to draw; add some in the Label tab first.")
    made = pictures_of(task, [prompt.id for prompt in prompts])
    shuffled = {p.id: hashlib.blake2b(f"pairs\n{p.id}".encode(), digest_size=8).digest() for p in prompts}
    chosen = []
    for _ in range(count):
        prompt = min(prompts, key=lambda p: (made[p.id], shuffled[p.id]))
        chosen.append((prompt, made[prompt.id]))
        made[prompt.id] += 2
    return chosen


def pictures_of(task: Task, prompt_ids: list[int]) -> dict[int, int]:
    """How many pictures each prompt has; seeds count up from there."""
    with task.store.reader() as session:
        rows = session.execute(text("SELECT prompt_id, COUNT(*) FROM picture GROUP BY prompt_id")).tuples().all()
    return {prompt_id: dict(rows).get(prompt_id, 0) for prompt_id in prompt_ids}


def store_pairs(task: Task, chunk: list[tuple[Prompt, int]], policies: list[dict], sampler: dict, origin: str) -> None:
    """Draws and stores the pairs of (prompt, first seed)."""
    count = len(chunk)
    rows = [[(seed + place, prompt.text) for prompt, seed in chunk] for place in (0, 1)]
    sides = policies[0], policies[-1]
    if len(policies) == 1:
        both = draw(task, policies[0], rows[0] + rows[1], sampler)
        pictures = [both[:count], both[count:]]
    else:
        pictures = [draw(task, policy, side, sampler) for policy, side in zip(sides, rows, strict=True)]
    for (prompt, seed), *two in zip(chunk, *pictures, strict=True):
        stored = []
        for place, (picture, policy) in enumerate(zip(two, sides, strict=True)):
            origin_of = provenance(policy, sampler, seed + place)
            stored.append(media.add_picture(task.store, picture, prompt_id=prompt.id, provenance=origin_of))
        labels.add_pair(task.store, task.job.study_id, prompt.id, stored[0].id, stored[1].id, origin)


def others_wait(task: Task) -> bool:
    """Whether somebody waits for this lane."""
    return bool(queue.list_jobs(task.store, lane="interactive", states=("queued",), limit=1))
