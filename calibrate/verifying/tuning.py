"""Thresholds whose real runs compute a given number of steps, found on prompts that are not judged."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from calibrate.errors import InvalidOption
from calibrate.fitting.replay import Search
from calibrate.runs.folder import write_atomically
from calibrate.runs.pairs import Run
from calibrate.trials.baselines import threshold_for
from calibrate.trials.bench import Bench
from calibrate.trials.measures import compare_all
from calibrate.trials.setting import (
    GATE,
    Refused,
    Setting,
    branches_of,
    gate_setting,
)
from coeffs import Entry

MISSED_BUDGET = 1.5  # a tuned policy this many steps off its budget is not comparable there
TRIES = 4  # real counts per budget: replay is off by a step or two, which one correction mends as a rule
STEADY = 1.0  # steps: budgets compared in our tables lie three or more apart
QUANTILE = 1.96  # of a normal distribution, two-sided 95 %
NEAR_ENOUGH = 0.5  # steps; budgets are whole numbers
# From where diffusers' caches compute every step to almost none; seven halvings find one.
CACHE_THRESHOLDS = [float(f"{threshold:.4g}") for threshold in np.logspace(-4, 1, 129)[1:-1]]

TUNING_PROMPTS = 2


class TuningRuns:
    """Real runs of prompts that are not judged, by which policies find their settings; their figures are kept."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.prompts = (bench.case.recorded_prompts or bench.prompts.prompts)[:TUNING_PROMPTS]

    def steps(self, setting: Setting) -> float:
        """Mean computed steps."""

        def count() -> float:
            samples = [self._bench.sampler.run(setting, prompt) for prompt in self.prompts]
            return float(np.mean([sample.computed_steps for sample in samples]))

        return self._kept(
            self._bench.key(replace(setting, policy="", budget=0), *self.prompts), count
        )

    def error(self, setting: Setting) -> float:
        """Squared relative error of the first prompt's latents, or of its series."""
        prompt = self.prompts[0]

        def error() -> float:
            sample = self._bench.sampler.run(setting, prompt)
            figures = compare_all(sample, self._bench.reference(prompt))
            relative = figures.get("latent_rel_l2", figures.get("rel_l2"))
            if relative is None:
                raise Refused(
                    "needs latents or a series to search by, and the model makes neither"
                )
            return relative**2 if sample.is_finite else math.inf

        return self._kept(f"error of {self._bench.key(setting, prompt)}", error)

    def _kept(self, key: str, figure: Callable[[], float]) -> float:
        file = self._bench.folder / "tuning.json"
        figures = json.loads(file.read_text()) if file.exists() else {}
        if key not in figures:
            figures[key] = figure()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(figures).encode())
        return figures[key]


def tune_threshold(
    replayed: Callable[[float], float], measured: Callable[[float], float], budget: float
) -> tuple[float, float]:
    """Threshold whose real runs compute ``budget`` steps, and how many they do.

    Replay proposes; where the real count is off, replay is asked for a budget moved by the difference.

    Args:
        replayed: Mean computed steps of the replay at a threshold (cheap).
        measured: Mean computed steps of real runs (dear): called at most ``TRIES`` times.
    """
    aim = budget
    counts: dict[float, float] = {}
    for _ in range(TRIES):
        threshold = threshold_for(replayed, aim)
        if threshold in counts:
            break
        counts[threshold] = measured(threshold)
        if abs(counts[threshold] - budget) <= NEAR_ENOUGH:
            break
        aim += budget - counts[threshold]
    best = min(counts, key=lambda threshold: abs(counts[threshold] - budget))
    return best, counts[best]


def tuned_gate(
    name: str,
    entry: Entry,
    budgets: Sequence[int],
    run: Run,
    runs: TuningRuns,
) -> list[Setting]:
    """The gate at the thresholds whose real runs come nearest to the budgets.

    What is taken from the prompts that are really run is by how much they leave their replay; the number of steps is
    that of all recorded prompts, or two of them would decide it.
    """
    replayed, prompts = _replayed(name, entry, run)
    ran = np.isin(prompts, [prompt.prompt_id for prompt in runs.prompts])
    if not ran.any():  # they were not recorded: their own steps count then
        ran[:] = True
    settings: dict[float | None, Setting] = {}
    missed = []
    for budget in budgets:

        def measured(threshold: float, budget: int = budget) -> float:
            steps = replayed(threshold)
            left = (
                runs.steps(gate_setting(name, entry, budget, threshold)) - steps[ran].mean()
            )
            return float(steps.mean() + left)

        threshold, computed = tune_threshold(lambda t: replayed(t).mean(), measured, budget)
        if abs(computed - budget) > MISSED_BUDGET:
            missed.append(f"{computed:.3g} instead of {budget}")
        else:
            setting = gate_setting(name, entry, budget, threshold)
            settings.setdefault(setting.threshold, setting)
    if not settings:
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets: {', '.join(missed)}"
        )
    return list(settings.values())


def given_gate(entry: Entry, thresholds: Sequence[float], run: Run) -> list[Setting]:
    """The gate at given thresholds; its budgets are the computed steps that replay expects."""
    replayed, _ = _replayed(GATE, entry, run)
    means = replayed(thresholds).mean(axis=-1)
    budgets = np.maximum(1, means.round().astype(int)).tolist()
    return [
        gate_setting(GATE, entry, *each) for each in zip(budgets, thresholds, strict=True)
    ]


def unsteady(entry: Entry, run: Run, settings: Sequence[Setting]) -> str:
    """Where other prompts would have tuned the fitted gate to another number of steps, and how many more it takes."""
    replayed, prompts = _replayed(GATE, entry, run)
    needed: dict[int, int] = {}
    for setting in settings:
        of_prompt = pd.Series(replayed(setting.threshold or 0.0)).groupby(prompts).mean()
        needed[setting.budget] = prompts_needed(of_prompt.to_numpy())
    there = len(np.unique(prompts))
    few = [str(budget) for budget, count in needed.items() if count > there]
    if not few:
        return ""
    return (
        f"two halves of the {there} recorded prompts may tune to numbers of steps more than {STEADY:g} apart "
        f"at {', '.join(few)} steps; record {max(needed.values()) - there} more"
    )


def prompts_needed(steps: np.ndarray) -> int:
    """Prompts of which two halves agree within ``STEADY`` steps 95 times of 100; ``steps`` are single prompts'.

    Means of halves of n prompts differ by 2 s / sqrt(n) (standard deviation), where single prompts spread by s.
    """
    if len(steps) < 2:
        return 2
    spread = np.std(steps, ddof=1)
    return math.ceil((2 * QUANTILE * spread / STEADY) ** 2)


def _replayed(
    name: str, entry: Entry, run: Run
) -> tuple[Callable[[ArrayLike], np.ndarray], np.ndarray]:
    """Computed steps of a gate's replay at a threshold, or several, by generation; and each one's prompt."""
    search = Search(run, entry, branches_of(name, entry))
    return search.steps, search.prompts[search.prompt_of]


def tuned_diffusers(
    policy: str,
    cache: str,
    budgets: Sequence[int],
    options: Mapping[str, Any],
    runs: TuningRuns,
) -> list[Setting]:
    """One of diffusers' caches at thresholds found by halving on real runs; every run serves all budgets."""
    counts: dict[float, float] = {}

    def setting(threshold: float, budget: int = 0) -> Setting:
        return Setting(policy, cache, budget, options={**options, "threshold": threshold})

    def fewer(threshold: float) -> float:
        counts[threshold] = runs.steps(setting(threshold))
        return -counts[threshold]

    settings = []
    for budget in budgets:
        bisect_left(CACHE_THRESHOLDS, -float(budget), key=fewer)
        nearest = min(counts, key=lambda threshold: abs(counts[threshold] - budget))
        if abs(counts[nearest] - budget) <= MISSED_BUDGET:
            settings.append(setting(nearest, budget))
    if not settings:
        raise InvalidOption(
            "no threshold gives a number of computed steps near the budgets, only "
            f"{sorted({round(count, 1) for count in counts.values()})}"
        )
    return settings


def published_entries(
    entries: Sequence[Entry], transformer_class: str | None, own: Entry
) -> list[Entry]:
    """Newest published or copied sets of the same denoiser class that the runtime can gate with.

    Those for the same checkpoint where there are any. Sets that differ by a factor only are taken once: a factor only
    moves the threshold. ``entries`` are sorted by version.
    """
    newest = {
        entry.model: entry
        for entry in entries
        if entry.status != "measured" and entry.label != own.label and entry.signal != "other"
        if entry.transformer_class == transformer_class
        if entry.has_polynomials
    }
    # A class serves many checkpoints; sets for this very one are the fair opponents where there are any.
    repository = own.checkpoint.repository
    here = [entry for entry in newest.values() if entry.checkpoint.repository == repository]
    distinct: dict[tuple, Entry] = {}
    for entry in here or newest.values():
        coefficients = np.array(entry.fit().coefficients_high_to_low)
        scale = np.abs(coefficients).max() or 1.0
        shape = tuple((coefficients / scale).round(9))
        distinct.setdefault((shape, entry.sign_rule, entry.signal), entry)
    return list(distinct.values())
