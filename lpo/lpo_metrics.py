"""The numbers that an LPO iteration reports, made from what its sampling and its updates left. docs/metrics.md explains
each of them."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

FEW, MANY = 0.05, 0.9  # kept fractions outside this range deserve a warning


def update_metrics(columns: Tensor, grad_norm: float) -> dict:
    """Of one optimiser step. columns (n, 5), a row a pair: weighted loss, margin, unclamped margin, clamped, drift."""
    losses, margin, unclamped, clamped, _ = columns.T.contiguous()
    return {
        "pairs": len(columns),
        "loss": float(losses.sum() / len(columns)),
        "margin": float(margin.mean()),
        # A fresh adapter has margin 0 everywhere: half right.
        "implicit_accuracy": float((unclamped > 0).float().mean() + 0.5 * (unclamped == 0).float().mean()),
        "clamp_fraction": float(clamped.mean()),
        "grad_norm": grad_norm,
    }


def iteration_metrics(sums: dict) -> dict:
    """Means over the iteration's kept pairs. Without kept pairs only the sampling half.

    sums: "kept" {t: (kept, seen)}, "reward", "gap", "updates" [update_metrics], "drift" [[t, drift]] of every pair.
    """
    counts, updates = sums["kept"], sums["updates"]
    seen, kept = sum(n for _, n in counts.values()), sum(k for k, _ in counts.values())
    metrics: dict = {"pairs": kept}
    total = sum(u["pairs"] for u in updates)
    for name in ("loss", "margin", "implicit_accuracy", "clamp_fraction", "grad_norm") if updates else ():
        metrics[name] = sum(u[name] * u["pairs"] for u in updates) / total
    metrics |= {"reward": sums["reward"], "gap": sums["gap"], "kept_fraction": kept / seen}
    if sums["drift"]:
        metrics["drift"] = _rms([d for _, d in sums["drift"]])
    metrics["kept_by_t"] = {str(t): k / n for t, (k, n) in counts.items()}
    by_t = defaultdict(list)
    for t, d in sums["drift"]:
        by_t[t].append(d)
    metrics["drift_by_t"] = {str(t): _rms(ds) for t, ds in sorted(by_t.items())}
    if not FEW <= kept / seen <= MANY:
        advice = "lower the thresholds" if kept / seen < FEW else "raise the thresholds"
        metrics["warning"] = f"{kept} of {seen} pairs were kept: {advice}, or check the LRM's temperature."
    return metrics


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))
