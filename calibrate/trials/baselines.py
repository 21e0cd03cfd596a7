"""When to compute: the rules that a gate and a plan are compared with, as schedules of one letter per step.

A schedule is ``"CCSC..."``: C computes the block stack, S reuses what it last added. No model, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.errors import CalibrateError

DEFAULT_FRACTIONS = (0.75, 0.6, 0.5, 0.4, 0.3)


class InvalidBudget(CalibrateError, ValueError):
    """A number of computed steps that a schedule cannot have."""


def default_budgets(num_steps: int) -> list[int]:
    """Five numbers of computed steps, from three quarters of the schedule to under a third."""
    return sorted(
        {max(2, round(fraction * num_steps)) for fraction in DEFAULT_FRACTIONS if num_steps > 2},
        reverse=True,
    )


def check_budget(computed: int, num_steps: int) -> None:
    if not 1 <= computed <= num_steps:
        raise InvalidBudget(f"{computed} computed steps of {num_steps}: expected 1 to {num_steps}")


def _plan(positions: Sequence[int], num_steps: int) -> str:
    chosen = set(positions)
    return "".join("C" if step in chosen else "S" for step in range(num_steps))


def uniform(num_steps: int, computed: int) -> str:
    """Every so-many-th step: computed step i lies at ``floor(i T / B)``. The baseline that a gate has to beat."""
    check_budget(computed, num_steps)
    return _plan([i * num_steps // computed for i in range(computed)], num_steps)


def magcache(
    ratios: Sequence[float], num_steps: int, threshold: float, *, max_skips: int, retention: float
) -> str:
    """MagCache's rule (arXiv 2506.09045; diffusers' ``MagCacheConfig``) as a plan: it looks at recorded ratios only.

    Args:
        ratios: Of each step 1 .. T-1, mean magnitude of the residual over the previous step's.
        retention: Fraction of first steps that always compute.
    """
    first, plan = int(retention * num_steps + 0.5), ["C"]
    product, error, run = 1.0, 0.0, 0
    for step in range(1, num_steps):
        if step >= first:
            product *= ratios[step - 1]
            run += 1
            error += abs(1.0 - product)
            if error <= threshold and run <= max_skips:
                plan.append("S")
                continue
            product, error, run = 1.0, 0.0, 0
        plan.append("C")
    return "".join(plan)


def magcache_at(ratios: Sequence[float], num_steps: int, computed: int) -> str:
    """MagCache's plan nearest to a number of computed steps, with its usual guards as far as the budget admits them.

    Starts from K = 3 skips in a row and 20 % retained steps, the paper's values, and loosens both where the budget
    lies below what they can reach.
    """
    check_budget(computed, num_steps)
    best = "C" * num_steps
    for max_skips, retention in ((3, 0.2), (4, 0.1), (6, 0.05), (num_steps, 0.0)):
        low, high = 0.0, 1.0

        def plan(threshold: float, k: int = max_skips, r: float = retention) -> str:
            return magcache(ratios, num_steps, threshold, max_skips=k, retention=r)

        while plan(high).count("C") > computed and high < 1e6:
            high *= 4
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if plan(middle).count("C") > computed else (low, middle)
        for candidate in (plan(high), plan(low)):
            if abs(candidate.count("C") - computed) < abs(best.count("C") - computed):
                best = candidate
        if best.count("C") == computed:
            break
    return best


def disagreement(replayed: str, real: str) -> int:
    """Number of steps that two patterns of one schedule decide differently."""
    if len(replayed) != len(real):
        raise ValueError(f"patterns of {len(replayed)} and {len(real)} steps do not compare")
    return sum(a != b for a, b in zip(replayed, real, strict=True))


# cache-dit 1.5.3, `steps_mask`: lengths of the computed and the cached stretches, in turn, of its named policies.
# The first are for 28 steps and more or fewer, the others for distilled models of 10 to 15, 9 and 8 steps.
CACHE_DIT_MASKS = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_FEW_STEPS = {
    "slow": {15: ((4, 2, 2, 2, 1), (1, 1, 1, 1)), 9: ((5, 2, 1), (1,)), 8: ((5, 1, 1), (1,))},
    "medium": {15: ((4, 2, 1, 1, 1), (1, 1, 2, 2)), 9: ((5, 1, 1), (1, 1)), 8: ((4, 1, 1), (1, 1))},
    "fast": {15: ((3, 1, 1, 1, 1), (1, 2, 2, 3)), 9: ((4, 1, 1), (1, 2)), 8: ((3, 1, 1), (1, 2))},
    "ultra": {15: ((2, 1, 1, 1, 1), (1, 2, 3, 3)), 9: ((3, 1, 1), (2, 2)), 8: ((2, 1, 1), (2, 2))},
}
MFLUX_PROTECTED = 0.1  # mflux 0.24.0, `StepCache`: this share of first and of last steps computes
MFLUX_MIN_STEPS = 10


def cache_dit_mask(name: str, num_steps: int) -> str:
    """The schedule of cache-dit's mask policy ``slow``, ``medium``, ``fast`` or ``ultra``.

    More than 28 steps lengthen the stretches in proportion, fewer cut the last ones.
    """
    if num_steps < 8:
        raise InvalidBudget(f"{num_steps} steps: cache-dit's masks are taken from 8 steps on")
    stretches = CACHE_DIT_MASKS[name]
    if num_steps < 16:
        stretches = _FEW_STEPS[name][num_steps if num_steps in (8, 9) else 15]
    # Computed and cached stretches in turn; there is one more computed one.
    lengths = [list(stretches[0]), list(stretches[1])]
    if num_steps > 28:
        _lengthen(lengths, stretches, num_steps)
    turn = 1
    while _total(lengths) > num_steps:
        if lengths[turn]:
            lengths[turn][-1] -= 1
            if lengths[turn][-1] == 0:
                lengths[turn].pop()
        turn = 1 - turn
    schedule = ""
    for index in range(max(map(len, lengths))):
        schedule += "C" * sum(lengths[0][index : index + 1])
        schedule += "S" * sum(lengths[1][index : index + 1])
    return schedule[:-1] + "C"


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
    return _plan([step for step in range(num_steps) if step not in skipped], num_steps)


def _lengthen(lengths: list[list[int]], base: tuple, num_steps: int) -> None:
    """Grow the stretches in turn, each by half its share of the schedule, and the last computed one by a step."""
    growth = num_steps / 28 * 0.5
    while True:
        for index in range(len(base[1])):
            for kind in (0, 1):
                lengths[kind][index] += max(int(base[kind][index] * growth), 1)
                if _total(lengths) >= num_steps:
                    return
        lengths[0][-1] += 1
        if _total(lengths) >= num_steps:
            return


def _total(lengths: list[list[int]]) -> int:
    return sum(map(sum, lengths))
