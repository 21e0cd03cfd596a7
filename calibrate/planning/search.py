"""Schedules as letters, and the best one of every number of computed steps by dynamic programming."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.trials.baselines import uniform

Array = NDArray[np.float64]


def schedule_of(computed: Iterable[int], num_steps: int) -> str:
    """``"CCSC..."`` of the computed steps."""
    chosen = set(computed)
    return "".join("C" if step in chosen else "S" for step in range(num_steps))


def computed_of(schedule: str) -> list[int]:
    """The computed steps."""
    return [step for step, letter in enumerate(schedule) if letter == "C"]


def uniform_between(walls: Sequence[int], num_steps: int, computed: int) -> str:
    """The uniform schedule; at each wall the nearest computed step is moved onto it."""
    if computed < len(walls):
        raise InvalidOption(
            f"{computed} computed steps: expected at least one for each of {len(walls)} experts"
        )
    chosen = computed_of(uniform(num_steps, computed))
    for wall in walls:
        if wall not in chosen:
            movable = [step for step in chosen if step not in walls]
            chosen.remove(min(movable, key=lambda step: abs(step - wall)))
            chosen.append(wall)
    return schedule_of(chosen, num_steps)


def best_schedules(costs: Array) -> list[str]:
    """The best schedules of 1, 2, up to all steps; any where every one costs infinitely much.

    Args:
        costs: As from :meth:`calibrate.planning.problem.Problem.costs`, shape (T + 1, T, T + 1): the computed step
            before the last plus one (0: none), the last computed step, the next computed step (T: the end).
    """
    steps = costs.shape[1]
    # reached[q, s]: least cost of a schedule whose last computed steps are q - 1 and s; back: the step before q - 1.
    reached = np.full((steps + 1, steps), np.inf)
    reached[0, 0] = 0.0
    backs: list[NDArray[np.int64]] = []
    best = []
    for _ in range(steps):
        ends = reached + costs[:, :, steps]
        older, newest = divmod(int(ends.argmin()), steps)
        chosen = [newest]
        for back in reversed(backs):
            older, newest = int(back[older - 1, newest]), older - 1
            chosen.append(newest)
        best.append(schedule_of(chosen, steps))
        longer = reached[:, :, None] + costs[:, :, :steps]
        backs.append(longer.argmin(0))
        reached = np.full_like(reached, np.inf)
        reached[1:] = longer.min(0)
    return best


def schedule_cost(costs: Array, schedule: str) -> float:
    """Cost of one schedule in such a table: what the search adds up."""
    total, older = 0.0, 0
    for newest, after in pairwise([*computed_of(schedule), len(schedule)]):
        total += costs[older, newest, after]
        older = newest + 1
    return float(total)
