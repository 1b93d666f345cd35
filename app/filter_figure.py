"""What a filter keeps and drops, drawn before it is applied: score gaps in, plain Plotly JSON out. No Gradio.

A column of histograms per score: above the pairs with a chosen picture, below the ties. The shaded side of a dashed
line is what its gate lets through; a bar is split into what the whole rule keeps and what it drops.
"""

from html import escape

import numpy as np

from app.figure_parts import COLORS
from storage import mpcf
from storage.data_models import GAP_COLUMNS
from storage.gaps import Gaps

KEPT, DROPPED = COLORS[0], COLORS[5]
BINS = 36
GAP_X, GAP_Y = 0.06, 0.27
HEIGHT = 370


def value(gaps: Gaps, rule: mpcf.Rule) -> dict:
    """The reward plot component's value: the figure, its numbers as rows, and a line of words."""
    train, shown = gaps.train, [c for c in GAP_COLUMNS if not np.isnan(gaps.scores[c][gaps.train]).all()]
    kept = mpcf.keeps(rule, gaps.ties, gaps.scores)
    groups = [("a picture is chosen", train & ~gaps.ties), ("ties", train & gaps.ties)]
    groups = [(title, mask) for title, mask in groups if mask.any()]
    layout = {
        "margin": {"l": 40, "r": 10, "t": 26, "b": 48}, "showlegend": False, "barmode": "stack", "bargap": 0.04,
        "hovermode": "x unified", "dragmode": False, "annotations": [], "shapes": [],
    }  # fmt: skip
    data: list[dict] = []
    rows: list[dict] = []
    for row, (title, mask) in enumerate(groups):
        for column, score in enumerate(shown):
            place = _Place(row * len(shown) + column, row, column, len(groups), len(shown))
            gap, keep = gaps.scores[score][mask], kept[mask]
            counts = _histogram(gap, keep, rule.gates.get(score), title == "ties")
            data += _bars(counts, place)
            rows += [{"pairs": title, "score": mpcf.WORDS[score], **each} for each in counts]
            _axes(layout, place, f"{mpcf.WORDS[score]} gap", counts)
            if column == 0:
                _title(layout, place, title, int(keep.sum()), len(keep))
            if score in rule.active:
                _gate(layout, place, rule, score, title == "ties", counts)
    return {"figure": {"data": data, "layout": layout}, "curves": [], "rows": rows, "note": ""}


class _Place:
    """One panel: its axes' suffix and where it lies in the figure, in shares of its width and height."""

    def __init__(self, number: int, row: int, column: int, rows: int, columns: int):
        self.suffix = "" if number == 0 else str(number + 1)
        width, height = (1 - GAP_X * (columns - 1)) / columns, (1 - GAP_Y * (rows - 1)) / rows
        self.left, self.top = column * (width + GAP_X), 1 - row * (height + GAP_Y)
        self.right, self.bottom = self.left + width, self.top - height


def _histogram(gap: np.ndarray, keep: np.ndarray, gate: mpcf.Gate | None, ties: bool) -> list[dict]:
    """[{low, high, kept, dropped}] over the middle 98 %, the gate included; what lies outside counts at the ends."""
    known = ~np.isnan(gap)
    gap, keep = gap[known], keep[known]
    low, high = np.quantile(gap, [0.01, 0.99]) if len(gap) else (-1.0, 1.0)
    if gate is not None and gate.on:
        limit = gate.tie_below if ties else gate.above
        low, high = min(low, limit), max(high, limit)
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    edges = np.linspace(low, high, BINS + 1)
    inside = np.clip(gap, low, high)
    counted = [np.histogram(inside[which], edges)[0] for which in (keep, ~keep)]
    return [
        {"low": float(a), "high": float(b), "kept": int(k), "dropped": int(d)}
        for a, b, k, d in zip(edges[:-1], edges[1:], *counted, strict=True)
    ]


def _bars(counts: list[dict], place: _Place) -> list[dict]:
    axes = {"xaxis": f"x{place.suffix}", "yaxis": f"y{place.suffix}"}
    middle = [(each["low"] + each["high"]) / 2 for each in counts]
    return [
        {
            "type": "bar", "x": middle, "y": [each[name] for each in counts], "name": name,
            "marker": {"color": color}, "hovertemplate": f"%{{y}} {name}<extra></extra>", **axes,
        }
        for name, color in (("kept", KEPT), ("dropped", DROPPED))
    ]  # fmt: skip


def _axes(layout: dict, place: _Place, title: str, counts: list[dict]) -> None:
    plain = {"zeroline": False, "fixedrange": True, "nticks": 5}
    layout[f"xaxis{place.suffix}"] = {
        "domain": [place.left, place.right], "anchor": f"y{place.suffix}", "title": {"text": title, "standoff": 2},
        "range": [counts[0]["low"], counts[-1]["high"]], **plain,
    }  # fmt: skip
    layout[f"yaxis{place.suffix}"] = {"domain": [place.bottom, place.top], "anchor": f"x{place.suffix}", **plain}


def _title(layout: dict, place: _Place, words: str, kept: int, total: int) -> None:
    text = (
        f"<b>{escape(words)}</b>  <span style='color:{KEPT}'>{kept:,} kept</span>  "
        f"<span style='color:{DROPPED}'>{total - kept:,} dropped</span>"
    )
    layout["annotations"].append(
        {
            "text": text, "x": place.left, "y": place.top, "xref": "paper", "yref": "paper", "xanchor": "left",
            "yanchor": "bottom", "yshift": 4, "showarrow": False,
        }
    )  # fmt: skip


def _gate(layout: dict, place: _Place, rule: mpcf.Rule, score: str, ties: bool, counts: list[dict]) -> None:
    """The gate's line, and the side that it lets through as a pale band."""
    low, high = counts[0]["low"], counts[-1]["high"]
    gate = rule.gates[score]
    if ties:
        lines = [-gate.tie_below, gate.tie_below] if rule.tie_distance else [gate.tie_below]
        band = (max(low, lines[0]) if rule.tie_distance else low, min(high, lines[-1]))
    else:
        lines, band = [gate.above], (gate.above, high)
    axes = {"xref": f"x{place.suffix}", "yref": f"y{place.suffix} domain", "y0": 0, "y1": 1}
    if (rule.keep_ties or not ties) and band[0] < band[1]:
        layout["shapes"].append(
            {"type": "rect", "x0": band[0], "x1": band[1], **axes, "fillcolor": KEPT, "opacity": 0.1,
             "line": {"width": 0}, "layer": "below"}
        )  # fmt: skip
    layout["shapes"] += [
        {"type": "line", "x0": x, "x1": x, **axes, "line": {"color": "soft", "width": 1.5, "dash": "dash"}}
        for x in lines
        if low <= x <= high
    ]
