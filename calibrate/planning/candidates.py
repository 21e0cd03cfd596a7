"""What may win a budget: fitted plans on the best schedules, simple ones on the uniform one, and fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

import coeffs
from calibrate.planning.closed_loop import Fit, Fits
from calibrate.planning.problem import Array, Problem
from calibrate.planning.search import best_schedules, schedule_cost, uniform_between
from calibrate.trials.setting import FEWER_STEPS, FEWER_STEPS_2, Setting, plan_setting

UNIFORM = "uniform, reuse"
UNIFORM_FITTED = "uniform, fitted guided"
Quantity = Literal["residual", "output", "guided"]
# Uniform skipping without a fit: forecast, and of what.
BASELINES: dict[str, tuple[str, Quantity]] = {
    UNIFORM: ("reuse", "residual"),
    "uniform, linear": ("linear", "residual"),
    "uniform, linear guided": ("linear", "guided"),
    "uniform, reuse guided": ("reuse", "guided"),
}
# Costs that schedules are planned by: forecast, whether its high quantile instead of its mean, and whether with the
# gains of Gaussian data instead of the measured ones. No kind is always best. Scores on choosing prompts: on the
# embedded model the last wins at 9 of 50 steps (46.5 dB; the first 42.6) and the second at 15 (58.7 dB; the first
# 57.5), on a load model with sigmas up to 157 the third at 15 (45.9 dB; the second 42.2).
KINDS = {
    "planned": ("fitted", False, False),
    "planned, linear costs": ("linear", False, False),
    "planned, gains of Gaussian data": ("fitted", False, True),
    "planned for hard prompts": ("fitted", True, False),
    "planned for hard prompts, linear costs": ("linear", True, False),
    "planned, reuse costs": ("reuse", False, False),
}
# Planned schedules of a budget: all kinds up to a quarter of the steps, three at half.
KINDS_TIMES_SHARE = 1.5
LEAST_KINDS = 3
# They are fitted on so few of the recorded prompts that all of them together cost this share of recording, but on
# three at least. On the embedded model three choose the same plan at 9 of 50 steps as twenty, and others at 15 and 25:
# 1.2 dB (-0.5 to 2.9) and 0.7 dB (-0.2 to 1.6) less, for a third of the cost.
SCREENING = 0.25
LEAST_SCREENING = 3
# Planned schedules that are run to choose among: as many as cost one uncached run together, but three at least. Their
# order on a few recorded prompts is nearly that on others at large budgets, and less so at small ones.
FINALISTS = 3


@dataclass(frozen=True)
class Candidate:
    """One way to spend a budget.

    Attributes:
        plan: The schedule and forecast; ``None`` for fewer steps.
        cost: Open-loop error of its schedule as a fraction of the path, NaN for fewer steps.
        recorded_db: Of a fitted plan: its score on the latents of the prompts on which it was fitted.
    """

    name: str
    computed: int
    plan: coeffs.Plan | None = None
    cost: float = float("nan")
    recorded_db: float | None = None

    def setting(self, policy: str | None = None) -> Setting:
        """As the bench runs it."""
        if self.plan is not None:
            return plan_setting(policy or self.name, self.plan)
        options = {"solver_order": 2} if self.name == FEWER_STEPS_2 else {}
        return Setting(self.name, "fewer_steps", self.computed, options=options)


@dataclass(frozen=True)
class Planner:
    """Schedules and candidates of any budget; every table of costs is made once.

    Attributes:
        what: The quantity that plans forecast.
        sigmas: Noise levels of all steps and of the end.
        gaussian: The problem with the gains of Gaussian data, where others were measured.
        fits: Fits weights; None where no solver can be watched.
    """

    problem: Problem
    what: Quantity
    sigmas: Array
    gaussian: Problem | None = None
    fits: Fits | None = None

    @cached_property
    def _linear(self) -> Array:
        return self.problem.costs("linear")

    @cached_property
    def _best(self) -> dict[str, list[str]]:
        problems = (self.problem, self.gaussian or self.problem)
        return {
            name: best_schedules(problems[by_size].costs(forecast, for_worst))
            for name, (forecast, for_worst, by_size) in KINDS.items()
        }

    def schedules(self, computed: int) -> dict[str, str]:
        """Name -> the best schedule by that cost."""
        return {name: best[computed - 1] for name, best in self._best.items()}

    def to_fit(self, computed: int, most: int | None = None) -> dict[str, str]:
        """Name -> schedule, each schedule once: the best by several costs, and the uniform one last.

        ``most`` planned ones; by default all kinds up to a quarter of the steps, three at half.
        """
        kinds = int(KINDS_TIMES_SHARE * self.problem.num_steps / computed)
        most = most or max(LEAST_KINDS, kinds)
        even = self.uniform(computed)
        named: dict[str, str] = {}
        for name, schedule in self.schedules(computed).items():
            if len(named) < most and schedule not in (even, *named.values()):
                named[name] = schedule
        return {**named, UNIFORM_FITTED: even}

    def uniform(self, computed: int) -> str:
        """The uniform schedule, with a computed step at each wall."""
        return uniform_between(self.problem.walls, self.problem.num_steps, computed)

    def entrants(self, computed: int, most: int | None = None) -> list[Candidate]:
        """Uniform forecasts without a fit, and planned schedules: fitted where they can be, else linear or reused."""
        fits, what, even = self.fits, self.what, self.uniform(computed)
        plans = [
            self.candidate(name, _simple(even, forecast, of))
            for name, (forecast, of) in BASELINES.items()
            if of in ("residual", what)
        ]
        if fits is not None:
            named = self.to_fit(computed, most)
            cost = len(named) * computed / self.problem.num_steps
            few = max(LEAST_SCREENING, int(SCREENING / cost * fits.prompts))
            fitted = {name: fits.fit(schedule, few) for name, schedule in named.items()}
            return plans + [
                self.candidate(name, own.plan(named[name]), own)
                for name, own in fitted.items()
            ]
        return plans + [
            self.candidate(
                name, _simple(schedule, "reuse" if "reuse" in name else "linear", what)
            )
            for name, schedule in self.schedules(computed).items()
        ]

    def completed(self, candidate: Candidate) -> Candidate:
        """With weights fitted on all recorded prompts, where they were fitted on a few."""
        plan = candidate.plan
        if self.fits is None or plan is None or plan.forecast != "fitted":
            return candidate
        own = self.fits.fit(plan.schedule)
        return self.candidate(candidate.name, own.plan(plan.schedule), own)

    def candidate(self, name: str, plan: coeffs.Plan, own: Fit | None = None) -> Candidate:
        """A plan and what its fit says of it, where it has one; its cost is that of linear forecasts."""
        cost = schedule_cost(self._linear, plan.schedule)
        recorded_db = score(own.decibels) if own else None
        return Candidate(name, plan.schedule.count("C"), plan, cost, recorded_db)


def _simple(schedule: str, forecast: str, of: Quantity) -> coeffs.Plan:
    """A plan without weights of its own."""
    return coeffs.Plan(schedule=schedule, forecast=forecast, forecast_of=of)


def score(values: Array) -> float:
    """What candidates are chosen by: halfway between the mean of all and of the worst third.

    The worst one alone is mostly chance: resampled from 300 days of a load model, twelve choosing prompts then choose
    plans that are 0.2 dB worse on others, and no better on their worst.
    """
    third = np.sort(values)[: max(1, len(values) // 3)]
    return float((np.mean(values) + third.mean()) / 2)


def finalists(entrants: Sequence[Candidate]) -> list[Candidate]:
    """Those that are worth real runs: of the planned ones the best on recorded prompts, and all that are uniform."""
    planned = [c for c in entrants if c.recorded_db is not None and c.name != UNIFORM_FITTED]
    planned.sort(key=lambda candidate: -(candidate.recorded_db or 0.0))
    most = max([FINALISTS, *(len(c.plan.schedule) // c.computed for c in planned if c.plan)])
    return [candidate for candidate in entrants if candidate not in planned[most:]]


def fewer_steps(computed: int) -> list[Candidate]:
    """The model itself with fewer steps: by its own solver, and by one of second order."""
    return [Candidate(name, computed) for name in (FEWER_STEPS, FEWER_STEPS_2)]
