"""The Data tab's small pieces of HTML: the numbers at the head, the story of a pair, the story of a picture.

Plain functions from what `storage/stories.py` returns to escaped HTML; everything a person or a file wrote goes through
`escape`.
"""

from html import escape
from pathlib import Path

from app.choices import search_words

CHOICE_WORDS = {"first": "first", "second": "second", "tie": "tie", "both_bad": "both bad", "skip": "skipped"}
SIDE_WORDS = {"first": "first was left", "second": "second was left", "": ""}


def numbers(rows: list[tuple[str, str, str]]) -> str:
    """Tiles of (number, what it counts, a remark)."""
    tiles = "".join(
        f'<div class="st-tile"><b>{escape(number)}</b><span>{escape(name)}</span><small>{escape(remark)}</small></div>'
        for number, name, remark in rows
    )
    return f'<div class="st-tiles">{tiles}</div>'


def picture_html(story: dict, names: dict[str, str]) -> str:
    """A picture with where it came from; `names` are those of checkpoints, by their paths."""
    pairs = ", ".join(f"pair {number}" for number in story["pairs"]) or "no pair"
    return (
        f'<div class="st-one">{_image(story)}<div><h4>{escape(story["prompt"] or "no prompt")}</h4>'
        f"{_facts(story, names)}<p>Shown in {escape(pairs)}.</p></div></div>"
    )


def pair_html(story: dict, names: dict[str, str]) -> str:
    """A pair: both pictures with their provenance, then every answer ever given, taken back or not. `names` are those
    of checkpoints, by their paths."""
    words = {"train": "trains", "heldout": "held out"}
    splits = ", ".join(f"{words[split]} in {name}" for name, split in story["splits"]) or "in no study"
    sides = "".join(
        f"<figure>{_image(story[side])}<figcaption><b>{side}</b>{_facts(story[side], names)}</figcaption></figure>"
        for side in ("first", "second")
    )
    return (
        f'<h4>{escape(story["prompt"])}</h4><p class="st-sub">Pair {story["id"]} · from {escape(story["origin"])} · '
        f'made {story["made"]} · {escape(splits)}</p><div class="st-two">{sides}</div>{_history(story["history"])}'
    )


def policy_words(policy: dict | str | None, names: dict[str, str]) -> str:
    """A policy of a provenance in a few words: 'scenes + LPO 1 × 0.5'. What has no name in this lab any more, or never
    had one, is called by its file."""
    if not isinstance(policy, dict):
        return str(policy or "unknown")
    unet = policy.get("unet")
    words = [str(policy.get("base", "?")) + (f" with {names.get(unet, Path(unet).name)}" if unet else "")]
    for adapter in policy.get("adapters", []):
        name = names.get(adapter.get("path")) or file_words(Path(str(adapter.get("path", "?"))))
        strength = adapter.get("strength", 1.0)
        words.append(name if strength == 1.0 else f"{name} × {strength:g}")
    if search := policy.get("search"):
        words.append(search_words(search, names.get(search["lrm"], f"LRM {Path(search['lrm']).name}")))
    return " + ".join(words)


def file_words(path: Path) -> str:
    """An adapter's file by its run and its step: 'a486c15e/step-000040'."""
    return f"{path.parent.parent.name[:8]}/{path.name}" if path.parent.name == "checkpoints" else path.name


def megabytes(size: int) -> str:
    """Bytes as a page shows them."""
    return (
        f"{size / 2**30:.1f} GB"
        if size >= 2**30
        else f"{size / 2**20:.0f} MB"
        if size >= 2**20
        else f"{size / 1024:.0f} kB"
    )


def _image(picture: dict) -> str:
    return f'<img src="media/{escape(picture["hash"])}" alt="{escape(picture["prompt"])}">'


def _facts(picture: dict, names: dict[str, str]) -> str:
    provenance = picture["provenance"]
    facts = [("size", f"{picture['width']} × {picture['height']}"), ("stored", picture["made"])]
    if "imported" in provenance:
        facts.insert(0, ("imported", str(provenance["imported"])))
    else:
        facts.insert(0, ("policy", policy_words(provenance.get("policy"), names)))
        known = ("scheduler", "steps", "guidance_scale", "eta", "seed")
        facts += [(name, _short(provenance[name])) for name in known if name in provenance]
    facts.append(("sha256", picture["hash"][:12] + "…"))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f'<dl class="st-facts">{rows}</dl>'


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _history(rows: list[dict]) -> str:
    if not rows:
        return '<p class="st-sub">Nobody has answered this pair yet.</p>'
    lines = "".join(_line(row) for row in rows)
    head = "".join(f"<th>{name}</th>" for name in ("When", "Annotator", "Answer", "Shown", "Seconds", "Status"))
    return (
        '<h4>Label history</h4><p class="st-sub">Nothing is deleted: an answer that was taken back is struck out.</p>'
        f'<table class="st-history"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    )


def _line(row: dict) -> str:
    who = row["annotator"] if row["kind"] == "human" else f"{row['annotator']} (simulated)"
    answer = CHOICE_WORDS.get(row["choice"], f"takes back row {row['revokes']}")
    status = row["status"] + (f", comparison {row['comparison']}" if row["comparison"] else "")
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    cells = (row["when"], who, answer, SIDE_WORDS[row["left"]], seconds, f"row {row['id']}: {status}")
    gone = ' class="st-gone"' if row["status"] == "taken back" else ""
    return f"<tr{gone}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


STYLE = """
.st-tiles { display: flex; flex-wrap: wrap; gap: 6px 16px; }
.st-tile { display: flex; flex-direction: column; line-height: 1.3; }
.st-tile b { font-size: 20px; font-weight: 600; }
.st-tile span { font-size: 13px; }
.st-tile small, .st-sub { color: var(--body-text-color-subdued); font-size: 12px; }
h4 { margin: 0 0 2px; font-size: 15px; font-weight: 600; }
p { margin: 2px 0 8px; }
.st-two { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-bottom: 10px; }
.st-two figure { margin: 0; min-width: 0; }
.st-two img, .st-one img { width: 100%; max-width: 256px; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary); display: block; margin-bottom: 4px; }
.st-facts { display: grid; grid-template-columns: auto 1fr; gap: 0 8px; margin: 4px 0; font-size: 12px; }
.st-facts dt { color: var(--body-text-color-subdued); }
.st-facts dd { margin: 0; overflow-wrap: anywhere; }
.st-history { width: 100%; border-collapse: collapse; font-size: 12px; }
.st-history th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); padding: 3px 6px 3px 0; }
.st-history td { border-top: 1px solid var(--border-color-primary); padding: 3px 6px 3px 0; vertical-align: top; }
.st-gone td:nth-child(3) { text-decoration: line-through; }
.st-gone { color: var(--body-text-color-subdued); }
"""
