"""The problem of a whole schedule: one part per denoiser that takes it over, which share nothing but the budget.

With one denoiser there is one stage. Where experts follow on each other (Wan 2.2), nothing computed by one is reused
by the next: each begins with a computed step, errors of the stages add up, and the budget is divided exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.planning.problem import (
    Problem,
    Program,
    Weights,
    computed_of,
    fit_weights,
    schedule_cost,
    schedule_of,
)
from calibrate.runs.gram_log import GramLog
from calibrate.trials.baselines import check_budget, uniform

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stages:
    """The problems of the experts in the order of the schedule; errors are fractions of the whole path."""

    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, logs: Sequence[GramLog], what: str = "output") -> "Stages":
        """The stages of ``output`` or ``residual``."""
        problems = [Problem.of(log, what) for log in logs]
        whole = sum(problem.length for problem in problems)
        return cls(tuple(replace(problem, path=whole) for problem in problems))

    @property
    def num_steps(self) -> int:
        return sum(problem.num_steps for problem in self.problems)

    @property
    def samples(self) -> int:
        return len(self.problems[0].gram)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The step at which each expert takes over."""
        return tuple(
            np.cumsum([0, *(problem.num_steps for problem in self.problems)])[:-1].tolist()
        )

    def holds(self, schedule: str) -> bool:
        """Whether every expert begins with a computed step."""
        return all(schedule[start] == "C" for start in self.starts)

    def parts(self, schedule: str) -> list[str]:
        """The schedule of each expert."""
        return [
            schedule[start : start + p.num_steps]
            for start, p in zip(self.starts, self.problems, strict=True)
        ]

    def uniform(self, computed: int) -> str:
        """The uniform schedule; where an expert takes over, the nearest computed step is moved to its first."""
        check_budget(computed, self.num_steps)
        chosen = computed_of(uniform(self.num_steps, computed))
        for start in self.starts:
            if start not in chosen:
                movable = [step for step in chosen if step not in self.starts]
                if not movable:
                    raise _too_few(computed, len(self.starts))
                chosen.remove(min(movable, key=lambda step: abs(step - start)))
                chosen.append(start)
        return schedule_of(chosen, self.num_steps)

    def fit(self, schedule: str, damping: float = 0.0) -> dict[int, tuple[float, ...]]:
        """Fitted weights of all skipped steps, see :func:`calibrate.planning.problem.fit_weights`."""
        return {
            start + step: row
            for start, problem, part in self._each(schedule)
            for step, row in fit_weights(problem, part, damping=damping).rows.items()
        }

    def additive(self, schedule: str, forecast: str | Weights) -> Array:
        """Sum of the steps' errors, shape (samples,)."""
        return sum(
            problem.additive(part, how) for problem, part, how in self._how(schedule, forecast)
        )

    def signed(self, schedule: str, forecast: str | Weights) -> Array:
        """Norm of the sum of the steps' errors with signs, shape (samples,); between experts as if independent."""
        return np.sqrt(
            sum(
                problem.signed(part, how) ** 2
                for problem, part, how in self._how(schedule, forecast)
            )
        )

    def costs(
        self, forecast: str, peak: float = 1.0, sample: int | None = None, damping: float = 0.0
    ) -> list[Array]:
        """:meth:`calibrate.planning.problem.Problem.costs` of every stage."""
        return [problem.costs(forecast, peak, sample, damping) for problem in self.problems]

    def cost(self, costs: Sequence[Array], schedule: str) -> float:
        """Cost of a schedule in such tables."""
        return sum(
            schedule_cost(table, part)
            for table, part in zip(costs, self.parts(schedule), strict=True)
        )

    def _each(self, schedule: str) -> list[tuple[int, Problem, str]]:
        return list(zip(self.starts, self.problems, self.parts(schedule), strict=True))

    def _how(
        self, schedule: str, forecast: str | Weights
    ) -> list[tuple[Problem, str, str | Weights]]:
        found = []
        for start, problem, part in self._each(schedule):
            how = forecast
            if isinstance(forecast, Weights):
                rows = {
                    step - start: row
                    for step, row in forecast.rows.items()
                    if 0 <= step - start < len(part)
                }
                how = Weights(rows, forecast.ridge)
            found.append((problem, part, how))
        return found


class StagedProgram:
    """Exact best schedules of every number of computed steps: a program per stage, and the best division among them.

    Args:
        costs: As from :meth:`Stages.costs`.
        most: Largest number of computed steps that will be asked for.
    """

    def __init__(self, costs: Sequence[Array], most: int) -> None:
        self._programs = [Program(table, min(most, table.shape[-1])) for table in costs]
        # divisions[k][b]: least cost of b computed steps in the first k + 1 stages, and how many the last one gets.
        self._divisions: list[dict[int, tuple[float, int]]] = []
        for program in self._programs:
            own = {count: program.best(count)[1] for count in range(1, program.most + 1)}
            before = self._divisions[-1] if self._divisions else {0: (0.0, 0)}
            found: dict[int, tuple[float, int]] = {}
            for total, (cost, _) in before.items():
                for count, more in own.items():
                    if (
                        total + count <= most
                        and cost + more < found.get(total + count, (np.inf, 0))[0]
                    ):
                        found[total + count] = cost + more, count
            self._divisions.append(found)

    def best(self, computed: int) -> tuple[str, float]:
        """The best schedule of ``computed`` computed steps, and its cost.

        Raises:
            InvalidOption: Not even one for each expert.
        """
        if computed not in self._divisions[-1]:
            raise _too_few(computed, len(self._programs))
        cost, parts, left = self._divisions[-1][computed][0], [], computed
        for program, division in zip(self._programs[::-1], self._divisions[::-1], strict=True):
            count = division[left][1]
            parts.append(program.best(count)[0])
            left -= count
        return "".join(parts[::-1]), cost


def _too_few(computed: int, experts: int) -> InvalidOption:
    return InvalidOption(
        f"{computed} computed steps: expected at least one for each of {experts} experts"
    )
