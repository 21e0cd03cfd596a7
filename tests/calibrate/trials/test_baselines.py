"""Schedules of others, against what their published packages return."""

import numpy as np
import pytest

from calibrate.trials.baselines import InvalidBudget, cache_dit_mask, mflux_schedule


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
