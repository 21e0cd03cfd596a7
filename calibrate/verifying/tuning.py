"""Thresholds whose real runs compute a given number of steps, found on prompts that are not judged."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from calibrate.errors import InvalidOption
from calibrate.fitting.replay import Search
from calibrate.model.prompts import Prompt
from calibrate.runs.files import write_json
from calibrate.runs.pairs import Run
from calibrate.trials.baselines import threshold_for
from calibrate.trials.bench import Bench
from calibrate.trials.case import Say
from calibrate.trials.measures import compare_all
from calibrate.trials.setting import (
    GATE,
    Refused,
    Setting,
    branches_of,
    gate_setting,
    plan_setting,
)
from coeffs import Entry, Plan

MISSED_BUDGET = 1.5  # a tuned policy this many steps off its budget is not comparable there
TRIES = 4  # real counts per budget: replay is off by a step or two, which one correction mends as a rule
STEADY = 1.0  # steps: budgets compared in our tables lie three or more apart
QUANTILE = 1.96  # of a normal distribution, two-sided 95 %
NEAR_ENOUGH = 0.5  # steps; budgets are whole numbers
# From where diffusers' caches compute every step to almost none; seven halvings find one.
CACHE_THRESHOLDS = [float(f"{threshold:.4g}") for threshold in np.logspace(-4, 1, 129)[1:-1]]

TUNING_PROMPTS = 2


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """What policies make their settings from, and real runs of prompts that are not judged; their figures are kept.

    Attributes:
        run: Recorded signals that replay may look at, and the Gram log where it has one.
        budgets: Numbers of computed steps.
        given: The fitted gate's settings, where its thresholds were given instead of budgets.
        known: The registry's entries.
        say: Is told in words what is going to be run.
    """

    entry: Entry
    run: Run
    num_steps: int
    budgets: Sequence[int]
    bench: Bench
    given: Sequence[Setting] = ()
    known: Sequence[Entry] = ()
    say: Say = lambda text: None

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts that policies are tuned by."""
        case, judged = self.bench.case, self.bench.prompts
        return (case.recorded_prompts or judged.prompts)[:TUNING_PROMPTS]

    @property
    def magnitudes(self) -> list[float]:
        """MagCache's curve, mean over branches, 1 at step 0. Raises where the entry has none of this length."""
        expert = next(iter(self.entry.experts.values()))
        curves = [c for c in (expert.mag_ratios or {}).values() if len(c) == self.num_steps]
        if not curves:
            raise InvalidOption(
                "the entry holds no magnitude ratios of this schedule; fit a run of it first"
            )
        return np.mean(curves, axis=0).tolist()

    def planned(self, label: str, schedule: Callable[[int], str | Plan]) -> list[Setting]:
        """The plan of every budget."""
        return [plan_setting(label, schedule(budget), budget) for budget in self.budgets]

    def steps(self, setting: Setting) -> float:
        """Mean computed steps."""

        def count() -> float:
            samples = [self.bench.sampler.run(setting, prompt) for prompt in self.prompts]
            return float(np.mean([sample.computed_steps for sample in samples]))

        alike = replace(setting, policy="", budget=0)
        return self._kept(self.bench.key(alike, *self.prompts), count)

    def error(self, setting: Setting) -> float:
        """Squared relative error of the first prompt's latents, or of its series."""
        prompt = self.prompts[0]

        def error() -> float:
            sample = self.bench.sampler.run(setting, prompt)
            figures = compare_all(sample, self.bench.reference(prompt))
            relative = figures.get("latent_rel_l2", figures.get("rel_l2"))
            if relative is None:
                raise Refused(
                    "needs latents or a series to search by, and the model makes neither"
                )
            return relative**2 if sample.is_finite else math.inf

        return self._kept(f"error of {self.bench.key(setting, prompt)}", error)

    def _kept(self, key: str, figure: Callable[[], float]) -> float:
        file = self.bench.folder / "tuning.json"
        figures = json.loads(file.read_text()) if file.exists() else {}
        if key not in figures:
            figures[key] = figure()
            write_json(file, figures)
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


def tuned_gate(lineup: Lineup, label: str, entry: Entry | None = None) -> Sequence[Setting]:
    """The gate of an entry (by default the one that is verified) at thresholds whose real runs come near the budgets.

    What is taken from the prompts that are really run is by how much they leave their replay; the number of steps is
    that of all recorded prompts, or two of them would decide it.
    """
    if label == GATE and lineup.given:
        return lineup.given
    entry = entry or lineup.entry
    replayed, prompts = _replayed(label, entry, lineup.run)
    ran = np.isin(prompts, [prompt.prompt_id for prompt in lineup.prompts])
    if not ran.any():  # they were not recorded: their own steps count then
        ran[:] = True

    def measured(setting: Callable[[float], Setting], threshold: float) -> float:
        steps = replayed(threshold)
        return float(steps.mean() + lineup.steps(setting(threshold)) - steps[ran].mean())

    tried = []
    for budget in lineup.budgets:
        setting = partial(gate_setting, label, entry, budget)
        foreseen, real = lambda t: replayed(t).mean(), partial(measured, setting)
        threshold, computed = tune_threshold(foreseen, real, budget)
        tried.append((setting(threshold), computed))
    return _near(tried)


def _near(tried: Sequence[tuple[Setting, float]]) -> list[Setting]:
    """The settings whose computed steps in real runs are near to their budgets, each threshold at the nearest."""
    settings: dict[float | None, Setting] = {}
    for setting, computed in sorted(tried, key=lambda one: abs(one[1] - one[0].budget)):
        if abs(computed - setting.budget) <= MISSED_BUDGET:
            settings.setdefault(setting.threshold, setting)
    if not settings:
        counts = sorted({round(computed, 1) for _, computed in tried})
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets, only {counts}"
        )
    return sorted(settings.values(), key=lambda setting: -setting.budget)


def given_gate(entry: Entry, thresholds: Sequence[float], run: Run) -> list[Setting]:
    """The gate at given thresholds; its budgets are the computed steps that replay expects."""
    replayed, _ = _replayed(GATE, entry, run)
    budgets = replayed(thresholds).mean(axis=-1).round().clip(1).astype(int).tolist()
    each = zip(budgets, thresholds, strict=True)
    return [gate_setting(GATE, entry, budget, threshold) for budget, threshold in each]


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


def tuned_diffusers(lineup: Lineup, label: str, cache: str) -> Sequence[Setting]:
    """One of diffusers' caches at thresholds found by halving on real runs; every run serves all budgets."""
    counts: dict[float, float] = {}
    options: dict[str, Any] = {}
    if cache == "MagCache":
        options = {"mag_ratios": lineup.magnitudes, "num_inference_steps": lineup.num_steps}

    def setting(threshold: float, budget: int = 0) -> Setting:
        return Setting(label, cache, budget, options={**options, "threshold": threshold})

    def fewer(threshold: float) -> float:
        counts[threshold] = lineup.steps(setting(threshold))
        return -counts[threshold]

    tried = []
    for budget in lineup.budgets:
        bisect_left(CACHE_THRESHOLDS, -float(budget), key=fewer)
        nearest = min(counts, key=lambda threshold: abs(counts[threshold] - budget))
        tried.append((setting(nearest, budget), counts[nearest]))
    return _near(tried)
