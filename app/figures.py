"""The plots of the Curves and Train tabs as plain Plotly JSON: numbers in, {"data", "layout"} out.

No plotly import and no Gradio: what is drawn can be tested without a browser. How the parts look is in
app/figure_parts.py.
"""

from collections import defaultdict

from app.figure_parts import (
    COLORS,
    DASHES,
    accuracy_lines,
    chance_line,
    curve_line,
    end_labels,
    label_margin,
    layout_of,
    means,
    sibling_lines,
)


def names(curves: list[dict]) -> list[dict]:
    """The curves with `label` and `color`: a colour per policy if there are several, else per seed."""
    policies = list(dict.fromkeys(c["policy"] for c in curves))
    seeds = list(dict.fromkeys(c["seed"] for c in curves))
    lrms = list(dict.fromkeys(c["lrm"] for c in curves))
    out = []
    for c in curves:
        several = len(policies) > 1
        place = policies.index(c["policy"]) if several else seeds.index(c["seed"])
        label = f"{c['policy']} · seed {c['seed']}" if several else f"seed {c['seed']}"
        dash = DASHES[lrms.index(c["lrm"]) % len(DASHES)]
        out.append({**c, "label": label, "color": COLORS[place % len(COLORS)], "dash": dash})
    return out


def rewards(curves: list[dict], accuracy: list[dict] = (), siblings: bool = False, height: int = 420) -> dict:
    """Reward against timestep, and below it, on the same axis, the LRMs' held-out accuracy.

    A curve: {"trace", "policy", "seed", "lrm", "total", "pictures", "steps": [{"step", "t", "score", ...}]}; with
    siblings a step also has low, high (best and worst candidate's score), gap, threshold (both as probabilities), kept.
    An accuracy: {"lrm", "labels": bool, "t": [..], "accuracy": [..], "low": [..], "high": [..]}.
    Returns the component's value.
    """
    curves = names(curves if siblings else [_without_verdicts(c) for c in curves])
    scores = [
        s[k]
        for c in curves
        for s in c["steps"]
        for k in (("score", "low", "high") if siblings else ("score",))
        if s.get(k) is not None
    ]
    layout = layout_of("reward (LRM score)", accuracy)
    data, ends = [], []
    for index, curve in enumerate(curves):
        if siblings:  # the browser shows those of one curve only, where there are many
            data += [{**line, "meta": {"siblings": index}} for line in sibling_lines(curve)]
        data.append(curve_line(index, curve, thin=len({c["policy"] for c in curves}) > 1))
    if len({c["policy"] for c in curves}) > 1:
        bold = means(curves)
        data += [line for line, _ in bold]
        ends = [end for _, end in bold if end]
    else:
        several = len({c["lrm"] for c in curves}) > 1
        for curve in curves:
            last = next((s for s in reversed(curve["steps"]) if s["score"] is not None), None)
            if last:
                name = f"{curve['label']} ({curve['lrm']})" if several else curve["label"]
                ends.append((last["score"], name, curve["color"]))
    if scores:
        pad = max(1e-3, (max(scores) - min(scores)) * 0.07)
        span = [min(scores) - pad, max(scores) + pad]
        layout["yaxis"]["range"] = span
        plot_pixels = height * (layout["yaxis"]["domain"][1] - layout["yaxis"]["domain"][0]) - 20
        layout["annotations"] += end_labels(ends, span, 15 * (span[1] - span[0]) / max(60, plot_pixels))
        layout["margin"]["r"] = label_margin(ends)
    if accuracy:
        data += [line for i, a in enumerate(accuracy) for line in accuracy_lines(a, i, len(accuracy))]
        layout["shapes"].append(chance_line())
    return {"figure": {"data": data, "layout": layout}, "curves": curves, "rows": rows(curves), "note": parting(curves)}


def _without_verdicts(curve: dict) -> dict:
    return {**curve, "steps": [{k: v for k, v in s.items() if k != "verdict"} for s in curve["steps"]]}


def rows(curves: list[dict]) -> list[dict]:
    """One row per policy, seed, LRM and step, for the CSV."""
    keys = ("step", "t", "score", "low", "high", "gap", "threshold", "kept")
    return [
        {"policy": c["policy"], "seed": c["seed"], "lrm": c["lrm"], "trace": c["trace"]} | {k: s.get(k) for k in keys}
        for c in curves
        for s in c["steps"]
    ]


def parting(curves: list[dict]) -> str:
    """Where two policies part, in words: the largest change of their mean gap over the same seeds and LRM. Empty while
    they are still being sampled."""
    scores = defaultdict(dict)
    for c in curves:
        for s in c["steps"]:
            if s["score"] is not None:
                scores[c["policy"]][c["seed"], c["lrm"], s["t"]] = s["score"]
    if len(scores) != 2:
        return ""
    (first, a), (second, b) = scores.items()
    gaps = defaultdict(list)
    for key in a.keys() & b.keys():
        gaps[key[2]].append(b[key] - a[key])
    if len(gaps) < 3 or 0 not in gaps:
        return ""
    ts = sorted(gaps, reverse=True)
    mean = [sum(gaps[t]) / len(gaps[t]) for t in ts]
    i = max(range(1, len(ts)), key=lambda i: abs(mean[i] - mean[i - 1]))
    word = "above" if mean[-1] > 0 else "below"
    return (
        f"{second} ends {abs(mean[-1]):.2f} {word} {first}; they part fastest between t = {ts[i - 1]:.0f} and "
        f"{ts[i]:.0f}. What the LRM likes is not yet what a person likes: Compare tells."
    )
