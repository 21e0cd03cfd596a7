"""What a plan could be worth at most: nested open-loop errors of one budget, all from the Gram log.

Errors are sums over skipped steps of ``|increment| |error|`` as fractions of the path, of the guided output, mean over
samples. "Open-loop oracle" is the best schedule of each sample in hindsight, with forecasts that are deployed; it is
no optimum of what the sampler makes of them, and a wider class of forecasts can be better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.planning.problem import Problem, Weights, computed_of
from calibrate.planning.stages import StagedProgram, Stages

Array = NDArray[np.float64]
HINDSIGHT_FORECASTS = ("reuse", "linear", "fitted")


@dataclass(frozen=True)
class Yardstick:
    """Open-loop errors at one number of computed steps.

    Attributes:
        uniform: The uniform schedule, reusing.
        uniform_best: The uniform schedule with the best forecast.
        plan: The plan.
        population: The best schedule for all samples together, with the best forecast.
        hindsight: The best schedule and forecast of each sample, known only afterwards: the open-loop oracle.
        floor: The plan's computed steps, each skipped one projected on all that were computed before it, sample by
            sample: what no weights can go below there.
    """

    computed: int
    uniform: float
    uniform_best: float
    plan: float
    population: float
    hindsight: float
    floor: float

    @property
    def percent(self) -> float:
        """How much of the way from uniform reuse to the open-loop oracle the plan goes."""
        return _percent(self.uniform, self.plan, self.hindsight)

    @property
    def percent_strict(self) -> float:
        """The same from the uniform schedule with its best forecast: what is left for the schedule alone."""
        return _percent(self.uniform_best, self.plan, self.hindsight)


class Yard:
    """Prepares the tables that all budgets share.

    Args:
        stages: Of the outputs.
        most: Largest number of computed steps.
    """

    def __init__(
        self, stages: Stages, most: int, forecasts: Sequence[str] = HINDSIGHT_FORECASTS
    ) -> None:
        self.stages = stages
        self.costs = {forecast: stages.costs(forecast) for forecast in forecasts}
        self.programs = {
            forecast: StagedProgram(costs, most) for forecast, costs in self.costs.items()
        }
        self._samples = [
            [StagedProgram(stages.costs(forecast, sample=sample), most) for forecast in forecasts]
            for sample in range(stages.samples)
        ]

    def at(self, computed: int, plan: str, forecast: str | Weights) -> Yardstick:
        """The yardstick beside a plan with its forecast; ``fitted`` without weights means those of other prompts."""
        even = self.stages.uniform(computed)
        if forecast == "fitted":
            own = self.stages.cost(self.costs[forecast], plan)
        else:
            own = float(self.stages.additive(plan, forecast).mean())
        return Yardstick(
            computed=computed,
            uniform=self.stages.cost(self.costs["reuse"], even),
            uniform_best=min(self.stages.cost(costs, even) for costs in self.costs.values()),
            plan=own,
            population=min(program.best(computed)[1] for program in self.programs.values()),
            hindsight=float(
                np.mean([min(p.best(computed)[1] for p in programs) for programs in self._samples])
            ),
            floor=float(
                sum(map(projection_floor, self.stages.problems, self.stages.parts(plan))).mean()
            ),
        )


def projection_floor(problem: Problem, schedule: str) -> Array:
    """Additive error when every skipped step is projected on all earlier computed ones, shape (samples,)."""
    computed, total = computed_of(schedule), np.zeros(len(problem.gram))
    for step, letter in enumerate(schedule):
        if letter == "C":
            continue
        anchors = [s for s in computed if s < step]
        for sample, gram in enumerate(problem.gram):
            inner, right = gram[np.ix_(anchors, anchors)], gram[anchors, step]
            weights = np.linalg.lstsq(inner, right, rcond=1e-12)[0]
            squared = gram[step, step] - 2 * weights @ right + weights @ inner @ weights
            total[sample] += (
                abs(problem.increments[step]) * np.sqrt(max(squared, 0)) / problem.scale[sample]
            )
    return total


def as_figures(found: Yardstick) -> Mapping[str, float]:
    """The figures that a plan carries in an entry."""
    return {
        "open_loop_error": found.plan,
        "open_loop_uniform": found.uniform,
        "open_loop_population": found.population,
        "open_loop_hindsight": found.hindsight,
        "open_loop_floor": found.floor,
        "percent_of_oracle": found.percent,
        "percent_of_oracle_strict": found.percent_strict,
    }


def _percent(start: float, reached: float, best: float) -> float:
    return 100 * (start - reached) / (start - best) if start > best else float("nan")
