"""Intervals and tests over prompts, one method for each question; the unit is the prompt.

Means have Student's t, shares the exact binomial (Clopper-Pearson), families of tests Holm's correction. Bootstraps of
means give the same as Student's t and noise besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
MIN_FOR_INTERVAL = 3
# Below it a 95 % interval is wider than any difference between policies that our tables show (spread of paired
# differences about 2 dB: t times 2 / sqrt(7) = 1.8 dB).
ENOUGH_PROMPTS = 8
MARGIN_DB = 1.0  # differences inside it are not seen side by side
NAN = float("nan")
NO_SPREAD = 1e-300  # instead of a standard error of 0, which nothing can be divided by


def quantile(count: int) -> float:
    """How many standard errors of a mean over ``count`` prompts its 95 % interval reaches to either side."""
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean with its 95 % interval by Student's t; NaN bounds below three values."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else NAN
    if len(values) < MIN_FOR_INTERVAL:
        return mean, NAN, NAN
    half = quantile(len(values)) * float(stats.sem(values))
    return mean, mean - half, mean + half


def share_interval(count: int, of: int) -> tuple[float, float, float]:
    """A share with its exact binomial 95 % interval."""
    interval = stats.binomtest(count, of).proportion_ci(LEVEL, method="exact")
    return count / of, float(interval.low), float(interval.high)


def p_different(differences: ArrayLike) -> float:
    """Two-sided p that the mean difference is 0, by Student's t; 1 where all values are 0."""
    return 2 * _p_of_t(differences, 0.0, stats.t.sf)


def p_not_equivalent(differences: ArrayLike) -> float:
    """p that the mean difference is ``MARGIN_DB`` or more, either way: two one-sided t tests (TOST)."""
    return _p_of_t(differences, MARGIN_DB, stats.t.cdf)


def _p_of_t(
    differences: ArrayLike, margin: float, tail: Callable[[float, int], float]
) -> float:
    """Tail of Student's t by how far the mean's size lies above ``margin``; NaN below three values."""
    values = np.asarray(differences, float)
    if len(values) < MIN_FOR_INTERVAL:
        return NAN
    error = max(stats.sem(values), NO_SPREAD)
    return float(tail((abs(values.mean()) - margin) / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p values of a family; NaN stays NaN and does not count."""
    adjusted = np.array(p_values, float)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known])]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(adjusted[order] * factors), 1.0)
    return adjusted
