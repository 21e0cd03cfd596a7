"""Intervals and tests against scipy, published tables and their own promise of coverage."""

import numpy as np
import pytest

from calibrate.fitting import statistics


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    covered = []
    for seed in range(400):
        _, low, high = statistics.mean_interval(
            np.random.default_rng(seed).normal(0.7, 1.0, 10)
        )
        covered.append(low <= 0.7 <= high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_the_interval_of_the_mean_is_students():
    """Gosset's own data of 1908: the differences in sleep of ten patients, 0.70 to 2.46 hours."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert statistics.mean_interval(hours) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4)
    assert statistics.p_different(hours) == pytest.approx(0.00283, abs=1e-5)


def test_two_values_have_a_mean_and_no_interval():
    mean, low, high = statistics.mean_interval([1.0, 2.0])
    assert mean == 1.5 and np.isnan(low) and np.isnan(high)
    assert np.isnan(statistics.p_different([1.0, 2.0]))
    assert all(np.isnan(statistics.mean_interval([])))


def test_an_exact_share_of_none_is_the_rule_of_three():
    """0 of 30: the upper bound is 1 - 0.025^(1/30)."""
    share, low, high = statistics.share_interval(0, 30)
    assert (share, low, high) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 30)))


def test_equivalence_is_shown_by_enough_prompts_and_not_by_ignorance():
    rng = np.random.default_rng(0)
    close, wide = rng.normal(0.1, 0.5, 20), rng.normal(0.1, 8.0, 20)
    assert statistics.p_not_equivalent(close) < 0.01 < 0.3 < statistics.p_not_equivalent(wide)
    assert statistics.p_not_equivalent(close + 2) > 0.9
    assert (
        statistics.p_not_equivalent([0.4] * 8) == 0
        and statistics.p_not_equivalent([1.4] * 8) == 1
    )


def test_values_without_spread():
    assert statistics.p_different([0.0] * 8) == 1 and statistics.p_different([0.5] * 8) == 0


def test_holm_by_hand():
    """0.01 x 4, then 0.02 x 3, 0.03 x 2 raised to what came before, and 0.5 x 1."""
    adjusted = statistics.holm([0.03, np.nan, 0.01, 0.5, 0.02])
    assert adjusted == pytest.approx([0.06, np.nan, 0.04, 0.5, 0.06], nan_ok=True)
    assert statistics.holm([]).size == 0


def test_many_rivals_without_any_difference_are_seldom_beaten():
    """17 tests at 5 % find something in more than half of the cases; corrected, in about 5 %."""
    found, corrected = 0, 0
    for seed in range(80):
        rivals = np.random.default_rng(seed).normal(0, 3, (17, 10))
        p_values = [statistics.p_different(differences) for differences in rivals]
        found += min(p_values) < 0.05
        corrected += statistics.holm(p_values).min() < 0.05
    assert found > 32 and corrected <= 10
