"""When to compute: the rules that a gate and a plan are compared with, as schedules of one letter per step.

A schedule is ``"CCSC..."``: C computes the block stack, S reuses what it last added. No model, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from itertools import cycle, zip_longest

import numpy as np

from calibrate.errors import CalibrateError

DEFAULT_FRACTIONS = (0.75, 0.6, 0.5, 0.4, 0.3)
LARGEST_THRESHOLD = (
    1e9  # rules that still compute more here are not driven by their threshold
)


class InvalidBudget(CalibrateError, ValueError):
    """A number of computed steps that a schedule cannot have."""


def default_budgets(num_steps: int) -> list[int]:
    """Five numbers of computed steps, from three quarters of the schedule to under a third."""
    budgets = {max(2, round(fraction * num_steps)) for fraction in DEFAULT_FRACTIONS}
    return sorted(budgets, reverse=True)


def check_budget(computed: int, num_steps: int) -> None:
    if not 1 <= computed <= num_steps:
        raise InvalidBudget(
            f"{computed} computed steps of {num_steps}: expected 1 to {num_steps}"
        )


def _schedule(chosen: Container[int], num_steps: int) -> str:
    return "".join("C" if step in chosen else "S" for step in range(num_steps))


def uniform(num_steps: int, computed: int) -> str:
    """Every so-many-th step: computed step i lies at ``floor(i T / B)``. The baseline that a gate has to beat."""
    check_budget(computed, num_steps)
    return _schedule([i * num_steps // computed for i in range(computed)], num_steps)


def threshold_for(count: Callable[[float], float], budget: float) -> float:
    """Threshold at which ``count`` (computed steps, falling with the threshold) comes nearest to the budget."""
    low, high = 0.0, 1e-6
    while count(high) > budget and high < LARGEST_THRESHOLD:
        low, high = high, high * 4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) > budget else (low, middle)
    return min((high, low), key=lambda threshold: abs(count(threshold) - budget))


def magcache(
    ratios: Sequence[float],
    num_steps: int,
    threshold: float,
    *,
    max_skips: int,
    retention: float,
) -> str:
    """MagCache's rule (arXiv 2506.09045; diffusers' ``MagCacheConfig``) as a plan: it looks at recorded ratios only.

    Args:
        ratios: Of each step 1 .. T-1, mean magnitude of the residual over the previous step's.
        retention: Fraction of first steps that always compute.
    """
    first = max(1, int(retention * num_steps + 0.5))
    plan, product, error, run = "C" * first, 1.0, 0.0, 0
    for ratio in ratios[first - 1 :]:
        product *= ratio
        run += 1
        error += abs(1.0 - product)
        if error <= threshold and run <= max_skips:
            plan += "S"
        else:
            plan += "C"
            product, error, run = 1.0, 0.0, 0
    return plan


def magcache_at(ratios: Sequence[float], num_steps: int, computed: int) -> str:
    """MagCache's plan nearest to a number of computed steps, with its usual guards as far as the budget admits them.

    Starts from K = 3 skips in a row and 20 % retained steps, the paper's values, and loosens both where the budget
    lies below what they can reach.
    """
    check_budget(computed, num_steps)

    def nearest(guards: tuple[int, float]) -> str:
        max_skips, retention = guards
        plan = partial(magcache, ratios, num_steps, max_skips=max_skips, retention=retention)
        return plan(threshold_for(lambda threshold: plan(threshold).count("C"), computed))

    loosening = (3, 0.2), (4, 0.1), (6, 0.05), (num_steps, 0.0)
    return min(map(nearest, loosening), key=lambda plan: abs(plan.count("C") - computed))


# cache-dit 1.5.3, `steps_mask`: lengths of the computed and the cached stretches, in turn, of its named policies.
# The first are for 28 steps and more or fewer, the others for distilled models of 10 to 15, 9 and 8 steps.
CACHE_DIT_MASKS = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_FEW_STEPS = {
    "slow": {
        15: ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        9: ((5, 2, 1), (1,)),
        8: ((5, 1, 1), (1,)),
    },
    "medium": {
        15: ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        9: ((5, 1, 1), (1, 1)),
        8: ((4, 1, 1), (1, 1)),
    },
    "fast": {
        15: ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        9: ((4, 1, 1), (1, 2)),
        8: ((3, 1, 1), (1, 2)),
    },
    "ultra": {
        15: ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
        9: ((3, 1, 1), (2, 2)),
        8: ((2, 1, 1), (2, 2)),
    },
}
MFLUX_PROTECTED = (
    0.1  # mflux 0.24.0, `StepCache`: this share of first and of last steps computes
)
MFLUX_MIN_STEPS = 10


def cache_dit_mask(name: str, num_steps: int) -> str:
    """The schedule of cache-dit's mask policy ``slow``, ``medium``, ``fast`` or ``ultra``.

    More than 28 steps lengthen the stretches in proportion, fewer cut the last ones.
    """
    if num_steps < 8:
        raise InvalidBudget(f"{num_steps} steps: cache-dit's masks are taken from 8 steps on")
    stretches = CACHE_DIT_MASKS[name]
    if num_steps < 16:
        stretches = _FEW_STEPS[name][num_steps if num_steps < 10 else 15]
    # Computed and cached stretches in turn; there is one more computed one.
    computed, cached = lengths = list(stretches[0]), list(stretches[1])
    if num_steps > 28:
        _lengthen(lengths, num_steps)
    for last in cycle((cached, computed)):
        if sum(computed) + sum(cached) <= num_steps:
            break
        if last:
            last[-1] -= 1
            if last[-1] == 0:
                last.pop()
    stretches_in_turn = zip_longest(computed, cached, fillvalue=0)
    schedule = "".join("C" * run + "S" * skipped for run, skipped in stretches_in_turn)
    return schedule[:-1] + "C"


def _lengthen(lengths: tuple[list[int], list[int]], num_steps: int) -> None:
    """Grow the stretches in turn, each by half its share of the schedule, and the last computed one by a step."""
    computed, cached = lengths
    growth = num_steps / 28 * 0.5
    turns = [
        (part, index, max(int(part[index] * growth), 1))
        for index in range(len(cached))
        for part in lengths
    ]
    for part, index, steps in cycle([*turns, (computed, -1, 1)]):
        part[index] += steps
        if sum(computed) + sum(cached) >= num_steps:
            return


def mflux_schedule(sigmas: Sequence[float], computed: int) -> str:
    """mflux's rule: of the steps between the protected ends, those whose noise level changed least are skipped."""
    num_steps = len(sigmas)
    check_budget(computed, num_steps)
    if num_steps < MFLUX_MIN_STEPS:
        raise InvalidBudget(f"{num_steps} steps: mflux skips none below {MFLUX_MIN_STEPS}")
    protected = int(num_steps * MFLUX_PROTECTED)
    eligible = range(max(protected, 1), num_steps - protected)
    by_change = sorted(eligible, key=lambda step: abs(sigmas[step] - sigmas[step - 1]))
    skipped = by_change[: num_steps - computed]
    return _schedule(set(range(num_steps)).difference(skipped), num_steps)


# BudCache (arXiv 2606.13496, its FLUX search at 14ba4c5): tries of the annealing and its first and last temperature,
# sweeps of the climb after it, and how many steps a computed one moves as a rule.
ANNEALED, SWEEPS = 200, 20
HOT, COLD = 0.05, 1e-5
NEAR = 3


def budcache(
    num_steps: int, computed: int, error: Callable[[str], float], seed: int = 0
) -> str:
    """BudCache's search: of all schedules with a budget, one whose real result has little ``error``.

    The first quarter of the budget stays at the beginning; of the other computed steps one or two move at a time.
    """
    check_budget(computed, num_steps)
    rng = np.random.default_rng(seed)
    error = cache(error)  # the search comes back to what it has tried
    first = max(1, computed // 4)
    movable = np.arange(first, num_steps)

    def moved(schedule: str) -> str:
        computes, skips = ([s for s in movable if schedule[s] == letter] for letter in "CS")
        if not computes or not skips:
            return schedule
        old = rng.choice(computes)
        near = [step for step in skips if abs(step - old) <= NEAR]
        new = rng.choice(near if near and rng.random() < 0.7 else skips)
        return _with_moved(schedule, old, new)

    others = rng.choice(movable, computed - first, replace=False)
    current = best = _schedule([*range(first), *others], num_steps)
    for turn in range(ANNEALED):
        temperature = HOT * (COLD / HOT) ** (turn / ANNEALED)
        candidate = moved(current) if rng.random() < 0.9 else moved(moved(current))
        rise = max(error(candidate) - error(current), 0.0)
        if rng.random() < np.exp(-rise / temperature):
            current = candidate
        best = min(best, current, key=error)
    for _ in range(SWEEPS):
        better = min(_neighbours(best, first), key=error, default=best)
        if error(better) >= error(best):
            break
        best = better
    return best


def _neighbours(schedule: str, first: int) -> list[str]:
    """The schedules in which one computed step has moved by at most ``NEAR``."""
    steps = range(first, len(schedule))
    return [
        _with_moved(schedule, old, new)
        for old in steps
        for new in steps
        if schedule[old] == "C" and schedule[new] == "S" and abs(new - old) <= NEAR
    ]


def _with_moved(schedule: str, old: int, new: int) -> str:
    chosen = {step for step, letter in enumerate(schedule) if letter == "C"}
    return _schedule(chosen - {old} | {new}, len(schedule))
