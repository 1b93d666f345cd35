"""What the Label tab asks for: pairs for prompts of one's own, and new studies. Plain functions, no Gradio."""

from pathlib import Path

from app import choices, jobs
from app.lab import Lab
from app.words import warning
from lpo.config import Policy, SampleConfig, from_dict, to_dict
from lpo.places import resolve_base
from lpo.prompts import read_prompts
from storage import labels
from storage.models import Study

MOST_PAIRS = 2000
MOST_EACH = 50
MOST_PROMPTS = 20_000


def lines(text: str) -> list[str]:
    """One prompt a line, each once, blank lines left out."""
    return list(dict.fromkeys(" ".join(line.split()) for line in (text or "").splitlines() if line.strip()))


def generate(lab: Lab, text: str, each: float | None, first: str, second: str, sampler: dict) -> tuple[str, int]:
    """Queues a job that makes `each` pairs for every prompt (one a line); returns (job id, number of pairs).

    `first` and `second` are choices of `choices.policies`: where the two pictures of a pair come from. The job's
    config is {"prompts", "count", "policies": one or two policies, "origin": "form", "sampler": {steps,
    guidance_scale, eta}}. Raises ValueError with one sentence.
    """
    prompts = lines(text)
    if not prompts:
        raise ValueError("There is no prompt yet; write at least one, each on a line of its own.")
    if each is None or not 1 <= each <= MOST_EACH or each != int(each):
        told = "left empty" if each is None else f"{each:g}"
        raise ValueError(f"Pairs per prompt are {told}; choose a whole number from 1 to {MOST_EACH}.")
    count = len(prompts) * int(each)
    if count > MOST_PAIRS:
        raise ValueError(
            f"{len(prompts)} prompts x {int(each)} pairs are {count}; at most {MOST_PAIRS} at once are allowed."
        )
    for name, value in sampler.items():
        if value is None:
            raise ValueError(f"{name} is empty; give a number.")
    study = lab.current_study()
    policies = [choices.policy(lab, value) for value in dict.fromkeys((first, second))]
    # the sampler's settings are checked by the very class that the command line uses
    configs = [from_dict(SampleConfig, {"policy": policy, "prompts": prompts, **sampler}) for policy in policies]
    checked = to_dict(configs[0])
    labels.add_prompts(lab.store, study.id, prompts)
    config = {
        "prompts": prompts,
        "count": count,
        "policies": policies,
        "origin": "form",
        "sampler": {name: checked[name] for name in sampler},
    }
    return jobs.submit(lab, "pairs", config, study.id, priority=1), count


def new_study(lab: Lab, name: str, base: str, question: str, text: str, file: str | None) -> tuple[Study, int, int]:
    """Makes a study of the prompts in `text` and in the file, and makes it the current one.

    Returns (study, training prompts, held-out prompts). Raises ValueError with one sentence.
    """
    prompts = lines(text)
    if file:
        prompts = list(dict.fromkeys([*prompts, *read_prompts(Path(file))]))
    if not (name or "").strip():
        raise ValueError("The study has no name yet; give it one, for example what you want to teach.")
    if not (question or "").strip():
        raise ValueError(
            "The question is empty; say what the annotators are asked, for example “Which picture do you prefer?”"
        )
    if not prompts:
        raise ValueError("There is no prompt yet; write at least one, each on a line of its own, or choose a file.")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are too many; at most {MOST_PROMPTS} are allowed.")
    if not (base or "").strip():
        raise ValueError("The base is empty; write scenes, a model folder, a single file or a hub id.")
    base = base.strip()
    from_dict(Policy, {"base": base})
    resolve_base(base)
    for prompt in prompts:  # before anything is written: a refused prompt must not leave half a study behind
        if len(prompt) > 2000:
            raise ValueError(f"The prompt “{prompt[:40]}…” has {len(prompt)} characters; at most 2000 are allowed.")
    study = labels.create_study(lab.store, name, base=base, question=" ".join(question.split()))
    rows = labels.add_prompts(lab.store, study.id, prompts)
    heldout = sum(labels.split_of(row.text, study.salt) == "heldout" for row in rows)
    lab.choose_study(study.id)
    return study, len(rows) - heldout, heldout


def job_line(lab: Lab, job_id: str | None) -> str:
    """How the job of the form is going, in one sentence; empty if there is none."""
    if job_id is None:
        return ""
    try:
        job = jobs.describe(lab, job_id)
    except ValueError:  # deleted in the meantime
        return ""
    count = job["config"]["count"]
    pairs, are, were = ("1 pair", "is", "was") if count == 1 else (f"{count} pairs", "are", "were")
    match job["state"]:
        case "done":
            return f"Done: {pairs} {were} made for the queue above."
        case "failed":
            return warning(job["error"])
        case "queued":
            return f"{pairs} {are} waiting to be drawn."
        case "stopped" | "cancelled":
            return "The job was stopped before all pairs were made."
    return f"{job['message'] or 'Pictures are being drawn.'} {100 * (job['progress'] or 0):.0f} %"
