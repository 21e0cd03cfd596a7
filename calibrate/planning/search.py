"""Schedules as letters, and the best one of every number of computed steps by dynamic programming."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.trials.baselines import check_budget, uniform

Array = NDArray[np.float64]


def checked(schedule: str, num_steps: int) -> str:
    """The schedule, if it is one of this many steps that begins with a computed one."""
    if len(schedule) != num_steps or set(schedule) - {"C", "S"} or not schedule.startswith("C"):
        raise InvalidOption(
            f"schedule {schedule!r}: expected {num_steps} letters C or S, the first one C"
        )
    return schedule


def schedule_of(computed: Iterable[int], num_steps: int) -> str:
    """``"CCSC..."`` of the computed steps."""
    chosen = set(computed)
    return "".join("C" if step in chosen else "S" for step in range(num_steps))


def computed_of(schedule: str) -> list[int]:
    """The computed steps."""
    return [step for step, letter in enumerate(schedule) if letter == "C"]


def uniform_between(walls: Sequence[int], num_steps: int, computed: int) -> str:
    """The uniform schedule; at each wall the nearest computed step is moved onto it."""
    check_budget(computed, num_steps)
    if computed < len(walls):
        raise too_few(computed, len(walls))
    chosen = computed_of(uniform(num_steps, computed))
    for wall in walls:
        if wall not in chosen:
            movable = [step for step in chosen if step not in walls]
            chosen.remove(min(movable, key=lambda step: abs(step - wall)))
            chosen.append(wall)
    return schedule_of(chosen, num_steps)


def too_few(computed: int, experts: int) -> InvalidOption:
    return InvalidOption(
        f"{computed} computed steps: expected at least one for each of {experts} experts"
    )


@dataclass
class Program:
    """Exact best schedules of every number of computed steps, for costs of spans between computed steps.

    Args:
        costs: As from :meth:`calibrate.planning.problem.Problem.costs`, shape (T + 1, T, T + 1): the computed step
            before the last plus one (0: none), the last computed step, the next computed step (T: the end).
        most: Largest number of computed steps that will be asked for.
        walls: Steps that must be computed.
    """

    costs: Array
    most: int
    walls: Sequence[int] = (0,)
    _back: list[NDArray[np.int64]] = field(default_factory=list)
    _best: list[tuple[float, tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        steps = self.costs.shape[1]
        # reached[q, s]: least cost of a schedule whose last computed steps are q - 1 and s.
        reached = np.full((steps + 1, steps), np.inf)
        reached[0, 0] = 0.0
        for _ in range(self.most):
            ends = reached + self.costs[:, :, steps]
            older, newest = np.unravel_index(int(np.argmin(ends)), ends.shape)
            self._best.append((float(ends[older, newest]), (int(older), int(newest))))
            longer = reached[:, :, None] + self.costs[:, :, :steps]
            self._back.append(longer.argmin(0))
            reached = np.full_like(reached, np.inf)
            reached[1:] = longer.min(0)

    def best(self, computed: int) -> tuple[str, float]:
        """The best schedule of ``computed`` computed steps, and its cost.

        Raises:
            InvalidOption: Not even one for each expert.
        """
        cost, (older, newest) = self._best[computed - 1]
        if not np.isfinite(cost):
            raise too_few(computed, len(self.walls))
        chosen = [newest]
        for back in reversed(self._back[: computed - 1]):
            older, newest = int(back[older - 1, newest]), older - 1
            chosen.append(newest)
        return schedule_of(chosen, self.costs.shape[1]), cost


def schedule_cost(costs: Array, schedule: str) -> float:
    """Cost of one schedule in such a table: what the program adds up."""
    computed, total = computed_of(schedule), 0.0
    for index, newest in enumerate(computed):
        older = computed[index - 1] + 1 if index else 0
        after = computed[index + 1] if index + 1 < len(computed) else len(schedule)
        total += costs[older, newest, after]
    return float(total)
