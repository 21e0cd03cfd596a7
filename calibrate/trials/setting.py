"""One way to run a model: a gate, a plan, fewer steps, or another library's cache. No model, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.errors import CalibrateError
from calibrate.fitting.replay import Search
from calibrate.model.protocol import canonical_sha256
from calibrate.runs.pairs import load_run
from coeffs import Entry, Plan

GATE = "fitted gate"
APART_GATE = "fitted gate, branches apart"
PLAN = "plan"
UNIFORM = "uniform skipping"
FEWER_STEPS = "fewer steps"
# Their samples are kept for the report, at the budget nearest to half of the steps.
SHOWN = (PLAN, GATE, UNIFORM, FEWER_STEPS)
FEWER_STEPS_2 = "fewer steps, second-order solver"
# Uniform schedules, and their forecast as `apply_tea_cache` takes it.
FORECASTS: dict[str, dict[str, Any]] = {
    UNIFORM: {},
    "uniform skipping, linear forecast": {"forecast": "linear"},
    "uniform skipping, linear outputs": {"forecast": "linear", "forecast_of": "output"},
    "uniform skipping, linear guided": {"forecast": "linear", "forecast_of": "guided"},
}
# What a plan's runs depend on besides its weights, and what the runtime does anyway.
OF_PLAN = ("schedule", "forecast", "forecast_of")
DEFAULTS: tuple[Any, ...] = (None, {}, "reuse", "residual")

Patterns = Mapping[str, str]  # "expert/branch" -> "CCSC..."
PatternsOf = Callable[[], Patterns]  # of the generation that followed


class Refused(CalibrateError):
    """A policy that this model, this run or this version of diffusers does not take; says why."""


@dataclass(frozen=True)
class Setting:
    """One way to run the model, and the number of steps that it is meant to compute.

    Attributes:
        policy: The policy's label in tables.
        kind: ``gate``, ``plan``, ``fewer_steps``, or the name of one of diffusers' own caches.
        plan: The schedule and forecast of a ``plan``.
        entry: The polynomials of a ``gate``.
        options: What else the kind is run with: ``threshold``, ``branches`` and ``compat`` of a gate, ``solver_order``
            of fewer steps, the configuration of another cache.
    """

    policy: str
    kind: str
    budget: int
    plan: Plan | None = None
    entry: Entry | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def threshold(self) -> float | None:
        return self.options.get("threshold")

    def identity(self) -> dict[str, Any]:
        """All that its results depend on, as plain data. Defaults are omitted, so equal runs have equal keys."""
        content = dict(self.options)
        if self.plan is not None:
            rows = self.plan.weights_by_step.items()
            stated = {name: getattr(self.plan, name) for name in OF_PLAN}
            stated["weights"] = {str(step): list(row) for step, row in rows}
            content |= {
                name: value for name, value in stated.items() if value not in DEFAULTS
            }
        if self.entry is not None:
            # What decides: coefficients, domain, signs, window; not the tables and words beside them.
            beside: dict[str, Any] = dict(thresholds=(), plans=None, warnings=(), notes=None)
            bare = replace(self.entry, source=coeffs.Source(), certificates=(), **beside)
            content["entry"] = canonical_sha256(coeffs.dump(bare))
        return content


def plan_setting(policy: str, plan: Plan | str, budget: int | None = None) -> Setting:
    """A plan, or a schedule whose skipped steps are reused.

    ``budget`` is the number of steps it was made for, where that is not the number it computes.
    """
    if isinstance(plan, str):
        plan = Plan(schedule=plan)
    return Setting(policy, "plan", budget or plan.schedule.count("C"), plan=plan)


def gate_setting(policy: str, entry: Entry, budget: int, threshold: float) -> Setting:
    """A gate at a threshold, with six digits: more would make a new result of every tuning."""
    branches = branches_of(policy, entry)
    options: dict[str, Any] = {"threshold": float(f"{threshold:.6g}"), "branches": branches}
    if entry.status != "measured":
        options["compat"] = True
    return Setting(policy, "gate", budget, entry=entry, options=options)


def branches_of(policy: str, entry: Entry) -> str:
    """Whether the guidance branches decide ``together`` or, as published implementations do, ``apart``."""
    apart = policy == APART_GATE or entry.status != "measured"
    return "apart" if apart else "together"


def plans_of(entry: Entry, num_steps: int | None) -> list[Plan]:
    """The entry's plans for this number of steps."""
    return [plan for plan in entry.plans or () if len(plan.schedule) == num_steps]


def computed_steps(patterns: Patterns) -> float:
    """Computed steps of a generation: mean over the branches of an expert, summed over experts."""
    counts = pd.Series(patterns).str.count("C")
    experts = counts.index.str.split("/").str[0]
    return float(counts.groupby(experts).mean().sum())


def replayed(setting: Setting, pairs: pd.DataFrame, real: Patterns) -> dict[str, Any]:
    """What replay foresees of a gate from the uncached run's signals, and in how many steps the real run differs."""
    assert setting.entry is not None and setting.threshold is not None, "a gate"
    search = Search(load_run(pairs), setting.entry, setting.options["branches"])
    names = search.trajectories["expert"] + "/" + search.trajectories["branch"]
    patterns = dict(zip(names, search.patterns(setting.threshold), strict=True))
    wrong = [
        sum(a != b for a, b in zip(patterns[name], pattern, strict=True))
        for name, pattern in real.items()
    ]
    return {"replayed": patterns, "disagreement": float(np.mean(wrong))}
