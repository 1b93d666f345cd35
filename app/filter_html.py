"""What the filter section says in words and pictures: the filter that is on, what a rule would do, example pairs."""

from html import escape

from storage import Storage, filters, mpcf

START = (
    '<p class="fi-quiet">A filter needs score gaps: how much better other judges find the chosen picture. Join the CSV '
    "of the data set, or let local models compute them: both under “Get score gaps”.</p>"
)
GATE_HEAD = '<div class="fi-head"><span>score</span><span>chosen − other, above</span><span>tie, below</span></div>'
STYLE = """
.fi-head { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; font-size: 12px;
  color: var(--body-text-color-subdued); }
.fi-quiet, small { color: var(--body-text-color-subdued); }
p { margin: 2px 0 6px; }
.fi-sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.fi-sides h5 { margin: 0 0 4px; font-size: 13px; font-weight: 600; }
.fi-pairs { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; font-size: 12px; }
.fi-two { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.fi-two img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; box-sizing: border-box;
  background: var(--background-fill-secondary); border: 2px solid transparent; }
.fi-two img.fi-won { border-color: var(--color-accent); }
.fi-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; display: block; }
.fi-missed { color: #D55E00; }
"""


def state_html(store: Storage, study_id: int) -> str:
    """Which filter is on in the study."""
    on = filters.active(store, study_id)
    if on is None:
        return '<p class="fi-quiet">No filter is on: every label of this study trains.</p>'
    rule = mpcf.words(mpcf.from_json(on.rule))
    return (
        f"<p><b>{escape(on.name)} is on</b>: {on.kept:,} imported labels train, {on.dropped:,} do not. "
        f"<small>{escape(rule)}</small></p>"
    )


def words(told: dict, rule: mpcf.Rule) -> str:
    """`filters.preview` as sentences."""
    total = told["kept"] + told["dropped"]
    share = told["kept"] / total if total else 0.0
    gates = "; ".join(
        f"{mpcf.WORDS[column]} alone drops {gate['alone']:,}"
        + (f", {gate['missing']:,} missing" * bool(gate["missing"]))
        for column, gate in told["gates"].items()
    )
    return (
        f"<p>The rule shown here keeps <b>{told['kept']:,} of {total:,} labels</b> ({share:.0%}); "
        f"{told['heldout']:,} held-out ones are never filtered. <small>{escape(mpcf.words(rule))}. {gates}.</small></p>"
    )


def pairs_html(shown: dict[str, list[dict]]) -> str:
    """`filters.examples` as two grids side by side: kept, and dropped with the scores that fail their gate in red."""
    sides = ""
    for name, rows in shown.items():
        cards = "".join(map(_pair, rows)) or "–"
        sides += f'<div><h5>Example pairs that are {name}</h5><div class="fi-pairs">{cards}</div></div>'
    return f'<div class="fi-sides">{sides}</div>'


def _pair(row: dict) -> str:
    pictures = "".join(
        f'<img src="media/{escape(row[side])}" class="{"fi-won" if row["choice"] == side else ""}" alt="{side}">'
        for side in ("first", "second")
    )
    numbers = ", ".join(
        f'<span class="{"fi-missed" if column in row["missed"] else ""}">{mpcf.WORDS[column]} {gap:+.2f}</span>'
        for column, gap in row["gaps"].items()
        if gap is not None
    )
    tie = "tie: " if row["choice"] == "tie" else ""
    prompt = escape(row["prompt"])
    name = f'<span class="fi-name" title="{prompt}">{prompt}</span>'
    return f'<div><div class="fi-two">{pictures}</div>{name}<small>{tie}{numbers}</small></div>'
