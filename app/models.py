"""Models out of the lab and into it: what the buttons of the Train tab ask of the data lane. Imports no torch.

Out: a checkpoint for another tool, as files that the page links to. In: a LoRA, an LRM folder or a merged UNet that
lies on this machine is checked against the study's base, and can then be chosen like one that was trained here.
"""

import json
from html import escape
from pathlib import Path

from app import choices, comparisons, jobs
from app.lab import Lab
from app.statistics import in_words
from app.story import megabytes
from storage import checkpoints, numbers
from storage import comparisons as stored
from storage import jobs as queue
from storage.models import Checkpoint
from storage.studies import get_study

FORMATS = {
    "adapter": [("kohya: ComfyUI, A1111", "kohya"), ("diffusers LoRA", "diffusers"), ("merged UNet", "merged")],
    "lrm": [("official LRM folder", "official")],
}
DTYPES = ["float16", "float32", "bfloat16"]
KINDS = [("LoRA", "adapter"), ("LRM", "lrm"), ("merged UNet", "base")]
EXPORT, IMPORT = "export-model", "import-model"
LISTED = {EXPORT: 20, IMPORT: 6}  # what was taken in long ago is in the lists of models
ENDED = ("done", "failed", "stopped", "cancelled")


def of_run(lab: Lab, job_id: str | None) -> list[Checkpoint]:
    """The checkpoints of a training, its end before its earlier steps."""
    rows = checkpoints.list_checkpoints(lab.store, job_id=job_id) if job_id else []
    return sorted(rows, key=lambda row: (not row.meta.get("final"), -(row.step or 0)))


def export(lab: Lab, checkpoint_id: int | None, layout: str, dtype: str = "float32", alone: bool = False) -> str:
    """Queues the export of a checkpoint; an earlier one of the very same is replaced. Returns the job's id.

    `alone` leaves out the adapters below. Raises ValueError with the sentence for the page.
    """
    if not checkpoint_id:
        raise ValueError("There is no checkpoint to export yet; wait for the training to save one.")
    row = checkpoints.get_checkpoint(lab.store, int(checkpoint_id))
    if layout not in [value for _, value in FORMATS.get(row.kind, [])]:
        known = ", ".join(value for _, value in FORMATS.get(row.kind, []))
        raise ValueError(f"{layout!r} is no format for {row.name}; choose one of {known or 'none'}.")
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is no number format; choose one of {', '.join(DTYPES)}.")
    config = {"checkpoint_id": row.id, "format": layout, "dtype": dtype, "alone": bool(alone), "name": row.name}
    for old in queue.list_jobs(lab.store, lane="data", kinds=(EXPORT,), limit=1000):
        if old.state in ENDED and all(old.config.get(key) == value for key, value in config.items()):
            jobs.delete(lab, old.id)
    return jobs.submit(lab, EXPORT, {**config, "about": about(lab, row)}, row.study_id)


def about(lab: Lab, row: Checkpoint) -> dict:
    """What the model card says that only the lab knows (see lpo/export_card.py)."""
    told: dict = {"name": row.name}
    if row.study_id is not None:
        study = get_study(lab.store, row.study_id)
        told |= {"study": study.name, "question": study.question}
    judge = row.meta.get("config", {}).get("lrm", row.path if row.kind == "lrm" else "")
    known = {each.path: each.name for each in checkpoints.list_checkpoints(lab.store, "lrm", include_hidden=True)}
    if judge:
        told["lrm"] = known.get(judge, "Scenes, as shipped" if judge == choices.WARM else Path(judge).name)
    labels = _labels(lab, row.study_id, Path(judge).parent.parent / "pairs.jsonl")
    return told | ({"labels": labels} if labels else {}) | ({"verdicts": _verdicts(lab, row)})


def _labels(lab: Lab, study_id: int | None, snapshot: Path) -> dict:
    """How many labelled pairs trained the LRM, from the snapshot in its run folder, and how many answers of the study
    are simulated; {} for an LRM of elsewhere."""
    if study_id is None or not snapshot.is_file():
        return {}
    with open(snapshot) as file:
        splits = [json.loads(line)["split"] for line in file]
    annotators = numbers.counts(lab.store, study_id)["annotators"]
    simulated = sum(each["labels"] for each in annotators if each["kind"] == "simulated")
    return {"train": splits.count("train"), "heldout": splits.count("heldout"), "simulated": simulated}


def _verdicts(lab: Lab, row: Checkpoint) -> list[str]:
    """One sentence for every finished blind comparison in which this adapter was the last one of a side."""
    out = []
    for each in stored.list_comparisons(lab.store, row.study_id) if row.study_id is not None else []:
        sides = [policy["adapters"][-1]["path"] for policy in (each.policy_a, each.policy_b) if policy["adapters"]]
        if each.state != "complete" or row.path not in sides:
            continue
        results = stored.comparison_results(lab.store, each.id)
        simulated = sum(vote["simulated"] for vote in results["votes"])
        words = in_words(comparisons.summary(each, results), *comparisons.names(lab, each))
        out.append(words + (f" {simulated} of the votes are simulated." if simulated else ""))
    return out


def take_in(lab: Lab, kind: str, path: str, name: str = "", base: str = "") -> str:
    """Queues the check of a model of this machine, after which it can be chosen; returns the job's id.

    `base` is that of an official LRM if it is not the study's. Raises ValueError with the sentence for the page.
    """
    if kind not in dict(map(reversed, KINDS)):
        raise ValueError(f"{kind!r} is no kind of model; choose LoRA, LRM or merged UNet.")
    text = str(path or "").strip().strip("\"'")
    if not text:
        raise ValueError("The path is empty; name a file or folder of the machine that the lab runs on.")
    found = Path(text).expanduser().absolute()
    if not found.exists():
        raise ValueError(f"There is nothing at {text} on the machine that the lab runs on; check the path.")
    if kind != "adapter" and not found.is_dir():
        raise ValueError(f"{text} is a file; an LRM and a merged UNet are folders.")
    if kind == "adapter" and found.is_file() and found.suffix != ".safetensors":
        raise ValueError(f"{text} is not a .safetensors file; others are not loaded, since they may hold code.")
    taken = [row for row in checkpoints.list_checkpoints(lab.store, include_hidden=True) if row.path == str(found)]
    if taken and not taken[0].hidden:
        raise ValueError(f"That is here already, as {taken[0].name}; choose it in the lists.")
    study = lab.current_study()
    config = {
        "kind": kind, "path": str(found), "name": " ".join(str(name or "").split())[:80] or found.stem,
        "base": study.base, "lrm_base": str(base or "").strip(),
    }  # fmt: skip
    return jobs.submit(lab, IMPORT, config, study.id)


def listing(lab: Lab, kind: str, checkpoint_ids: list[int] | None = None) -> tuple[str, bool]:
    """The newest exports (of some checkpoints) or imports as HTML, and whether any is still under way."""
    rows = [row for row in jobs.list_jobs(lab, lane="data", limit=200) if row["kind"] == kind]
    if checkpoint_ids is not None:
        rows = [row for row in rows if row["config"]["checkpoint_id"] in checkpoint_ids]
    lines = "".join(f"<tr><td>{_what(row)}</td><td>{_state(lab, row)}</td></tr>" for row in rows[: LISTED[kind]])
    return f"<table>{lines}</table>" if lines else "", any(row["state"] not in ENDED for row in rows)


def _what(row: dict) -> str:
    config = row["config"]
    if row["kind"] == IMPORT:
        word = {value: name for name, value in KINDS}[config["kind"]]
        return f"{word} <b>{escape(config['name'])}</b>"
    alone = ", alone" if config["alone"] else ""
    dtype = "" if config["format"] == "official" else f", {escape(config['dtype'])}"
    return f"<b>{escape(config['name'])}</b> as {escape(config['format'])}{dtype}{alone}"


def _state(lab: Lab, row: dict) -> str:
    if row["state"] == "failed":
        return f"⚠️ {escape(row['error'] or 'It failed.')}"
    if row["state"] == "queued":
        return jobs.waiting(lab)
    if row["state"] in ("stopped", "cancelled"):
        return "stopped; press the button again"
    if row["state"] != "done":
        return escape(row["message"] or row["state"])
    if row["kind"] == IMPORT:
        return f"can be chosen now: {escape(row['result']['words'])}"
    return " · ".join(
        f'<a href="models/{row["id"]}/{index}" download><b>{escape(file["name"])}</b></a> '
        f"<small>{megabytes(file['bytes'])}</small>"
        for index, file in enumerate(row["result"]["files"])
    )
