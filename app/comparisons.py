"""What the Compare tab asks for: planning a blind comparison, how it stands, and the verdict in numbers and words.

The secret is kept by `storage/comparisons.py`; nothing here reads which policy made a picture before the verdict.
Prompts and seeds are drawn anew for every comparison: pictures seen beside their policy's name in an earlier grid
would otherwise be recognised, and the vote would not be blind.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sqlmodel import select

from app import choices, jobs
from app.lab import Lab
from app.pairs import lines
from app.statistics import WinRate, in_words, paired_difference, win_rate, win_rate_peeking
from app.story import file_words, policy_words
from lpo.config import SampleConfig, from_dict, to_dict
from storage import comparisons as store_comparisons
from storage import jobs as queue
from storage import studies
from storage.models import Checkpoint, Comparison

MOST_PAIRS = 2000
JUDGE_FILE = "judge.json"  # in the job's run folder: {picture hash: score}, read after the verdict only


@dataclass(frozen=True)
class Side:
    """One policy of the form: a choice of `sampling_policies`, its strength, and perhaps a second adapter on top."""

    value: str
    strength: float = 1.0
    more: str = ""
    more_strength: float = 1.0


def policy_of(lab: Lab, side: Side) -> dict:
    """The Policy (plain JSON values) of a side. ValueError if a chosen checkpoint is gone."""
    policy = choices.policy(lab, side.value, float(side.strength))
    if side.more:
        top = choices.policy(lab, side.more, float(side.more_strength))["adapters"][-1]
        policy = {**policy, "adapters": [*policy["adapters"], top]}
    return policy


def create(
    lab: Lab,
    a: Side,
    b: Side,
    *,
    own_prompts: str = "",
    count: int = 30,
    seeds: int = 1,
    votes: int | None = None,
    peeking: bool = False,
    sampler: dict | None = None,
) -> int:
    """Plans a comparison, queues its job and returns the comparison's id.

    `own_prompts` is one prompt a line; empty means `count` held-out prompts of the study, drawn at random. `votes` is
    the number fixed beforehand, None for every pair once. Raises ValueError with the sentence for the page.
    """
    study = lab.current_study()
    policies = policy_of(lab, a), policy_of(lab, b)
    if policies[0] == policies[1]:
        raise ValueError(
            "Both sides are the same policy; choose another checkpoint or another strength for one of them."
        )
    prompts = lines(own_prompts) if own_prompts.strip() else draw_prompts(lab, study.id, int(count))
    if not 1 <= int(seeds) <= 16:
        raise ValueError(f"Seeds of each prompt are {seeds:g}; choose 1 to 16.")
    if len(prompts) * int(seeds) > MOST_PAIRS:
        raise ValueError(
            f"{len(prompts)} prompts x {int(seeds)} seeds are too many; at most {MOST_PAIRS} pairs are allowed."
        )
    # the sampler's settings are checked by the very class that the command line uses
    config = from_dict(SampleConfig, {"policy": policies[0], "prompts": prompts, **(sampler or {})})
    from_dict(SampleConfig, {"policy": policies[1], "prompts": prompts, **(sampler or {})})
    kept = {name: to_dict(config)[name] for name in ("steps", "guidance_scale", "eta")}
    row = store_comparisons.create_comparison(
        lab.store,
        study.id,
        *policies,
        prompts=prompts,
        seeds=random.SystemRandom().sample(range(10**6), int(seeds)),
        votes=len(prompts) * int(seeds) if votes is None else int(votes),
        sampler=kept,
        peeking=peeking,
    )
    jobs.submit(lab, "compare", {"comparison_id": row.id}, study.id)
    return row.id


def draw_prompts(lab: Lab, study_id: int, count: int) -> list[str]:
    """`count` held-out prompts of the study, drawn without replacement; fewer only if the study has fewer."""
    texts = [row.text for row in studies.study_prompts(lab.store, study_id, "heldout")]
    if not texts:
        raise ValueError("This study has no held-out prompts; write prompts of your own, one a line.")
    if not 1 <= count <= len(texts):
        raise ValueError(
            f"{count} prompts are asked for, but the study has {len(texts)} held-out ones; choose 1 to {len(texts)}."
        )
    return random.SystemRandom().sample(texts, count)


def latest(lab: Lab) -> Comparison | None:
    """The newest comparison of the current study."""
    rows = store_comparisons.list_comparisons(lab.store, lab.current_study().id)
    return rows[0] if rows else None


def compare_job(lab: Lab, comparison_id: int) -> str | None:
    """The id of the job that samples this comparison (the newest, if it was started again)."""
    for job in queue.list_jobs(lab.store, kinds=("compare",), limit=1000):
        if job.config.get("comparison_id") == comparison_id:
            return job.id
    return None


def names(lab: Lab, row: Comparison) -> tuple[str, str]:
    """Both policies as a person calls them; never the same text twice."""
    a, b = policy_name(lab, row.policy_a), policy_name(lab, row.policy_b)
    return (a, b) if a != b else (f"{a} (A)", f"{b} (B)")


def policy_name(lab: Lab, policy: dict) -> str:
    """'base', or the name of the last adapter with its strength; adapters stacked by hand are joined by ' + ', and so
    is a search."""
    search = policy.get("search")
    if search:
        scorers = {choices.lrm(lab, value): name for name, value in choices.lrms(lab)}
        words = choices.search_words(search, scorers.get(search["lrm"], Path(search["lrm"]).name))
        return f"{policy_name(lab, {**policy, 'search': None})} + {words}"
    adapters = policy.get("adapters", [])
    if not adapters:
        return _base_name(lab, policy)
    with lab.store.reader() as session:
        found = session.exec(select(Checkpoint).where(Checkpoint.path.in_([each["path"] for each in adapters]))).all()
    known = {row.path: row for row in found}
    below = {each["path"] for row in found for each in (row.meta.get("policy") or {}).get("adapters", [])}
    words = [_base_name(lab, policy)] if policy.get("unet") else []
    for each in adapters:
        if each["path"] in below:
            continue  # the one on top was trained on this one: its name says so already
        row = known.get(each["path"])
        name = row.name if row else file_words(Path(each["path"]))
        words.append(name if each["strength"] == 1.0 else f"{name} × {each['strength']:g}")
    return " + ".join(words) or policy_words(policy, {})


def _base_name(lab: Lab, policy: dict) -> str:
    """'base', or the name of the merged UNet in its place."""
    if not policy.get("unet"):
        return "base"
    with lab.store.reader() as session:
        row = session.exec(select(Checkpoint).where(Checkpoint.path == policy["unet"])).first()
    return row.name if row else Path(policy["unet"]).name


def earlier_checkpoints(lab: Lab, policy: dict) -> list[Checkpoint]:
    """Checkpoints of the same run, saved before the policy's last adapter, latest first."""
    if not policy.get("adapters"):
        return []
    path = policy["adapters"][-1]["path"]
    with lab.store.reader() as session:
        row = session.exec(select(Checkpoint).where(Checkpoint.path == path)).first()
        if row is None or row.job_id is None or row.step is None:
            return []
        same = select(Checkpoint).where(Checkpoint.job_id == row.job_id, Checkpoint.kind == "adapter")
        same = same.where(Checkpoint.step < row.step, Checkpoint.hidden.is_(False))
        return list(session.exec(same.order_by(Checkpoint.step.desc())))


def summary(row: Comparison, results: dict) -> WinRate:
    """The votes as a win rate of policy a: the fixed interval, or for a peeking plan the one that is always valid."""
    votes = [(vote["prompt_id"], vote["outcome"]) for vote in results["votes"]]
    if not row.plan.get("peeking"):
        return win_rate(votes)
    needed, seen, complete = len(row.plan["seeds"]), Counter(), []
    for prompt_id, _ in votes:
        seen[prompt_id] += 1
        if seen[prompt_id] == needed:
            complete.append(prompt_id)
    return win_rate_peeking(votes, complete)


def peek(lab: Lab, row: Comparison) -> str:
    """How a running vote of a peeking plan stands, without telling which policy leads."""
    result = summary(row, store_comparisons.comparison_results(lab.store, row.id))
    if result.rate < 0.5:  # fold: the leader is called "one policy", whoever it is
        result = WinRate(
            wins=result.losses, ties=result.ties, losses=result.wins, both_bad=result.both_bad, skipped=result.skipped,
            prompts=result.prompts, counted=result.counted, rate=1 - result.rate, low=1 - result.high,
            high=1 - result.low, method=result.method,
        )  # fmt: skip
    return in_words(result, "one of the two", "the other")


def judged(lab: Lab, row: Comparison) -> dict[str, float]:
    """The judge's score in [0, 1] of each picture, by hash; empty unless the base is Scenes, and before the verdict."""
    job_id = compare_job(lab, row.id)
    path = lab.store.runs_dir / (job_id or "none") / JUDGE_FILE
    if row.state not in ("complete", "abandoned") or not path.exists():
        return {}
    return json.loads(path.read_text())


def rows(lab: Lab, row: Comparison) -> dict:
    """The value of the before/after component, after the verdict: names, pictures, votes and the judge's scores."""
    a, b = names(lab, row)
    results = store_comparisons.comparison_results(lab.store, row.id)
    said = {vote["pair_id"]: vote["outcome"] for vote in results["votes"]}
    scores = judged(lab, row)
    return {
        "a": a,
        "b": b,
        "rows": [
            {
                "prompt": pair["prompt"],
                "seed": pair["seed"],
                "a": pair["a"],
                "b": pair["b"],
                "vote": said.get(pair["pair_id"], ""),
                "judge_a": scores.get(pair["a"]),
                "judge_b": scores.get(pair["b"]),
            }
            for pair in store_comparisons.comparison_pairs(lab.store, row.id)
        ],
    }


def takes_words(lab: Lab, row: Comparison) -> str:
    """What a picture of each policy took, if one of them searches; else ''."""
    job_id = compare_job(lab, row.id)
    takes = ((queue.get(lab.store, job_id).result or {}) if job_id else {}).get("takes")
    if not takes or not any((policy or {}).get("search") for policy in (row.policy_a, row.policy_b)):
        return ""
    a, b = names(lab, row)
    return f"A picture took {takes[0]} ({a}) and {takes[1]} ({b}): a search pays for its choice with compute."


def judge_words(shown: dict) -> str:
    """The judge's mean score of both policies and their difference with its interval, or '' without scores."""
    scored = [row for row in shown["rows"] if row["judge_a"] is not None and row["judge_b"] is not None]
    if not scored:
        return ""
    a, b = [row["judge_a"] for row in scored], [row["judge_b"] for row in scored]
    gap = paired_difference(a, b, [row["prompt"] for row in scored])
    better = shown["a"] if gap.value > 0 else shown["b"]
    meaning = "no clear difference" if gap.low <= 0 <= gap.high else f"a clear difference: {better} does better"
    return (
        "The Scenes judge, which checks the pictures against their prompts, gives "
        f"{shown['a']} {sum(a) / len(a):.3f} and {shown['b']} {sum(b) / len(b):.3f} of at most 1. {shown['a']} minus "
        f"{shown['b']} is {gap.value:+.3f}, 95 % interval {gap.low:+.3f} to {gap.high:+.3f}, {meaning}."
    )


def verdict_sentence(result: WinRate, shown: dict, row: Comparison) -> str:
    """Plain words for an ended comparison; blindness given up is no verdict, whatever the numbers say."""
    if row.state == "abandoned":
        return f"No verdict: blindness was given up after {result.votes} of {row.plan['votes']} votes."
    return in_words(result, shown["a"], shown["b"])


def warning(lab: Lab, row: Comparison, result: WinRate) -> str:
    """A hint to an earlier checkpoint when the more trained side does not win; else ''."""
    sides = ((row.policy_a, result.low > 0.5), (row.policy_b, result.high < 0.5))
    for policy, wins in sides:
        older = [] if wins else earlier_checkpoints(lab, policy)
        if older:
            saved = ", ".join(str(each.step) for each in reversed(older))
            return (
                f"{policy_name(lab, policy)} does not clearly win. A reward model can be over-optimised: its score "
                f"rises while people like the pictures less. Earlier checkpoints of the run were saved at step {saved}."
            )
    return ""


def verdict_words(lab: Lab, row: Comparison) -> str:
    """One line for the list of comparisons; says nothing before the verdict."""
    if row.state == "preparing":
        return "sampling"
    if row.state == "voting":
        standing = store_comparisons.comparison_progress(lab.store, row.id)
        return f"voting, {standing['votes']} of {standing['planned']}"
    if row.state == "abandoned":
        return "blindness given up, no verdict"
    a, b = names(lab, row)
    result = summary(row, store_comparisons.comparison_results(lab.store, row.id))
    if result.votes == 0:
        return "ended without votes"
    if not result.decided:
        return f"no evidence either way ({result.rate:.0%} for {a})"
    better, rate = (a, result.rate) if result.rate > 0.5 else (b, 1 - result.rate)
    return f"{better} preferred ({rate:.0%})"
