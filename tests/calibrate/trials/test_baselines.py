"""Schedules of others, against what their published packages return."""

from itertools import combinations

import numpy as np
import pytest

from calibrate.trials.baselines import (
    InvalidBudget,
    budcache,
    cache_dit_mask,
    magcache,
    magcache_at,
    mflux_schedule,
    uniform,
)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        # As `cache_dit.steps_mask(mask_policy=..., total_steps=...)` of cache-dit 1.5.3 returns them.
        ("slow", "CCCCCCCCSCCCSSCCCSSCCSSCSSSC"),
        ("medium", "CCCCCCSCCSSSCCSSSCCSSSCCSSSC"),
        ("fast", "CCCCCCSCSSSCSSSSCSSSSSCSSSSC"),
        ("ultra", "CCCCSSCSSSSSCSSSSSSCSSSSSSSC"),
        ("slow", "CCCCCCCCCCCCCCCCCCCCCCSSCCCCCSSSCCCCCSSSCCCSSSCCSC"),
        ("ultra", "CCCCSSSSSSSSSSSSSSSC"),
        ("fast", "CCCCSCSSC"),
        ("medium", "CCCCSCCSCSSC"),
        ("ultra", "CCSSCSSC"),
    ],
)
def test_masks_are_those_of_cache_dit(name, schedule):
    assert cache_dit_mask(name, len(schedule)) == schedule


def test_masks_of_any_length_are_whole_and_end_computing():
    for num_steps in range(8, 101):
        for name in ("slow", "medium", "fast", "ultra"):
            schedule = cache_dit_mask(name, num_steps)
            assert len(schedule) == num_steps and schedule[0] == schedule[-1] == "C"
    with pytest.raises(InvalidBudget, match="from 8 steps on"):
        cache_dit_mask("slow", 7)


def test_mflux_skips_where_the_noise_level_changes_least_between_protected_ends():
    """Changes that fall from 0.2 to 0.02: the last ones before the protected last step are skipped."""
    sigmas = 1 - np.cumsum([0, 0.2, 0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02])
    assert mflux_schedule(sigmas, 7) == "CCCCCCSSSC"
    assert mflux_schedule(sigmas[::-1], 7) == "CSSSCCCCCC"
    assert mflux_schedule(sigmas, 1) == "CSSSSSSSSC"  # the ends compute whatever the budget
    with pytest.raises(InvalidBudget, match="skips none below 10"):
        mflux_schedule(sigmas[:9], 5)


@pytest.mark.parametrize("num_steps", [4, 28, 50])
def test_uniform_computes_exactly_its_budget_and_starts_computing(num_steps):
    for computed in range(1, num_steps + 1):
        pattern = uniform(num_steps, computed)
        assert (len(pattern), pattern.count("C"), pattern[0]) == (num_steps, computed, "C")


def test_a_uniform_plan_looks_as_it_is_called():
    assert uniform(8, 4) == "CSCSCSCS"


def test_a_budget_beyond_the_schedule_is_refused():
    with pytest.raises(InvalidBudget, match="9 computed steps of 8"):
        uniform(8, 9)


def test_magcache_plan_follows_the_published_rule():
    """Errors |1 - product of ratios| add up: 0.1, then 0.1 + 0.19 = 0.29 > 0.2 computes and starts over."""
    ratios = [0.9] * 7
    assert magcache(ratios, 8, 0.2, max_skips=3, retention=0.0) == "CSCSCSCS"
    assert magcache(ratios, 8, 1e9, max_skips=2, retention=0.0) == "CSSCSSCS"
    assert magcache(ratios, 8, 1e9, max_skips=9, retention=0.5) == "CCCCSSSS"


@pytest.mark.parametrize("computed", [4, 9, 14, 20, 27])
def test_magcache_at_a_budget_hits_it_or_comes_near(computed):
    ratios = list(1 - 0.1 * np.random.default_rng(1).random(27))
    assert abs(magcache_at(ratios, 28, computed).count("C") - computed) <= 1


@pytest.mark.parametrize("computed", [1, 4, 6, 9, 16])
def test_budcache_finds_the_schedule_of_least_error_with_its_first_quarter_computed(
    computed,
):
    weights = [5, 4, 3, 1, 1, 1, 1, 1, 2, 6, 1, 1, 4, 1, 1, 2]
    tried = []

    def error(schedule: str) -> float:
        tried.append(schedule)
        ages = [step - schedule.rindex("C", 0, step + 1) for step in range(16)]
        return sum(weight * age**2 for weight, age in zip(weights, ages, strict=True))

    first = max(1, computed // 4)
    possible = [
        "".join("C" if step < first or step in chosen else "S" for step in range(16))
        for chosen in combinations(range(first, 16), computed - first)
    ]
    found = budcache(16, computed, error)
    runs = len(tried)
    assert error(found) == min(map(error, possible))
    assert runs == len(set(tried[:runs])), "nothing is run twice"
    assert budcache(16, computed, error) == found, "the same every time"
