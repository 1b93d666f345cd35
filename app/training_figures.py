"""Small plots of a training run, as plain Plotly JSON: metrics rows in, the reward plot component's value out."""

from app.figure_parts import COLORS

BLUE, RED, GREEN, PINK = COLORS[0], COLORS[1], COLORS[2], COLORS[3]
GAP_X, GAP_Y = 0.11, 0.24
SHARE = {"clipmin": -0.02, "clipmax": 1.02}  # a share is never below 0 or above 1, nor is its axis, even of one point


def lrm(rows: list[dict], result: dict | None) -> dict:
    """Loss and agreement while it trains; once it is done, accuracy and calibration per timestep with intervals."""
    panels = [
        {
            "title": "loss",
            "lines": [
                ("training", "loss", BLUE),
                ("calibration", "calibration_log_loss", GREEN),
                ("held out", "heldout_log_loss", RED),
            ],
            "marks": [(0.693, "knows nothing")],
        },
        {
            "title": "agreement",
            "percent": True,
            "lines": [
                ("training", "accuracy", BLUE),
                ("calibration", "calibration_accuracy", GREEN),
                ("held out", "heldout_accuracy", RED),
            ],
            "marks": [(0.5, "guessing")],
        },
    ]
    by_t = (result or {}).get("heldout_by_timestep") or []
    if by_t:
        panels.append(_by_timestep(by_t, "accuracy", "held-out agreement at each t", (0.5, "guessing")))
        panels.append(_by_timestep(by_t, "ece", "calibration error at each t", (0.0, "")))
    return _grid(panels, rows, 2)


def lpo(rows: list[dict]) -> dict:
    """Reward, reward against drift, diversity, margin, what is kept and clamped, and what is kept at each t."""
    panels = [
        {"title": "reward while sampling", "lines": [("", "reward", BLUE)]},
        {"title": "held-out reward by drift", "path": ("drift", "heldout_reward"), "x": "drift from the reference / σ"},
        {"title": "diversity across seeds", "lines": [("", "diversity", PINK)]},
        {"title": "margin", "lines": [("", "margin", GREEN)]},
        {
            "title": "pairs",
            "percent": True,
            "lines": [("kept", "kept_fraction", BLUE), ("clamped", "clamp_fraction", RED)],
            "marks": [(0.05, "too few kept"), (0.9, "too many kept")],
        },
        {"title": "kept at each t", "percent": True, "points": _kept_by_t(rows), "x": "timestep t", "reverse": True},
    ]
    return _grid([p for p in panels if _has(p, rows)], rows, 3)


def _kept_by_t(rows: list[dict]) -> list[tuple[float, dict]]:
    """The mean kept fraction of each timestep over the last ten iterations."""
    found: dict[float, list[float]] = {}
    for row in rows[-10:]:
        for t, kept in (row.get("kept_by_t") or {}).items():
            found.setdefault(float(t), []).append(kept)
    return [(t, {"value": sum(k) / len(k), "low": None, "high": None}) for t, k in sorted(found.items(), reverse=True)]


def _has(panel: dict, rows: list[dict]) -> bool:
    if "points" in panel:
        return bool(panel["points"])
    names = [key for _, key, _ in panel.get("lines", ())] + list(panel.get("path", ()))[1:]
    return any(row.get(name) is not None for row in rows for name in names)


def _by_timestep(rows: list[dict], name: str, title: str, mark: tuple[float, str]) -> dict:
    points = sorted(((r["t"], r[name]) for r in rows if r[name]["value"] is not None), key=lambda p: -p[0])
    return {"title": title, "percent": True, "points": points, "x": "timestep t", "reverse": True, "marks": [mark]}


def _grid(panels: list[dict], rows: list[dict], columns: int) -> dict:
    """Panels in rows of `columns`, each with its own axes and its coloured names in the title."""
    layout = {
        "margin": {"l": 44, "r": 12, "t": 18, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "annotations": [],
        "shapes": [],
    }
    data: list[dict] = []
    height = -(-len(panels) // columns)
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        width = (1 - GAP_X * (columns - 1)) / columns
        tall = (1 - GAP_Y * (height - 1)) / height
        left, top = column * (width + GAP_X), 1 - row * (tall + GAP_Y)
        number = "" if i == 0 else str(i + 1)
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "title": {"text": panel.get("x", "step"), "standoff": 2},
            "zeroline": False,
            "fixedrange": True,
            "nticks": 4,  # of five, 0.001 and so on touch each other
            **({"range": [1000, 0]} if panel.get("reverse") else {}),
        }
        layout[f"yaxis{number}"] = {
            "domain": [top - tall, top],
            "anchor": f"x{number}",
            "zeroline": False,
            "fixedrange": True,
            "nticks": 5,
            "exponentformat": "e",
            "automargin": True,
            **({"tickformat": ".0%", "autorangeoptions": SHARE} if panel.get("percent") else {}),
        }
        axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        lines = _lines(panel, rows)
        data += [{**line, **axes} for line in lines]
        names = [
            f"<span style='color:{color}'>{name}</span>"
            for name, key, color in panel.get("lines", ())
            if name and any(r.get(key) is not None for r in rows)
        ]
        layout["annotations"].append(
            {
                "text": f"<b>{panel['title']}</b>  " + "  ".join(names),
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
        for value, words in panel.get("marks", ()):
            _mark(layout, number, value, words, lines)
    return {"figure": {"data": data, "layout": layout}, "curves": [], "rows": rows, "note": ""}


def _lines(panel: dict, rows: list[dict]) -> list[dict]:
    if "points" in panel:
        return [_interval_line(panel["points"])]
    if "path" in panel:
        return [_path(rows, *panel["path"])]
    out = []
    for name, key, color in panel["lines"]:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            few = len(points) <= 40
            if not few:
                out.append(_raw(points, color))
                points = _smoothed(points)
            out.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if few else "lines",
                    "x": [x for x, _ in points],
                    "y": [y for _, y in points],
                    "name": name or key,
                    "line": {"color": color, "width": 1.8},
                    "marker": {"size": 4},
                    "hovertemplate": "step %{x}: %{y:.3g}<extra></extra>",
                }
            )
    return out


def _raw(points: list[tuple[int, float]], color: str) -> dict:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "hoverinfo": "skip",
        "opacity": 0.3,
        "line": {"color": color, "width": 1},
    }


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each value and those before it, over a twentieth of the run: what the eye should follow."""
    window = max(2, len(points) // 20)
    values = [y for _, y in points]
    return [
        (x, sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]))
        for i, (x, _) in enumerate(points)
    ]


def _interval_line(points: list[tuple[int, dict]]) -> dict:
    value = [p["value"] for _, p in points]
    up = [(p["high"] if p["high"] is not None else p["value"]) - p["value"] for _, p in points]
    down = [p["value"] - (p["low"] if p["low"] is not None else p["value"]) for _, p in points]
    error = {
        "type": "data",
        "array": [max(0, u) for u in up],
        "arrayminus": [max(0, d) for d in down],
        "thickness": 1,
        "width": 3,
    }
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [t for t, _ in points],
        "y": value,
        "error_y": error,
        "line": {"color": RED, "width": 1.8},
        "marker": {"size": 5},
        "hovertemplate": "t = %{x}: %{y:.1%}<extra></extra>",
    }


def _path(rows: list[dict], x: str, y: str) -> dict:
    """Where the run has been in the plane of two metrics; the step is written at the first and last point."""
    points = [(row[x], row[y], row["step"]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    start = next((row[f"{y}_reference"] for row in reversed(rows) if row.get(f"{y}_reference") is not None), None)
    if points and start is not None:
        points.insert(0, (0.0, start, 0))  # the reference itself
    labels = [f"step {s}" if i in (0, len(points) - 1) else "" for i, (_, _, s) in enumerate(points)]
    return {
        "type": "scatter",
        "mode": "lines+markers+text",
        "x": [p[0] for p in points],
        "y": [p[1] for p in points],
        "text": labels,
        "textposition": ["middle right" if i == 0 else "middle left" for i in range(len(points))],
        "cliponaxis": False,
        "line": {"color": RED, "width": 1.8},
        "marker": {"size": 5},
        "customdata": [p[2] for p in points],
        "hovertemplate": "step %{customdata}: drift %{x:.3g}, reward %{y:.3g}<extra></extra>",
    }


def _mark(layout: dict, number: str, value: float, words: str, lines: list[dict]) -> None:
    """A dotted line at a value that means something, unless the data are so far away that it would squeeze them."""
    ys = [y for line in lines for y in line["y"]]
    if not ys or not min(ys) - (spread := max(max(ys) - min(ys), 0.1)) <= value <= max(ys) + spread:
        return
    layout["shapes"].append(
        {
            "type": "line",
            "xref": f"x{number} domain",
            "x0": 0,
            "x1": 1,
            "yref": f"y{number}",
            "y0": value,
            "y1": value,
            "line": {"color": "soft", "width": 1, "dash": "dot"},
        }
    )
    layout["annotations"].append(
        {
            "text": words,
            "xref": f"x{number} domain",
            "x": 1,
            "xanchor": "right",
            "yref": f"y{number}",
            "y": value,
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"color": "soft", "size": 10},
        }
    )
