"""When to compute: the rules that a gate and a plan are compared with, as schedules of one letter per step.

A schedule is ``"CCSC..."``: C computes the block stack, S reuses what it last added. No model, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from itertools import cycle

import numpy as np

from calibrate.errors import CalibrateError

DEFAULT_FRACTIONS = (0.75, 0.6, 0.5, 0.4, 0.3)
LARGEST_THRESHOLD = 1e9  # rules that still compute more here are not driven by it


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

    def nearest(guards: tuple[int, float]) -> str:
        max_skips, retention = guards
        plan = partial(magcache, ratios, num_steps, max_skips=max_skips, retention=retention)
        return plan(threshold_for(lambda threshold: plan(threshold).count("C"), computed))

    loosening = (3, 0.2), (4, 0.1), (6, 0.05), (num_steps, 0.0)
    return min(map(nearest, loosening), key=lambda plan: abs(plan.count("C") - computed))


# cache-dit 1.5.3, `steps_mask`: lengths of the stretches that its named policies compute and skip in turn. The first
# are for 28 steps and more or fewer, the others for distilled models of at most 15, 9 and 8 steps.
CACHE_DIT_MASKS = {
    "slow": {
        28: (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
        15: (4, 1, 2, 1, 2, 1, 2, 1, 1),
        9: (5, 1, 3),
        8: (5, 1, 2),
    },
    "medium": {
        28: (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
        15: (4, 1, 2, 1, 1, 2, 1, 2, 1),
        9: (5, 1, 1, 1, 1),
        8: (4, 1, 1, 1, 1),
    },
    "fast": {
        28: (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
        15: (3, 1, 1, 2, 1, 2, 1, 3, 1),
        9: (4, 1, 1, 2, 1),
        8: (3, 1, 1, 2, 1),
    },
    "ultra": {
        28: (4, 2, 1, 5, 1, 6, 1, 7, 1),
        15: (2, 1, 1, 2, 1, 3, 1, 3, 1),
        9: (3, 2, 1, 2, 1),
        8: (2, 2, 1, 2, 1),
    },
}
MFLUX_PROTECTED = (
    0.1  # mflux 0.24.0, `StepCache`: this share of first and last steps computes
)
MFLUX_MIN_STEPS = 10


def cache_dit_mask(name: str, num_steps: int) -> str:
    """The schedule of cache-dit's mask policy ``slow``, ``medium``, ``fast`` or ``ultra``.

    More than 28 steps lengthen the stretches in proportion, fewer cut the last ones.
    """
    if num_steps < 8:
        raise InvalidBudget(f"{num_steps} steps: cache-dit's masks are taken from 8 steps on")
    longest = next((steps for steps in (8, 9, 15) if num_steps <= steps), 28)
    lengths = list(CACHE_DIT_MASKS[name][longest])
    # Each grows by half its share of the schedule, the last one by a step.
    growth = num_steps / 28 * 0.5
    grown = [max(int(length * growth), 1) for length in lengths[:-1]] + [1]
    in_turn = cycle(range(len(lengths)))
    while sum(lengths) < num_steps:
        index = next(in_turn)
        lengths[index] += grown[index]
    # What is too long gives up steps in turn: the last stretch that skips one, the last that computes one.
    skipped_first = cycle((1, 0))
    while sum(lengths) > num_steps:
        same = range(next(skipped_first), len(lengths), 2)
        lengths[max(index for index in same if lengths[index])] -= 1
    stretches = zip(cycle("CS"), lengths, strict=False)
    return "".join(letter * length for letter, length in stretches)[:-1] + "C"


def mflux_schedule(sigmas: Sequence[float], computed: int) -> str:
    """mflux's rule: of the steps between the protected ends, those whose noise level changed least are skipped."""
    num_steps = len(sigmas)
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


def budcache(num_steps: int, computed: int, error: Callable[[str], float]) -> str:
    """BudCache's search: of all schedules with a budget, one whose real result has little ``error``.

    The first quarter of the budget stays at the beginning; of the other computed steps one or two move at a time.
    """
    rng = np.random.default_rng(0)
    first = max(1, computed // 4)
    movable = range(first, num_steps)

    @cache  # the search comes back to what it has tried
    def error_of(chosen: frozenset[int]) -> float:
        return error(_schedule(chosen, num_steps))

    def moved(chosen: frozenset[int]) -> frozenset[int]:
        computes, skips = sorted(chosen)[first:], [s for s in movable if s not in chosen]
        if not computes or not skips:
            return chosen
        old = rng.choice(computes)
        near = [step for step in skips if abs(step - old) <= NEAR]
        new = rng.choice(near if near and rng.random() < 0.7 else skips)
        return chosen - {old} | {new}

    others = rng.choice(movable, computed - first, replace=False)
    current = best = frozenset([*range(first), *others])
    for turn in range(ANNEALED):
        temperature = HOT * (COLD / HOT) ** (turn / ANNEALED)
        candidate = moved(current) if rng.random() < 0.9 else moved(moved(current))
        rise = max(error_of(candidate) - error_of(current), 0.0)
        if rng.random() < np.exp(-rise / temperature):
            current = candidate
        best = min(best, current, key=error_of)
    for _ in range(SWEEPS):
        neighbours = [
            best - {old} | {new}
            for old in sorted(best)[first:]
            for new in movable
            if new not in best and abs(new - old) <= NEAR
        ]
        better = min(neighbours, key=error_of, default=best)
        if error_of(better) >= error_of(best):
            break
        best = better
    return _schedule(best, num_steps)
