"""Candidates: schedules with forecasts that are worth running at a budget, from the Gram log alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

import coeffs
from calibrate.planning.problem import MOST_STEPS, Weights, local_search
from calibrate.planning.stages import StagedProgram, Stages
from calibrate.runs.gram_log import GramLog
from calibrate.trials.baselines import check_budget
from calibrate.trials.setting import Setting, plan_setting

UNIFORM = "uniform, reuse"
UNIFORM_LINEAR = "uniform, linear"
BASELINES = (UNIFORM, UNIFORM_LINEAR)
PEAKS = (1.0, 2.0)
DAMPINGS = (0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Candidate:
    """A schedule with the forecast that it is to be run with.

    Attributes:
        forecast_of: ``residual`` or ``output``: what the runtime forecasts.
        weights: Of a fitted forecast: step -> weights of the last computed steps, newest first.
        signed: Its signed open-loop error in the guided output, mean over samples, as a fraction of the path.
        additive: The sum of its steps' errors likewise.
        damping: Share of plain reuse in fitted weights.
    """

    name: str
    schedule: str
    forecast: str
    forecast_of: str
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    signed: float = float("nan")
    additive: float = float("nan")
    damping: float = 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether its schedule is the uniform one, and not planned."""
        return self.name.startswith("uniform")

    @property
    def how(self) -> str | Weights:
        """The forecast, with its weights where it has some."""
        return Weights(dict(self.weights), float("nan")) if self.weights else self.forecast

    def setting(self, policy: str | None = None) -> Setting:
        """As the verification's bench runs it; the same schedule and forecast is the same result under any name."""
        weights = tuple(self.weights[step] for step in sorted(self.weights)) or None
        plan = coeffs.Plan(
            schedule=self.schedule,
            forecast=self.forecast if weights or self.forecast != "fitted" else None,
            forecast_of=self.forecast_of,
            weights=weights,
        )
        return plan_setting(policy or self.name, plan)

    def as_plan(self, logs: Sequence[GramLog], figures: Mapping[str, float | None]) -> coeffs.Plan:
        """The record of an entry."""
        skipped = [step for step, letter in enumerate(self.schedule) if letter == "S"]
        sigmas = np.concatenate([*(log.sigmas[:-1] for log in logs), logs[-1].sigmas[-1:]])
        return coeffs.Plan(
            schedule=self.schedule,
            sigmas=tuple(float(s) for s in sigmas) if np.isfinite(sigmas).all() else None,
            forecast=self.forecast,
            forecast_of=self.forecast_of,
            weights=tuple(self.weights[step] for step in skipped) if self.weights else None,
            figures={name: None if value is None or not np.isfinite(value) else float(value)
                     for name, value in figures.items()},
        )  # fmt: skip


class Planner:
    """Candidates for any budget up to ``most``, from the logs of all experts; tables and programs are made once."""

    def __init__(self, logs: Sequence[GramLog], most: int) -> None:
        kinds = [what for what in logs[0].grams if all(what in log.grams for log in logs)]
        self.stages = {what: Stages.of(logs, what) for what in kinds}
        self.num_steps, self.most = self.stages["output"].num_steps, most
        check_budget(most, self.num_steps)
        self._programs: dict[tuple[str, str, float, float], StagedProgram] = {}

    def best(
        self, what: str, forecast: str, computed: int, *, peak: float = 1.0, damping: float = 0.0
    ) -> str:
        """The best schedule by the costs of ``output`` or ``residual``."""
        key = (what, forecast, peak, damping)
        if key not in self._programs:
            costs = self.stages[what].costs(forecast, peak, damping=damping)
            self._programs[key] = StagedProgram(costs, self.most)
        return self._programs[key].best(computed)[0]

    def candidate(
        self, name: str, schedule: str, forecast: str, of: str, damping: float = 0.0
    ) -> Candidate:
        """A candidate with its weights fitted and its error worked out."""
        weights: Mapping[int, tuple[float, ...]] = {}
        if forecast == "fitted":
            weights = self.stages[of].fit(schedule, damping)
            if not weights:
                forecast = "reuse"  # every step is computed
        found = Candidate(name, schedule, forecast, of, weights, damping=damping)
        outputs = self.stages["output"]
        signed, additive = (
            float(error(schedule, found.how).mean()) for error in (outputs.signed, outputs.additive)
        )
        return replace(found, signed=signed, additive=additive)

    def candidates(self, computed: int) -> list[Candidate]:
        """The schedules worth running at a budget, each once: uniform ones, baselines first, then planned ones."""
        even = self.stages["output"].uniform(computed)
        found = [
            self.candidate(UNIFORM, even, "reuse", "residual"),
            self.candidate(UNIFORM_LINEAR, even, "linear", "residual"),
            self.candidate("uniform, linear outputs", even, "linear", "output"),
            self.candidate("uniform, fitted outputs", even, "fitted", "output"),
            self.candidate("uniform, fitted outputs, damped 0.3", even, "fitted", "output", 0.3),
        ]
        for what in self.stages:
            of = "outputs" if what == "output" else "residuals"
            for forecast in ("reuse", "linear", "fitted"):
                schedule = self.best(what, forecast, computed)
                found.append(self.candidate(f"planned, {forecast} {of}", schedule, forecast, what))
        for damping in DAMPINGS:
            name = f"planned, fitted outputs, damped {damping:g}"
            schedule = self.best("output", "fitted", computed, damping=damping)
            found.append(self.candidate(name, schedule, "fitted", "output", damping))
        # The errors of outputs are those that reach the image; a residual's forecast follows the latents better.
        for peak in PEAKS:
            schedule = self.best("output", "linear", computed, peak=peak)
            found.append(
                self.candidate(
                    f"planned for outputs, linear, peak {peak:g}", schedule, "linear", "residual"
                )
            )
        if (
            max(problem.num_steps for problem in self.stages["output"].problems)
            <= MOST_STEPS["quadratic"]
        ):
            schedule = self.best("output", "quadratic", computed)
            found.append(
                self.candidate("planned, quadratic outputs", schedule, "quadratic", "output")
            )
        found.append(self._searched(computed))
        distinct: dict[str, Candidate] = {}
        for candidate in found:
            setting = candidate.setting("")
            distinct.setdefault(json.dumps(setting.identity(), sort_keys=True), candidate)
        return list(distinct.values())

    def shortlist(self, computed: int, most: int) -> list[Candidate]:
        """The uniform ones, the ``most`` others with the least signed error, the first of each kind of forecast."""
        everything = self.candidates(computed)
        base = [c for c in everything if c.is_uniform]
        others = sorted((c for c in everything if c not in base), key=lambda c: c.signed)
        kinds: dict[str, Candidate] = {}
        for candidate in others:
            for kind in (candidate.forecast, candidate.forecast_of, str(candidate.damping)):
                kinds.setdefault(kind, candidate)
        return base + [c for c in others if c in others[:most] or c in kinds.values()]

    def _searched(self, computed: int) -> Candidate:
        """The best schedule for linearly forecast outputs, moved until the signed error no longer falls."""
        stages = self.stages["output"]

        def value(schedule: str) -> float:
            if not stages.holds(schedule):
                return np.inf
            return float(
                stages.signed(schedule, "linear").mean()
                + 0.1 * stages.additive(schedule, "linear").mean()
            )

        schedule, _ = local_search(self.best("output", "linear", computed), value)
        return self.candidate("searched, linear outputs", schedule, "linear", "output")
