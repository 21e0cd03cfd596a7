"""What of an entry is taken for a wanted speed-up or quality: a threshold of its gate, or a plan. Pure: no torch."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import coeffs
from coeffs.entry.certificates import EXACT, of_tier
from runtime.errors import InvalidSetting

NOISE_DB = 0.3  # differences of means below it are not told apart by a plan's few prompts
MEASURES = ("psnr_db", "snr_db")  # of pictures, of sound
# How a plan's figures name fewer steps without a cache -> the solver that they were taken with.
_FEWER_STEPS = {
    "fewer_steps": "",
    "fewer_steps_second_order_solver": " and DPM-Solver++ of order 2",
}


def threshold_for(entry: "coeffs.Entry", speedup: float) -> float:
    """The lowest verified threshold of ``entry`` that reaches ``speedup``, between table rows by interpolation.

    Raises:
        InvalidSetting: The entry has no measured speed-ups, or none as high.
    """
    rows = [(1.0, 0.0)]
    rows += [(reached, row.threshold) for reached, row in _verified(entry)]
    for (slower, low), (faster, high) in pairwise(rows):
        if 1 <= speedup <= faster:
            share = (speedup - slower) / (faster - slower) if faster > slower else 1.0
            return low + share * (high - low)
    raise InvalidSetting(
        f"speedup {speedup}: {entry.label} was verified from 1 to {rows[-1][0]:.2f}; choose one of those, "
        "run `calibrate verify` on it, or give threshold= instead"
    )


def best_for(entry: "coeffs.Entry", speedup: float) -> "float | coeffs.Plan":
    """The gate's threshold or the plan of ``entry`` that verified best among those that reach ``speedup``.

    Both are judged by what was measured at this speed-up or a higher one.

    Raises:
        InvalidSetting: Neither was verified at this speed-up.
    """
    rated = [((plan.figures or {}).get("speedup") or 0.0, plan) for plan in entry.plans or ()]
    fast_enough = [plan for reached, plan in rated if reached >= speedup >= 1]
    if not fast_enough:
        return threshold_for(entry, speedup)
    best = max(fast_enough, key=_fidelity)
    gates = [row.psnr_db for reached, row in _verified(entry) if reached >= speedup]
    if gates and gates[0] is not None and gates[0] >= _fidelity(best):
        return threshold_for(entry, speedup)
    return best


def fewer_steps_advice(plan: "coeffs.Plan") -> str | None:
    """What to do instead of a plan, where fewer steps without a cache was measured better; else None."""
    figures = plan.figures or {}
    for measure in MEASURES:
        own = figures.get(measure)
        rivals = [
            (figures.get(f"{name}_{measure}") or -math.inf, solver)
            for name, solver in _FEWER_STEPS.items()
        ]
        best, solver = max(rivals)
        if own is not None and best > own + NOISE_DB:
            return (
                f"use fewer steps instead: num_inference_steps={plan.computed_steps}{solver} without a cache gave "
                f"{best:.1f} dB, this plan {own:.1f} dB"
            )
    return None


def _verified(entry: "coeffs.Entry") -> list[tuple[float, "coeffs.Threshold"]]:
    """Measured speed-up and row of the thresholds that have one, the slowest first."""
    rows = [
        (row.speedup, row)
        for row in entry.thresholds
        if row.kind == "verified" and row.speedup is not None
    ]
    return sorted(rows, key=lambda rated: (rated[0], rated[1].threshold))


def _fidelity(plan: "coeffs.Plan") -> float:
    """PSNR in dB, SNR for sound; minus infinity where nothing was measured."""
    values = [(plan.figures or {}).get(measure) for measure in MEASURES]
    return next((value for value in values if value is not None), -math.inf)


def certified_for(
    entry: "coeffs.Entry", quality: str
) -> tuple["coeffs.Certificate", str | None]:
    """The fastest certified cache of a tier, and what keeps the same promise faster, if anything does.

    Raises:
        InvalidSetting: The tier is not certified, or only without a cache.
    """
    certificates = of_tier(entry.certificates, quality)
    if not certificates:
        known = (
            ", ".join(dict.fromkeys(one.tier for one in entry.certificates)) or "no quality"
        )
        raise InvalidSetting(
            f"{entry.label} is certified for {known}, not for {quality!r}: run `calibrate certify` on its run, or use "
            f"quality={EXACT!r}"
        )
    chosen, last = certificates[0], certificates[-1]
    if chosen.policy == "fewer_steps":
        raise InvalidSetting(
            f"{entry.label} keeps {quality!r} by fewer steps only: call the pipeline with {last.how}"
        )
    if last.policy == "fewer_steps" and last.factor > chosen.factor:
        times = f"{last.factor:.2f} times as fast, this cache {chosen.factor:.2f} times"
        return chosen, f"{last.how} keeps the same promise and is {times}"
    return chosen, None


def other_schedule(certificate: "coeffs.Certificate", facts: Mapping[str, Any]) -> list[str]:
    """A shift on one side only, under one class of scheduler: other noise levels than were certified."""
    certified, here = certificate.protocol.shift, facts.get("shift")
    if facts.get("scheduler") != certificate.protocol.scheduler or (certified is None) == (
        here is None
    ):
        return []
    return [f"shift: {certified or 'none'} in the certificate, {here or 'none'} here"]
