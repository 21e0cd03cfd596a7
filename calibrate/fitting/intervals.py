"""95 % intervals over prompts: prompts are drawn with replacement, all their pairs together.

An interval is the estimate plus and minus Student's t (prompts - 1 degrees of freedom) times the bootstrap's standard
deviation, the latter widened by sqrt(n / (n - 1)) for the small number of prompts. On synthetic data it covers the
truth in 90 to 99 % of repetitions from 6 prompts on, where the percentile interval falls to 80 to 88 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.polynomial import Polynomial as Curve
from numpy.polynomial import polynomial as powers
from numpy.typing import ArrayLike

from calibrate.fitting.least_squares import (
    FitResult,
    powers_of_x,
    scale_to_unit,
    shaped_solution,
)
from calibrate.fitting.replay import Search
from calibrate.fitting.statistics import quantile
from coeffs import Fit

RESAMPLES = 200
# Whole step counts can leave a bootstrap with zero spread (coverage 50 to 95 %); adding half a step
# per prompt restores at least 93 %.
ROUNDING = 0.5
FAINT = 1e-6  # of the design's size: directions below it are undetermined


@dataclass(frozen=True)
class Bootstrap:
    """Refits on resampled prompts.

    Attributes:
        estimate: Coefficients of the fit to all prompts, highest power first.
        domain: Range of x of all prompts.
        coefficients_high_to_low: Of the refits, shape (resamples, degree + 1).
        weights: How often each prompt was drawn, shape (resamples, prompts).
        prompts: Prompt of each column of ``weights``.
    """

    estimate: tuple[float, ...]
    domain: tuple[float, float]
    coefficients_high_to_low: np.ndarray
    weights: np.ndarray
    prompts: tuple[str, ...]

    def curves(self, x: np.ndarray) -> np.ndarray:
        """Every refit at every x, shape (resamples, x)."""
        return self.coefficients_high_to_low @ np.vander(x, len(self.estimate)).T

    def coefficient_intervals(self) -> tuple[tuple[float, float], ...]:
        """Low and high per coefficient, highest power first."""
        estimate = np.array(self.estimate)
        edges = student_interval(estimate, self.coefficients_high_to_low, len(self.prompts))
        return tuple(map(tuple, np.transpose(edges).tolist()))

    def curve_band(self, points: int = 100) -> pd.DataFrame:
        """Pointwise interval of the fitted curve over its domain: columns x, low, high."""
        x = np.linspace(*self.domain, points)
        curve = np.polyval(self.estimate, x)
        low, high = student_interval(curve, self.curves(x), len(self.prompts))
        return pd.DataFrame({"x": x, "low": low, "high": high})


def student_interval(
    estimate: np.ndarray, resampled: np.ndarray, prompts: int, rounding: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval around ``estimate`` from bootstrap values along axis 0 of ``resampled``.

    ``rounding`` is a standard deviation per prompt that resampling cannot see, for values that are whole numbers.
    """
    variance = np.var(resampled, axis=0) + rounding**2 / prompts
    half = quantile(prompts) * np.sqrt(variance * prompts / (prompts - 1))
    return estimate - half, estimate + half


def bootstrap(
    pairs: pd.DataFrame, fit: FitResult | Fit, resamples: int = RESAMPLES
) -> Bootstrap | None:
    """Refits on resampled prompts (columns prompt_id, x, y).

    None below three prompts, and for a fit without a domain.
    """
    prompts, index = np.unique(pairs["prompt_id"].to_numpy(str), return_inverse=True)
    if len(prompts) < 3 or fit.domain is None:
        return None
    estimate = fit.coefficients_high_to_low
    degree = max(len(np.trim_zeros(estimate, "f")) - 1, 0)  # it may have been lowered
    design = powers.polyvander(scale_to_unit(pairs["x"].to_numpy(), fit.domain), degree)
    even = np.full(len(prompts), 1 / len(prompts))
    weights = np.random.default_rng(0).multinomial(len(prompts), even, resamples)
    # A resample may leave a high power undetermined: the smallest solution is taken, of a shape by a trace of ridge.
    ridge = FAINT * np.linalg.norm(design) * np.eye(degree + 1)
    scaled = []
    for root in np.sqrt(weights[:, index]):
        drawn, y = design * root[:, None], root * pairs["y"].to_numpy()
        if fit.method == "constrained":
            q, r = np.linalg.qr(np.vstack([drawn, ridge]))
            scaled.append(shaped_solution(r, y @ q[: len(y)]))
        else:
            scaled.append(np.linalg.lstsq(drawn, y, FAINT)[0])
    terms = [Curve(row, domain=fit.domain) for row in np.eye(degree + 1)]
    exported = scaled @ np.array([powers_of_x(term, len(estimate) - 1) for term in terms])
    return Bootstrap(estimate, fit.domain, exported, weights, tuple(prompts))


def computed_intervals(
    search: Search,
    refits: Mapping[tuple[str, str], Bootstrap | None],
    thresholds: ArrayLike,
) -> np.ndarray:
    """Low and high of the mean number of computed steps per threshold: prompts resampled, polynomials refitted.

    ``refits`` are those of each expert and branch. NaN at threshold 0, which computes everything whatever the fit; and
    everywhere without refits, or where not every branch holds every prompt.
    """
    thresholds = np.asarray(thresholds, float)
    keys = zip(search.trajectories["expert"], search.trajectories["leader"], strict=True)
    used = [refits.get(key) for key in keys]
    known = [refit for refit in used if refit and refit.prompts == tuple(search.prompts)]
    if len(known) < len(used):
        return np.full((2, len(thresholds)), np.nan)
    weights = known[0].weights  # the same draw for every branch
    gated = np.where(np.isnan(search.predicted), np.nan, search.x)
    curves = [
        refit.curves(np.maximum(x, refit.domain[0]))
        for refit, x in zip(known, gated, strict=True)
    ]
    predicted = np.stack(curves, axis=1).clip(0)
    of_generation = weights[:, search.prompt_of]
    resampled = [
        np.average(search.steps(threshold, predicted), 1, of_generation)
        for threshold in thresholds
    ]
    estimate = search.steps(thresholds).mean(axis=-1)
    count = len(search.prompts)
    edges = student_interval(estimate, np.transpose(resampled), count, ROUNDING)
    possible = np.clip(edges, 1, search.all_steps)
    return np.where(thresholds > 0, possible, np.nan)
