"""Thresholds whose real runs compute a given number of steps, found on prompts that are not judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calibrate.errors import InvalidOption
from calibrate.fitting.replay import Search, polynomials
from calibrate.runs.pairs import Run
from calibrate.trials.setting import GATE, Setting, branches_of, gate_config, gate_setting
from coeffs import Entry

MISSED_BUDGET = 1.5  # a tuned policy this many steps off its budget is not comparable there
LOG_THRESHOLDS = -4.0, 1.0  # where diffusers' caches compute every step, and almost none
HALVINGS = 7

Counted = Callable[[Setting], float]  # mean computed steps of real runs on the tuning prompts


def threshold_for(count: Callable[[float], float], budget: float, *, largest: float = 1e9) -> float:
    """Threshold at which ``count`` (computed steps, falling with the threshold) comes nearest to the budget."""
    low, high = 0.0, 1e-6
    while count(high) > budget and high < largest:
        low, high = high, high * 4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) > budget else (low, middle)
    return min((high, low), key=lambda threshold: abs(count(threshold) - budget))


def tune_threshold(
    replayed: Callable[[float], float],
    measured: Callable[[float], float],
    budget: float,
    *,
    tries: int = 4,
    tolerance: float = 0.5,
) -> tuple[float, float]:
    """Threshold whose real runs compute ``budget`` steps, and how many they do.

    Replay proposes; where the real count is off, replay is asked for a budget moved by the difference.

    Args:
        replayed: Mean computed steps of the replay at a threshold (cheap).
        measured: Mean computed steps of real runs (dear): called at most ``tries`` times.
    """
    aim = budget
    counts: dict[float, float] = {}
    for _ in range(tries):
        threshold = threshold_for(replayed, aim)
        if threshold in counts:
            break
        counts[threshold] = measured(threshold)
        if abs(counts[threshold] - budget) <= tolerance:
            break
        aim += budget - counts[threshold]
    best = min(counts, key=lambda threshold: abs(counts[threshold] - budget))
    return best, counts[best]


def tuned_gate(
    name: str, entry: Entry, budgets: Sequence[int], run: Run, counted: Counted
) -> list[Setting]:
    """The gate at the thresholds whose real runs come nearest to the budgets."""
    search = _search(name, entry, run)

    def replayed(threshold: float) -> float:
        return float(search.generation_means(search.computed(np.array(threshold))))

    settings: list[Setting] = []
    missed = []
    for budget in budgets:

        def measured(threshold: float, budget: int = budget) -> float:
            return counted(gate_setting(name, entry, budget, threshold))

        threshold, computed = tune_threshold(replayed, measured, budget)
        if abs(computed - budget) > MISSED_BUDGET:
            missed.append(f"{computed:.3g} instead of {budget}")
            continue
        setting = gate_setting(name, entry, budget, threshold)
        if all(setting.threshold != other.threshold for other in settings):
            settings.append(setting)
    if not settings:
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets: {', '.join(missed)}"
        )
    return settings


def given_gate(entry: Entry, thresholds: Sequence[float], run: Run) -> list[Setting]:
    """The gate at given thresholds; its budgets are the computed steps that replay expects."""
    search = _search(GATE, entry, run)
    counts = search.generation_means(search.computed(np.array(thresholds, float)))
    return [
        gate_setting(GATE, entry, max(1, round(float(count))), threshold)
        for threshold, count in zip(thresholds, counts, strict=True)
    ]


def tuned_diffusers(
    policy: str, cache: str, budgets: Sequence[int], options: Mapping[str, Any], counted: Counted
) -> list[Setting]:
    """One of diffusers' caches at thresholds found by halving on real runs; every run serves all budgets."""
    counts: dict[float, float] = {}

    def setting(budget: int, threshold: float) -> Setting:
        return Setting(policy, cache, budget, options={**options, "threshold": threshold})

    def count(log_threshold: float, budget: int) -> float:
        threshold = float(f"{10**log_threshold:.4g}")
        if threshold not in counts:
            counts[threshold] = counted(setting(budget, threshold))
        return counts[threshold]

    settings = []
    for budget in budgets:
        low, high = LOG_THRESHOLDS
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if count(middle, budget) > budget else (low, middle)
        threshold = min(counts, key=lambda value: abs(counts[value] - budget))
        if abs(counts[threshold] - budget) <= MISSED_BUDGET:
            settings.append(setting(budget, threshold))
    if not settings:
        seen = sorted({round(value, 1) for value in counts.values()})
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets, only {seen}"
        )
    return settings


def _search(name: str, entry: Entry, run: Run) -> Search:
    mode = branches_of(name, entry)
    return Search(run, polynomials(entry, run), gate_config(entry), entry.signal, mode)


def published_entries(
    entries: Sequence[Entry], transformer_class: str | None, own: Entry
) -> list[Entry]:
    """Newest published or copied sets of the same denoiser class that the runtime can gate with.

    Those for the same checkpoint where there are any. Sets that differ by a factor only are taken once: a factor only
    moves the threshold.
    """
    newest: dict[str, Entry] = {}
    for entry in entries:
        foreign = entry.status != "measured" and entry.label != own.label
        gated = entry.signal != "other" and any(e.branches for e in entry.experts.values())
        if foreign and gated and entry.transformer_class == transformer_class:
            known = newest.get(entry.model, entry)
            newest[entry.model] = max(known, entry, key=lambda e: e.version)
    # A class serves many checkpoints; sets for this very one are the fair opponents where there are any.
    repository = own.checkpoint.repository
    here = [entry for entry in newest.values() if entry.checkpoint.repository == repository]
    distinct: dict[tuple, Entry] = {}
    for entry in here or newest.values():
        coefficients = entry.fit().coefficients_high_to_low
        scale = max(map(abs, coefficients)) or 1.0
        shape = tuple(round(value / scale, 9) for value in coefficients)
        distinct.setdefault((shape, entry.sign_rule, entry.signal), entry)
    return list(distinct.values())
