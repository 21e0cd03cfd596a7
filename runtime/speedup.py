"""What an entry's verification found for a speed-up: the gate at a threshold, or a plan."""

from itertools import pairwise
from typing import Any

import coeffs
from runtime.errors import InvalidSetting


def threshold_for(entry: "coeffs.Entry | None", speedup: float) -> float:
    """The lowest verified threshold of ``entry`` that reaches ``speedup``, between table rows by interpolation.

    Raises:
        InvalidSetting: The entry has no measured speed-ups, or none as high.
    """
    if entry is None:
        raise InvalidSetting(
            "speedup= needs a registry entry with verified thresholds; give threshold= instead"
        )
    rows = sorted(
        (row.speedup, row.threshold)
        for row in entry.thresholds or ()
        if row.kind == "verified" and row.speedup is not None
    )
    if not rows:
        raise InvalidSetting(
            f"{entry.label} has no verified speed-ups: run `calibrate verify` on it, or give threshold= instead"
        )
    if not 1 <= speedup <= rows[-1][0]:
        raise InvalidSetting(
            f"speedup {speedup}: {entry.label} was verified from 1 to {rows[-1][0]:.2f}; choose one of those"
        )
    rows.insert(0, (1.0, 0.0))
    for (slower, low), (faster, high) in pairwise(rows):
        if speedup <= faster:
            share = (speedup - slower) / (faster - slower) if faster > slower else 1.0
            return low + share * (high - low)
    raise AssertionError("the last row is at least as fast")


def best_for(entry: "coeffs.Entry", speedup: float) -> "float | coeffs.Plan":
    """The gate's threshold or the plan of ``entry`` that verified best among those that reach ``speedup``.

    Both are judged by what was measured at this speed-up or a higher one.

    Raises:
        InvalidSetting: Neither was verified at this speed-up.
    """

    def fidelity(figures: Any) -> float:
        return next(
            (figures[name] for name in ("psnr_db", "snr_db") if figures.get(name) is not None),
            float("-inf"),
        )

    plans = (entry and entry.plans) or ()
    plans = [plan for plan in plans if ((plan.figures or {}).get("speedup") or 0) >= speedup >= 1]
    plan = max(plans, key=lambda plan: fidelity(plan.figures), default=None)
    try:
        threshold = threshold_for(entry, speedup)
    except InvalidSetting:
        if plan is None:
            raise
        return plan
    rows = [
        row for row in entry.thresholds if row.kind == "verified" and (row.speedup or 0) >= speedup
    ]
    gate = min(rows, key=lambda row: row.speedup).psnr_db
    if plan is None or (gate is not None and gate >= fidelity(plan.figures)):
        return threshold
    return plan
