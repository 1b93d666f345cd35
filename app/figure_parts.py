"""The parts of the reward figure: axes, curves, siblings, means, labels at the ends, accuracies. See app/figures.py.

Plain Plotly JSON. A colour written "soft" is replaced in the browser by the page's own subdued ink, so that figures
follow the light and the dark theme.
"""

import math
from collections import defaultdict

# Okabe and Ito's palette without yellow and black: told apart by all common kinds of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("solid", "dash", "dot", "dashdot")
NOISE = [1000, 0]  # timesteps run from noise at the left to the picture at the right


def layout_of(title: str, accuracy: list[dict]) -> dict:
    axis = {
        "range": NOISE,
        "title": {"text": "timestep t", "standoff": 4},
        "zeroline": False,
        "showline": True,
        "dtick": 100,
        "showspikes": True,
        "spikemode": "across",
        "spikethickness": 1,
        "spikedash": "solid",
        "spikesnap": "hovered data",
        "fixedrange": True,
    }
    layout = {
        "margin": {"l": 52, "r": 20, "t": 8, "b": 38},
        "showlegend": False,
        "hovermode": "x",
        "hoverdistance": -1,
        "spikedistance": -1,
        "dragmode": False,
        "uirevision": "kept",
        "xaxis": axis,
        "yaxis": {"title": {"text": title, "standoff": 6}, "zeroline": False, "domain": [0, 1], "fixedrange": True},
        "shapes": [],
        "annotations": [
            {
                "text": "noise",
                "x": 0,
                "y": 0,
                "xref": "paper",
                "yref": "paper",
                "yshift": -37,
                "xanchor": "left",
                "showarrow": False,
                "font": {"color": "soft"},
            },
            {
                "text": "picture",
                "x": 1,
                "y": 0,
                "xref": "paper",
                "yref": "paper",
                "yshift": -37,
                "xanchor": "right",
                "showarrow": False,
                "font": {"color": "soft"},
            },
        ],
    }
    if accuracy:
        words = "How often each LRM agrees with held-out labels at that t (95% intervals)"
        if not any(a["labels"] for a in accuracy):
            words = "How often the warm LRM tells generated pictures apart at that t (no labels needed)"
        layout["yaxis"]["domain"] = [0.36, 1]
        layout["yaxis2"] = {
            "domain": [0, 0.26],
            "range": [min(0.38, *(low - 0.02 for a in accuracy for low in a["low"])), 1.02],
            "tickformat": ".0%",
            "dtick": 0.25,
            "tick0": 0.5,
            "zeroline": False,
            "fixedrange": True,
        }
        layout["xaxis"]["anchor"] = "y2"
        layout["annotations"].append(
            {
                "text": words,
                "x": 0,
                "y": 0.27,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"color": "soft"},
            }
        )
    return layout


def curve_line(index: int, curve: dict, thin: bool) -> dict:
    steps = [s for s in curve["steps"] if s["score"] is not None]
    return {
        "type": "scatter",
        "mode": "lines" if thin else "lines+markers",
        "name": curve["label"],
        "x": [s["t"] for s in steps],
        "y": [s["score"] for s in steps],
        "customdata": [[index, s["step"]] for s in steps],
        "hoverinfo": "none",
        "line": {
            "color": _pale(curve["color"], 0.55) if thin else curve["color"],
            "width": 1.3 if thin else 2.2,
            "dash": curve["dash"],
        },
        "marker": {"size": 5},
    }


def _pale(color: str, share: float) -> str:
    """A colour that lets through what is below. (Of a trace's `opacity` browsers darken all of its box a little.)"""
    red, green, blue = bytes.fromhex(color[1:])
    return f"rgba({red},{green},{blue},{share:g})"


def sibling_lines(curve: dict) -> list[dict]:
    """The candidates' spread as a band; a kept pair as a solid bar; the spread that was missing as a grey one. The
    candidates of a best-of-n search make no pairs: theirs is a band only."""
    steps = [s for s in curve["steps"] if s.get("low") is not None]
    if not steps:
        return []
    xs = [s["t"] for s in steps]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": xs + xs[::-1],
        "y": [s["high"] for s in steps] + [s["low"] for s in steps][::-1],
        "fill": "toself",
        "line": {"width": 0},
        "fillcolor": _pale(curve["color"], 0.16),
        "hoverinfo": "skip",
    }
    needed, kept = _bars("soft", 1, "dot"), _bars(curve["color"], 2.5, "solid")
    for s in steps:
        if s.get("kept"):
            kept["x"] += [s["t"], s["t"], None]
            kept["y"] += [s["low"], s["high"], None]
        elif s.get("threshold") is not None and s["threshold"] < 1:
            # the pair is kept if tanh(spread / 2) > threshold
            half, middle = math.atanh(s["threshold"]), (s["low"] + s["high"]) / 2
            needed["x"] += [s["t"], s["t"], None]
            needed["y"] += [middle - half, middle + half, None]
    return [band, needed, kept]


def _bars(color: str, width: float, dash: str) -> dict:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [],
        "y": [],
        "hoverinfo": "skip",
        "line": {"color": color, "width": width, "dash": dash},
    }


def means(curves: list[dict]) -> list[tuple[dict, tuple | None]]:
    """A bold line per policy and LRM: the mean over its seeds, as far as all of them have come; with its end label."""
    groups = defaultdict(list)
    for c in curves:
        groups[c["policy"], c["lrm"]].append(c)
    several = len({lrm for _, lrm in groups}) > 1
    out = []
    for (policy, lrm), members in groups.items():
        by_t = defaultdict(list)
        for c in members:
            for s in c["steps"]:
                if s["score"] is not None:
                    by_t[s["t"]].append(s["score"])
        ts = [t for t in sorted(by_t, reverse=True) if len(by_t[t]) == len(members)]
        ys = [sum(by_t[t]) / len(by_t[t]) for t in ts]
        line = {
            "type": "scatter",
            "mode": "lines",
            "x": ts,
            "y": ys,
            "hoverinfo": "skip",
            "name": policy,
            "line": {"color": members[0]["color"], "width": 3.2, "dash": members[0]["dash"]},
        }
        out.append((line, (ys[-1], f"{policy} ({lrm})" if several else policy, members[0]["color"]) if ys else None))
    return out


def end_labels(ends: list[tuple[float, str, str]], span: list[float], apart: float) -> list[dict]:
    """Direct labels at the right end, pushed apart so that none covers another and none leaves the plot."""
    ends = sorted(ends)
    places = []
    for value, _, _ in ends:
        places.append(max(value, places[-1] + apart) if places else value)
    for i in range(len(places) - 1, -1, -1):
        ceiling = span[1] if i == len(places) - 1 else places[i + 1] - apart
        places[i] = min(places[i], ceiling)
    return [
        {
            "text": _short(text),
            "x": 1,
            "xref": "paper",
            "xanchor": "left",
            "xshift": 4,
            "y": y,
            "yref": "y",
            "showarrow": False,
            "font": {"color": color},
            "hovertext": text,
        }
        for y, (_, text, color) in zip(places, ends, strict=True)
    ]


def label_margin(ends: list[tuple[float, str, str]]) -> int:
    """The pixels that the labels at the right end need; few leave the curves more room."""
    return 14 + round(6.5 * max((len(_short(text)) for _, text, _ in ends), default=0))


def _short(text: str, limit: int = 20) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def accuracy_lines(accuracy: dict, index: int, count: int) -> list[dict]:
    color = "soft" if count == 1 else COLORS[index % len(COLORS)]
    up = [h - a for h, a in zip(accuracy["high"], accuracy["accuracy"], strict=True)]
    down = [a - low for low, a in zip(accuracy["low"], accuracy["accuracy"], strict=True)]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": accuracy["t"],
            "y": accuracy["accuracy"],
            "yaxis": "y2",
            "name": accuracy["lrm"],
            "hoverinfo": "skip",
            "line": {"color": color, "width": 1.5, "dash": DASHES[index % 4]},
            "marker": {"color": color, "size": 5},
            "error_y": {"type": "data", "array": up, "arrayminus": down, "thickness": 1, "width": 3},
        }
    ]


def chance_line() -> dict:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": "y2",
        "y0": 0.5,
        "y1": 0.5,
        "line": {"color": "soft", "width": 1, "dash": "dot"},
    }
