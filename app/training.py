"""What the Train tab says: whether the labels suffice, how long it will take, the same on the command line, what looks
wrong while it trains, and what to do next. Numbers and files in, plain words out; no Gradio, no torch."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

from app import jobs
from app.lab import Lab
from lpo.calibration import wilson
from lpo.config import CONFIGS, ConfigError, LPOConfig, LRMConfig, from_dict, from_preset, to_args
from storage import jobs as queue

FEW, SOME, CLEAR = 25, 100, 300  # usable training labels: below, a first try, a clear taste, plenty
KEPT_LOW, KEPT_HIGH = 0.05, 0.90
BY_HEART = 30  # passes of a training over its pairs; the study's 64 over 25 labels made the LRM worse
WAIT_ROWS = 3  # evidence needed before a warning about the kept fraction


def sufficiency(counts: dict, has_warm_start: bool) -> str:
    """Whether the labels suffice, from `storage.numbers.counts`, in two or three sentences."""
    train, heldout = counts["train"], counts["heldout"]
    told = sum(counts["choices"].get(name, 0) for name in ("both_bad", "skip"))
    head = f"**{train} usable {'label' if train == 1 else 'labels'}** to train on, {heldout} held out to test with"
    head += f" (skipped and both-bad answers, {told} here, do not train). " if told else ". "
    if counts.get("filter"):
        head += f"The filter {counts['filter']} keeps {counts['filtered']:,} imported labels out. "
    start = "start from an LRM that already knows something" if has_warm_start else "expect little from so few"
    if train == 0:
        words = (
            f"There is nothing to train on yet: give at least {FEW} answers in the Label tab, about two minutes' work."
        )
    elif train < FEW:
        words = f"That is too few to learn from: noise would win. Label until there are {FEW}, better {SOME}."
    elif train < SOME:
        words = f"Enough for a first try ({start}). A taste becomes clear from about {SOME} labels on."
    elif train < CLEAR:
        words = "Enough for a clear, simple taste. More labels help most with subtle ones."
    else:
        words = "Plenty. More labels now help less than better ones, or labels on pictures of the newest adapter."
    return head + words + " " + _heldout_words(heldout)


def _heldout_words(heldout: int) -> str:
    if heldout == 0:
        return "None is held out yet, so no accuracy can be told; about one label in five is, by its prompt."
    if heldout < 10:
        return "So few held-out labels say little about accuracy; about one label in five is held out, by its prompt."
    return f"With {heldout} held-out labels an accuracy is known to about ± {round(98 / math.sqrt(heldout))} points."


def amount(kind: str, config: LRMConfig | LPOConfig) -> float:
    """The size of a training in arbitrary units that grow as its time does: pairs of all steps for an LRM; for LPO
    network evaluations, roughly, of all iterations and of the evaluations between them."""
    if kind == "train-lrm":
        return config.steps * config.batch_size * (1.0 if config.train == "full" else 0.7)
    window = max(0.05, (min(config.t_max, 1000) - config.t_min) / 1000)
    iterations = config.iterations * config.prompts_per_iteration * config.steps * window * (1 + config.siblings / 2)
    evaluations = 1 + math.ceil(config.iterations / config.eval_every)
    return iterations + evaluations * config.eval_count * config.eval_seeds * config.steps


# Processor seconds on Scenes, one thread, until a run of this lab has told better: to begin and to end, then per unit
# of `amount`. By `python -m benchmarks.training_time`: 0.032 s a pair of an LRM step; an LPO iteration of 6 prompts
# 6.5 s, which is 0.018 a unit, and a picture of an evaluation 0.34 s, which is 0.017.
FIRST_GUESS = {"train-lrm": (15.0, 0.032), "train-lpo": (10.0, 0.018)}


def estimate(lab: Lab, kind: str, config: LRMConfig | LPOConfig, processes: int = 1, labels: int = 0) -> str:
    """How long it will take, judged by the newest run of the same kind on the same base and number of devices; for an
    LRM also how often it sees each of the study's `labels` usable training labels."""
    if kind == "train-lrm":
        pairs = round(labels * (1 - config.calibration))
        planned = replace(config, steps=config.planned_steps(pairs)) if pairs else config
        return f"{_time(lab, kind, planned, processes)} {_passes(config, planned.steps, pairs)}".strip()
    return _time(lab, kind, config, processes)


def _passes(config: LRMConfig, steps: int, pairs: int) -> str:
    """What few labels do to a training of so many steps; nothing when they are enough."""
    times = steps * config.batch_size / max(1, pairs)
    if steps < config.steps:
        return (
            f"{steps} of the {config.steps:,} steps are taken: no label is seen more than {config.max_epochs:g} times."
        )
    if times > BY_HEART and pairs:
        return (
            f"⚠️ Every label is seen {times:,.0f} times, and so learned by heart: set fewer steps, "
            "or about 10 *max epochs* among the other settings."
        )
    return ""


def _time(lab: Lab, kind: str, config: LRMConfig | LPOConfig, processes: int) -> str:
    base = config.base if kind == "train-lrm" else config.policy.base
    for job in queue.list_jobs(lab.store, kinds=(kind,), limit=20):
        try:
            past = from_dict(CONFIGS[kind], jobs.settings(job.config))
        except ConfigError:  # settings of an older version tell nothing about this one
            continue
        rows = jobs.read_metrics(jobs.run_dir(lab, job.id) / "metrics.jsonl", limit=50)
        same = (past.base if kind == "train-lrm" else past.policy.base) == base
        if same and job.config.get(jobs.PROCESSES, 1) == processes and len(rows) > 1 and rows[-1]["step"] >= 3:
            first, last = rows[0], rows[-1]
            step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
            begin = max(0.0, first["seconds"] - step * first["step"])  # loading and the like, however long it trains
            past = replace(past, steps=last["total"]) if kind == "train-lrm" else past
            seconds = begin + step * last["total"] * amount(kind, config) / amount(kind, past)
            return f"About {duration(seconds)}, judging by your last run."
    if base == "scenes" and processes == 1:
        fixed, unit = FIRST_GUESS[kind]
        return f"About {duration(fixed + unit * amount(kind, config))} on one processor core."
    return "How long it takes is not known yet; the first steps will tell."


def duration(seconds: float) -> str:
    """40 seconds, 5 minutes, 1.5 hours."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


def command(kind: str, preset: str, config: LRMConfig | LPOConfig, processes: int = 1, heldout: bool = False) -> str:
    """The command line that does the same, with the label snapshot or the prompt files as a job's run folder names
    them; `heldout` says whether the study has held-out prompts."""
    start = ["python", "-m", "lpo"]
    if processes > 1:
        start = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes), "-m", "lpo"]
    files = {"train-lrm": ["--pairs", "pairs.jsonl"], "train-lpo": ["--prompts", "prompts.json"]}[kind]
    if kind == "train-lpo" and heldout:
        files += ["--eval_prompts", "eval_prompts.json"]
    flags = to_args(config, from_preset(CONFIGS[kind], preset))
    for name in ("--pairs", "--prompts"):
        if name in flags:
            place = flags.index(name)
            del flags[place : place + 2]
    parts = [*start, kind, "--preset", preset, *files, *flags, "--run-dir", f"runs/my-{kind[6:]}"]
    return " ".join(shlex.quote(part) for part in parts)


def warnings(kind: str, rows: list[dict]) -> list[str]:
    """What looks wrong in the metrics so far, each in one or two plain sentences with a remedy."""
    if kind != "train-lpo":
        return _lrm_warnings(rows)
    out = []
    kept = [row["kept_fraction"] for row in rows if row.get("kept_fraction") is not None][-10:]
    if len(kept) >= WAIT_ROWS:
        mean = sum(kept) / len(kept)
        if mean < KEPT_LOW:
            out.append(
                f"Only {mean:.1%} of the pairs are kept: the LRM rarely sees a difference that passes the threshold; "
                "there is little to learn from. Lower threshold min and max, draw more siblings, or train the LRM with "
                "more labels."
            )
        elif mean > KEPT_HIGH:
            out.append(
                f"{mean:.0%} of the pairs are kept: the threshold hardly selects. The LRM may be overconfident; raise "
                "threshold min and max, or retrain it with labels set aside for calibration."
            )
    clamped = [row["clamp_fraction"] for row in rows if row.get("clamp_fraction") is not None][-10:]
    if len(clamped) >= WAIT_ROWS and sum(clamped) / len(clamped) > 0.5:
        out.append(
            "More than half of the pairs are at the clamp and teach nothing any more: the adapter has moved as far as "
            "the trust region allows. Stop here, or lower the learning rate."
        )
    held = [row["heldout_reward"] for row in rows if row.get("heldout_reward") is not None]
    if len(held) >= 4 and held[-1] < max(held) - 0.25 * (max(held) - min(held) + 1e-9) and max(held) > held[0]:
        out.append("The held-out reward has fallen from its best: an earlier checkpoint may be the better one.")
    return out


def _lrm_warnings(rows: list[dict]) -> list[str]:
    losses = [row["calibration_log_loss"] for row in rows if row.get("calibration_log_loss") is not None]
    if len(losses) >= 3 and losses[-1] > min(losses) + 0.1:
        return [
            "The loss on labels that it does not train on is rising: it begins to learn the single labels by heart. "
            "Fewer steps, a lower learning rate, or keep = best would help."
        ]
    return []


def outcome(kind: str, result: dict | None) -> str:
    """What a finished training achieved, in plain words."""
    if not result:
        return ""
    if kind == "train-lpo":
        last = result.get("metrics") or {}
        start, end = last.get("heldout_reward_reference"), last.get("heldout_reward")
        if start is None or end is None:
            return "The adapter is ready. Its LRM score is not the verdict: compare it blindly with the base."
        return (
            f"The reward on held-out prompts went from {start:.2f} to {end:.2f}. The LRM judged its own pupil: "
            "only a blind comparison tells whether people like it better."
        )
    heldout = result.get("heldout")
    accuracy = (heldout or {}).get("accuracy", {})
    if accuracy.get("value") is None:
        return "The LRM is ready. No label was held out, so nobody knows how good it is: label more prompts."
    low, high = _at_least_wilson(accuracy, heldout["decided"])
    words = f"The LRM is ready: it agrees with {accuracy['value']:.0%} of {heldout['decided']} held-out labels"
    words += f" (95% interval {low:.0%} to {high:.0%}; guessing gives 50%). "
    if low > 0.5:
        return words + "That is better than guessing: look at its curves, then train an adapter with it (2 · Adapter)."
    return (
        words
        + "That is **not yet surely better than guessing**: more labels are needed before an adapter is worth training."
    )


def _at_least_wilson(accuracy: dict, n: int) -> tuple[float, float]:
    """The interval, never narrower than Wilson's for n independent labels: a bootstrap of few prompts is too sure."""
    low, high = wilson(accuracy["value"], n)
    return min(accuracy["low"], low), max(accuracy["high"], high)


def run_name(lab: Lab, job: dict) -> str:
    """ "LRM 3", "LPO 1": the name that its checkpoints carry, once it has started."""
    about = Path(jobs.run_dir(lab, job["id"])) / "job.json"
    kind = {"train-lrm": "LRM", "train-lpo": "LPO"}[job["kind"]]
    return f"{kind} {json.loads(about.read_text())['number']}" if about.exists() else f"New {kind}"
