"""When to compute: the rules that a fitted gate is compared with, as plans of one letter per step, and its threshold.

A plan is ``"CCSC..."``: C computes the block stack, S reuses what it last added. Pure: no model, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibrate.errors import CalibrateError

GROWTH = 1.5  # exponent of the growing interval: computed step i of B lies at T (i / B)^1.5
DEFAULT_FRACTIONS = (0.75, 0.6, 0.5, 0.4, 0.3)


class InvalidBudget(CalibrateError, ValueError):
    """A number of computed steps that a schedule cannot have."""


class Refused(CalibrateError):
    """A policy that this model, this run or this version of diffusers does not take; says why."""


@dataclass(frozen=True)
class Setting:
    """One way to run the model: what it is called, how many steps it is meant to compute, and how.

    Attributes:
        kind: ``gate`` (a threshold with an entry), ``schedule`` (a plan), ``fewer_steps`` (a shorter schedule, nothing
            cached; with ``solver_order`` 2 another solver) or the name of one of diffusers' own caches.
        parameters: What the kind needs, as plain data; with the name it identifies the results.
    """

    policy: str
    kind: str
    budget: int
    parameters: Mapping[str, Any] = field(default_factory=dict)


def forecast_parameters(
    forecast: str | None,
    forecast_of: str | None,
    weights: Mapping[int, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """A forecast as a setting's parameters. What the runtime does anyway is left out, so that one way to run is one
    setting whoever describes it, and results keep their keys.

    Args:
        weights: Of a fitted forecast: step -> weights of the last computed steps; without any, nothing is forecast.
    """
    found: dict[str, Any] = {}
    if forecast not in (None, "reuse") and (forecast != "fitted" or weights):
        found["forecast"] = forecast
    if forecast_of not in (None, "residual"):
        found["forecast_of"] = forecast_of
    if weights:
        found["weights"] = {str(step): list(row) for step, row in weights.items()}
    return found


def schedule_setting(
    policy: str,
    schedule: str,
    forecast: str | None = None,
    forecast_of: str | None = None,
    weights: Mapping[int, Sequence[float]] | None = None,
    *,
    budget: int | None = None,
) -> Setting:
    """A fixed schedule with the forecast of its skipped steps.

    Args:
        budget: What it was made for, where that is not the number of steps it computes.
    """
    parameters = {"schedule": schedule, **forecast_parameters(forecast, forecast_of, weights)}
    return Setting(
        policy, "schedule", schedule.count("C") if budget is None else budget, parameters
    )


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


def growing_interval(num_steps: int, computed: int) -> str:
    """Dense at the start, ever sparser towards the image (``GROWTH``)."""
    check_budget(computed, num_steps)
    positions: list[int] = []
    for i in range(computed):
        position = int(num_steps * (i / computed) ** GROWTH)
        positions.append(max(position, positions[-1] + 1) if positions else 0)
    return _plan(positions, num_steps)


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


def threshold_for(count: Callable[[float], float], budget: float, *, largest: float = 1e9) -> float:
    """Threshold at which ``count`` (computed steps, falling with the threshold) comes nearest to the budget."""
    low, high = 0.0, 1e-6
    while count(high) > budget and high < largest:
        low, high = high, high * 4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) > budget else (low, middle)
    return min((high, low), key=lambda threshold: abs(count(threshold) - budget))


def tune_threshold(
    replayed: Callable[[float], float],
    measured: Callable[[float], float],
    budget: float,
    *,
    tries: int = 4,
    tolerance: float = 0.5,
) -> tuple[float, float]:
    """Threshold whose real runs compute ``budget`` steps, and how many they do.

    Replay proposes; where the real count is off, replay is asked for a budget moved by the difference.

    Args:
        replayed: Mean computed steps of the replay at a threshold (cheap).
        measured: Mean computed steps of real runs (dear): called at most ``tries`` times.
    """
    aim, tried = budget, {}
    for _ in range(tries):
        threshold = threshold_for(replayed, aim)
        if threshold in tried:
            break
        tried[threshold] = measured(threshold)
        if abs(tried[threshold] - budget) <= tolerance:
            break
        aim += budget - tried[threshold]
    best = min(tried, key=lambda threshold: abs(tried[threshold] - budget))
    return best, tried[best]


def disagreement(replayed: str, real: str) -> int:
    """Number of steps that two patterns of one schedule decide differently."""
    if len(replayed) != len(real):
        raise ValueError(f"patterns of {len(replayed)} and {len(real)} steps do not compare")
    return sum(a != b for a, b in zip(replayed, real, strict=True))
