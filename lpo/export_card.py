"""The model card beside an exported LoRA: base, data, LRM, settings, results, and how to load it. Names and questions
are other people's text, so all of it is escaped. Imports no torch.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from lpo.config import Adapter, ConfigError, LPOConfig
from lpo.options import parse_json

ABOUT = {"name": str, "study": str, "question": str, "labels": dict, "verdicts": list, "lrm": str}
PUBLISHED = ("iterations", "prompts_per_iteration", "steps", "guidance_scale", "eta", "siblings", "threshold",
             "threshold_min", "threshold_max", "t_min", "t_max", "beta", "beta_unit", "clamp", "lora_rank", "lr",
             "score_timestep", "seed")  # fmt: skip
RESULTS = {
    "heldout_reward": "Reward on held-out prompts",
    "heldout_reward_reference": "Reward on held-out prompts before the training",
    "diversity": "Diversity across seeds",
    "diversity_reference": "Diversity across seeds before the training",
    "drift": "Drift from the reference, in σ",
    "implicit_accuracy": "Kept pairs that the adapter orders as the LRM does",
    "kept_fraction": "Pairs kept",
    "clamp_fraction": "Pairs at the clamp",
}
METHOD = "Latent Preference Optimization (arXiv 2502.01051)"
NO_RESULTS = "No blind comparison of this adapter is known. The rewards below are those of the LRM that trained it.\n"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_about(path: str | None) -> dict:
    """What only the lab knows: name, study, question, labels {train, heldout, simulated}, verdicts (sentences), lrm.

    Raises ConfigError for a file that says anything else.
    """
    if path is None:
        return {}
    try:
        about = parse_json(Path(path).read_bytes(), dict, f"{path} is not valid JSON: it must hold one object.")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if about.pop("format_version", 1) != 1:
        raise ConfigError(f"{path} must be a JSON object of format_version 1.")
    for name, value in about.items():
        if name not in ABOUT or not isinstance(value, ABOUT[name]):
            known = ", ".join(f"{field} ({kind.__name__})" for field, kind in ABOUT.items())
            raise ConfigError(f"{path} says {name!r}, which a model card does not take so; it takes {known}.")
    return about


def plain(text: object) -> str:
    """Text as text: one line, no HTML, no Markdown."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-!|~>@:])", r"\\\1", line)


def short(path: str) -> str:
    """The end of a checkpoint's path: "final" alone would say nothing."""
    return "/".join(Path(path).parts[-3:])


def card(title: str, base: str, unet: str, adapters: Sequence[Adapter], info: dict, about: dict, files: str) -> str:
    """README.md. `info` is adapter.json of the last adapter ({} for one of another tool), `files` how to load it."""
    config = info.get("config", {})
    model = [("Base", base), *([("UNet in place of the base's", unet)] if unet else [])]
    if len(adapters) > 1:
        stack = ", then ".join(f"{short(each.path)} × {each.strength:g}" for each in adapters)
        model.append(("Merged from", stack))
    elif adapters[0].strength != 1:
        model.append(("Strength folded in", f"{adapters[0].strength:g}"))
    model.append(("Method", METHOD if config else "a LoRA of another tool"))
    labels = about.get("labels", {})
    data = [(word, about[key]) for key, word in (("study", "Study"), ("question", "Question asked")) if key in about]
    if labels:
        told = f"{labels.get('train', 0)} to train on, {labels.get('heldout', 0)} held out"
        data.append(("Labels", told + (f"; {labels['simulated']} simulated" if labels.get("simulated") else "")))
    lrm = about.get("lrm") or config.get("lrm")
    data += [("Latent reward model", lrm)] if lrm else []
    metrics = info.get("metrics", {})
    numbers = {words: metrics[name] for name, words in RESULTS.items() if isinstance(metrics.get(name), (int, float))}
    head = f"At step {metrics['step']}" if isinstance(metrics.get("step"), int) else "At the end"
    sections = [
        _front_matter(base),
        f"# {plain(title)}\n",
        _list(model),
        *(["## Data\n", _list(data)] if data else []),
        "## Results\n",
        "".join(f"- {plain(each)}\n" for each in about.get("verdicts", [])) or NO_RESULTS,
        _table((head, "Value"), numbers) if numbers else "",
        *(["## Settings\n", _table(("Setting", "Value"), _settings(config))] if config else []),
        f"## Use\n\n{files}",
    ]
    return "\n".join(part for part in sections if part)


def _front_matter(base: str) -> str:
    told = f"base_model: {json.dumps(base)}\n" if HUB_ID.fullmatch(base) and not Path(base).exists() else ""
    return f"---\n{told}library_name: diffusers\ntags: [lora, text-to-image, lpo, preference-lab]\n---\n"


def _settings(config: dict) -> dict:
    return {name: config[name] for name in PUBLISHED if name in LPOConfig.__dataclass_fields__ and name in config}


def _list(rows: Sequence[tuple[str, object]]) -> str:
    return "".join(f"- {name}: {plain(value)}\n" for name, value in rows)


def _table(head: tuple[str, str], rows: dict) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {plain(name)} | {plain(f'{v:.4g}' if isinstance(v, float) else v)} |" for name, v in rows.items()]
    return "\n".join(lines) + "\n"
