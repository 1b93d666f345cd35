"""What a person can choose from: policies (the base and its adapters) and LRMs, by name, as dropdown choices.

A choice's value is a short text that survives a reload: "base", "scenes", or a checkpoint's id; with a search behind
it "base+steps+scenes+4+0+1000": policy, method, LRM, candidates, t_min, t_max.
"""

from pathlib import Path

from app.lab import ROOT, Lab
from lpo.config import ConfigError, Search, from_dict
from lpo.places import resolve_base
from lpo.preflight import fits
from storage import checkpoints as stored
from storage.models import Checkpoint
from storage.studies import get_study

WARM_LRM = ROOT / "lpo" / "scenes" / "weights" / "lrm"
BASE, WARM = "base", "scenes"
SEARCHES = "searches"  # the setting that keeps the searches of every study
MOST_SEARCHES = 20


def checkpoints(lab: Lab, kind: str) -> list[Checkpoint]:
    """The visible checkpoints of a kind ("adapter" or "lrm"): newest run first, its end before its earlier steps."""
    rows = stored.list_checkpoints(lab.store, kind)
    runs = list(dict.fromkeys(row.job_id or row.path for row in rows))
    return sorted(
        rows, key=lambda row: (runs.index(row.job_id or row.path), not row.meta.get("final"), -(row.step or 0))
    )


def policies(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of the study's base, of merged UNets in its place, and of the adapters on it."""
    rows = [row for row in checkpoints(lab, "base") if row.study_id == lab.current_study().id]
    return [("base", BASE), *((row.name, str(row.id)) for row in rows), *adapters(lab)]


def adapters(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of the adapters of the study's base: what can be put on top of another policy."""
    base = lab.current_study().base
    return [(row.name, str(row.id)) for row in checkpoints(lab, "adapter") if same_base(_base_of(lab, row), base)]


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same model, e.g. a folder by its absolute and its relative path."""
    return one == other or _place(one) == _place(other)


def _place(base: str) -> str:
    try:
        source = resolve_base(base)
    except ConfigError:  # gone: its name is all that is left of it
        return base
    return str(Path(source).resolve()) if Path(source).exists() else source


def _base_of(lab: Lab, row: Checkpoint) -> str:
    """The base that an adapter or merged UNet was made on or checked against; the current study's if nothing tells."""
    below = row.meta.get("policy")
    if below is not None:
        return below["base"]
    return get_study(lab.store, row.study_id).base if row.study_id is not None else lab.current_study().base


def policy(lab: Lab, value: str, strength: float = 1.0) -> dict:
    """The Policy (plain JSON values) behind a choice: an adapter comes with the ones that it was trained on top of.

    `strength` is that of the chosen adapter; the ones below it keep what they were trained with. ValueError with one
    sentence if something of it is gone, or of another base than the study's.
    """
    below, found = split(value)
    if found is not None:
        return {**policy(lab, below, strength), "search": {**found, "lrm": lrm(lab, found["lrm"])}}
    if value == BASE:
        return {"base": lab.current_study().base, "adapters": []}
    row, own = _row(lab, value, "adapter", "base"), lab.current_study().base
    if not same_base(base := _base_of(lab, row), own):
        raise ValueError(
            f"{row.name} belongs to the base {base}, but the study's base is {own}: choose another one from the list, "
            "or a study on that base."
        )
    if row.kind == "base":
        return {"base": own, "adapters": [], "unet": row.path}
    below = row.meta.get("policy")
    if below is None:
        below = policy(lab, str(row.parent_id) if _is_adapter(lab, row.parent_id) else BASE)
    return {**below, "base": own, "adapters": [*below["adapters"], {"path": row.path, "strength": strength}]}


def lrms(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of the LRMs that read the latents of the study's base, whatever base they were trained on; newest
    first, the shipped one last."""
    base = lab.current_study().base
    rows = [(row.name, str(row.id)) for row in checkpoints(lab, "lrm") if fits(row.path, base)]
    return rows + ([("Scenes, as shipped", WARM)] if base == "scenes" else [])


def sampling_policies(lab: Lab) -> list[tuple[str, str]]:
    """(label, value) of all that can sample: base and adapters, then the searches that were made of them."""
    known, scoring = dict(map(reversed, policies(lab))), dict(map(reversed, lrms(lab)))
    made = []
    for value in _searches(lab):
        below, search = split(value)
        if below in known and search["lrm"] in scoring:
            made.append((f"{known[below]} + {search_words(search, scoring[search['lrm']])}", value))
    return policies(lab) + made


def add_search(lab: Lab, below: str, search: dict) -> str:
    """Keeps a search (a Search with an LRM's choice as `lrm`) on top of the policy `below`, newest first; returns the
    choice's value. Raises ValueError with one sentence."""
    checked = from_dict(Search, {**search, "lrm": lrm(lab, search["lrm"])})
    if checked.candidates == 1:
        raise ConfigError("candidates is 1: there is nothing to choose from; take 2 or more.")
    policy(lab, below)
    window = (checked.t_min, checked.t_max) if checked.method == "steps" else (0, 1000)
    value = "+".join(map(str, (below, checked.method, search["lrm"], checked.candidates, *window)))
    keep = [value, *(each for each in _searches(lab) if each != value)][:MOST_SEARCHES]
    _keep_searches(lab, keep)
    return value


def forget_searches(lab: Lab) -> None:
    """Takes the current study's searches off the lists; traces and comparisons made with them stay."""
    _keep_searches(lab, [])


def split(value: str) -> tuple[str, dict | None]:
    """The policy and the search (with an LRM's choice as `lrm`) of a choice's value; None without a search."""
    below, *parts = str(value).split("+")
    if len(parts) != 5:
        return value, None
    method, scorer, *numbers = parts
    return below, {"method": method, "lrm": scorer} | dict(
        zip(("candidates", "t_min", "t_max"), map(int, numbers), strict=True)
    )


def search_value(lab: Lab, below: str, search: dict) -> str:
    """The choice's value of a stored search; just `below` if its LRM is gone."""
    for _, value in lrms(lab):
        if lrm(lab, value) == search["lrm"]:
            return add_search(lab, below, {**search, "lrm": value})
    return below


def search_words(search: dict, lrm_name: str) -> str:
    """'best of 4 (LRM 3)', 'steps × 4 (LRM 3)', 'steps × 4, t 500–1000 (LRM 3)'."""
    if search["method"] == "best-of-n":
        return f"best of {search['candidates']} ({lrm_name})"
    low, high = search["t_min"], search["t_max"]
    window = f", t {low}–{high}" if (low, high) != (0, 1000) else ""
    return f"steps × {search['candidates']}{window} ({lrm_name})"


def short_names(named: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """(name, Policy) pairs without the LRMs that search where one LRM does all of it: in a figure room is scarce."""
    searching = {policy["search"]["lrm"] for _, policy in named if policy.get("search")}
    if len(searching) != 1:
        return named
    short = [name.rpartition(" (")[0] if policy.get("search") else name for name, policy in named]
    return (
        [(name, policy) for name, (_, policy) in zip(short, named, strict=True)]
        if len(set(short)) == len(named)
        else named
    )


def _searches(lab: Lab) -> list[str]:
    return stored.get_setting(lab.store, SEARCHES, {}).get(str(lab.current_study().id), [])


def _keep_searches(lab: Lab, values: list[str]) -> None:
    kept = stored.get_setting(lab.store, SEARCHES, {})
    stored.set_setting(lab.store, SEARCHES, {**kept, str(lab.current_study().id): values})


def lrm(lab: Lab, value: str) -> str:
    """The folder, or the alias "scenes", behind a choice."""
    return WARM if value == WARM else _row(lab, value, "lrm").path


def named_lrms(lab: Lab, values: list[str]) -> list[tuple[str, str]]:
    """(name, folder or alias) behind each choice. ValueError with one sentence for what is not offered any more, as on
    a page that was opened before another study was chosen."""
    names = dict(map(reversed, lrms(lab)))
    if not set(values) <= set(names):
        raise ValueError(
            "A chosen LRM is gone, or of another base than the study's; choose from the list as it is now."
        )
    return [(names[value], lrm(lab, value)) for value in values]


def lrm_folder(path: str) -> Path:
    """The folder of an LRM that is named by its folder or by the alias."""
    return WARM_LRM if path == WARM else Path(path)


def _row(lab: Lab, value: str, kind: str, other: str = "") -> Checkpoint:
    with lab.store.reader() as session:
        row = session.get(Checkpoint, int(value)) if str(value).isdigit() else None
    if row is None or row.kind not in (kind, other):
        word = {"lrm": "LRM"}.get(kind, kind)
        raise ValueError(f"The chosen {word} ({value!r}) is gone; choose another one from the list.")
    return row


def _is_adapter(lab: Lab, checkpoint_id: int | None) -> bool:
    with lab.store.reader() as session:
        row = session.get(Checkpoint, checkpoint_id) if checkpoint_id is not None else None
    return row is not None and row.kind == "adapter"
