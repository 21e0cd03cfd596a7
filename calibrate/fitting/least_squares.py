"""Fitting the rescale polynomial: plain least squares, and the same degree constrained to a usable shape.

Both fits work on t in [-1, 1], the domain scaled to unit size, where powers up to 6 are well conditioned, and are
exported in powers of x by exact rational arithmetic, so that nothing is lost on the way but the last rounding. Where
``numpy.polyfit`` on the bare x is well conditioned itself (condition below 1e5, degree 4 in practice), both agree to
1e-9 relative.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.polynomial import polynomial as powers
from scipy.optimize import nnls

from calibrate.errors import CalibrateError
from coeffs import Entry
from coeffs.entry.polynomial import MAX_DEGREE, Polynomial

EPS = float(np.finfo(float).eps)
DENSE_GRID = 4096  # points between which a constrained fit rises visibly in double precision
UNDETERMINED = (
    1e5  # condition in the scaled basis (below 100 for spread-out x) from which a power is left out
)
EXPORT_LOSS = 1e-8  # largest relative rounding of the exported form
CONDITION_LIMIT = 1e5
CANCELLATION_LIMIT = 1e4
HUGE_COEFFICIENT = 1e6


class CannotFit(CalibrateError, ValueError):
    """Pairs or a degree that no polynomial can be fitted with."""


@dataclass(frozen=True)
class FitResult:
    """A fitted polynomial.

    Attributes:
        coefficients_high_to_low: Highest power of x first, ``degree + 1`` numbers (leading zeros where the data
            determine a lower degree only).
        method: ``polyfit`` or ``constrained``.
        domain: Smallest and largest fitted x.
        condition: Condition number of the problem as ``numpy.polyfit`` on the bare x sees it.
        lowered: By how much the degree had to be lowered; so many leading coefficients are 0.
        warnings: What is doubtful about the coefficients, in words.
    """

    coefficients_high_to_low: tuple[float, ...]
    method: str
    domain: tuple[float, float]
    condition: float
    lowered: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def degree(self) -> int:
        return len(self.coefficients_high_to_low) - 1

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The bare polynomial."""
        return np.polyval(self.coefficients_high_to_low, x)

    def within_domain(self, x: np.ndarray) -> np.ndarray:
        """Values with x clamped to the domain, as held-out pairs are judged: the gate clamps below, computes above."""
        return self(np.clip(x, *self.domain))

    def polynomial(self, sign_rule: str = "clamp") -> Polynomial:
        return Polynomial(self.coefficients_high_to_low, self.domain, sign_rule)


def fit(run: Any, **options: Any) -> Entry:
    """Fit a recorded run and draft its registry entry, as ``calibrate fit`` does.

    Args:
        run: A run folder, several of one protocol, a table of pairs, or a loaded ``calibrate.runs.pairs.Run``.
        options: ``degree``, ``target``, ``signal``, ``method`` of :func:`calibrate.fitting.draft.draft_entry`.
    """
    from calibrate.fitting.draft import draft_entry
    from calibrate.runs.pairs import Run, load_run

    return draft_entry(run if isinstance(run, Run) else load_run(run), **options)


def fit_polynomial(x: np.ndarray, y: np.ndarray, degree: int = 4) -> FitResult:
    """Least squares, equal to ``numpy.polyfit(x, y, degree)``.

    The degree is lowered, with a warning, where x takes too few distinct values to determine it or where the powers
    of x cancel so far that the exported numbers would no longer describe the fit (nearly constant x).
    """
    x, y, t = _prepared(x, y, degree)
    low, high = _domain(x)
    distinct = len(np.unique(x))
    growth = 1 + 2 * abs(low + high) / (high - low)  # of rounding errors, per power
    kept = min(degree, distinct - 1, int(math.log(EXPORT_LOSS / EPS) / math.log(growth)))
    while np.linalg.cond(powers.polyvander(t, kept)) > UNDETERMINED:
        kept -= 1
    exported = _to_powers_of_x(np.polyfit(t, y, kept)[::-1], low, high)
    return _result(exported, degree - kept, "polyfit", x, (low, high))


def fit_constrained(
    x: np.ndarray, y: np.ndarray, degree: int = 4, domain: tuple[float, float] | None = None
) -> FitResult:
    """Least squares over the polynomials that are non-negative and non-decreasing on the whole domain.

    Solved exactly: a least-distance problem with the constraints at a set of points (Lawson and Hanson, 1974, chapter
    23), points of violation added until none is left; the remaining rounding is lifted away, so that the exported
    numbers, evaluated in double precision, are non-negative and strictly increasing on any grid of up to 4096 points.
    It is the best fit of that shape, so its in-sample RMSE is never above that of a constant, which is one of them
    (up to 1e-6 relative plus 1e-9 of the largest y); where the plain fit has the shape already, it is that fit.

    Args:
        domain: Interval the shape is enforced on; that of x where ``None``, and never smaller.
    """
    free = fit_polynomial(x, y, degree)
    x, y, _ = _prepared(x, y, degree)
    low, high = free.domain
    if domain is not None:
        low, high = min(low, float(domain[0])), max(high, float(domain[1]))
    t = scale_to_unit(x, low, high)
    effective = degree - free.lowered
    scaled = np.polyfit(t, y, effective)[::-1]
    exported = free.coefficients_high_to_low[free.lowered :]
    if min(_slack(scaled, _margin(exported, high))) < 0:
        q, r = np.linalg.qr(powers.polyvander(t, effective))
        scaled = shaped_solution(r, q.T @ y)
        margin = _margin(_to_powers_of_x(scaled, low, high), high)
        exported = _to_powers_of_x(_lifted(scaled, margin), low, high)
    return _result(exported, free.lowered, "constrained", x, (low, high))


def has_shape(result: FitResult) -> tuple[bool, bool]:
    """Whether a fit is non-negative, and whether it is non-decreasing, on its domain (from its critical points)."""
    low, high = result.domain
    ascending = np.array(result.coefficients_high_to_low[::-1])
    slope = powers.polyder(ascending) if len(ascending) > 1 else np.zeros(1)
    noise = 16 * EPS * _size_of_terms(result.coefficients_high_to_low, high)
    candidates = _critical_points(ascending, low, high)
    slope_candidates = _critical_points(slope, low, high)
    non_negative = bool(powers.polyval(candidates, ascending).min() >= -noise)
    non_decreasing = bool(powers.polyval(slope_candidates, slope).min() * (high - low) >= -noise)
    return non_negative, non_decreasing


def _prepared(
    x: np.ndarray, y: np.ndarray, degree: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if (
        isinstance(degree, bool)
        or not isinstance(degree, int | np.integer)
        or not 1 <= degree <= MAX_DEGREE
    ):
        raise CannotFit(f"degree {degree!r}: expected a whole number from 1 to {MAX_DEGREE}")
    if x.ndim != 1 or x.shape != y.shape:
        raise CannotFit(
            f"x of shape {x.shape} and y of shape {y.shape}: expected two equally long rows of numbers"
        )
    if not len(x):
        raise CannotFit("no pairs to fit; record at least one prompt with two or more steps")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise CannotFit("non-finite x or y among the pairs; leave them out first (Run.pairs does)")
    return x, y, scale_to_unit(x, *_domain(x))


def _domain(x: np.ndarray) -> tuple[float, float]:
    """Range of x; a single value gets 1 % on either side, because a domain must not be empty."""
    low, high = float(x.min()), float(x.max())
    return (low, high) if low < high else (0.99 * low, 1.01 * high or 1.0)


def scale_to_unit(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """x in [low, high] as t in [-1, 1]."""
    return (x - (low + high) / 2) / ((high - low) / 2)


def power_matrix(degree: int, low: float, high: float) -> np.ndarray:
    """Row k holds t**k as powers of x (both ascending), shape (degree + 1, degree + 1)."""
    rows = [_to_powers_of_x(row, low, high)[::-1] for row in np.eye(degree + 1)]
    return np.array(rows)


def _to_powers_of_x(scaled: np.ndarray, low: float, high: float) -> tuple[float, ...]:
    """Coefficients of powers of t (ascending) -> of powers of x (descending), exactly but for the final rounding."""
    centre, half = (
        Fraction((low + high) / 2),
        Fraction((high - low) / 2),
    )  # as scale_to_unit rounds them
    result = [Fraction(0)]
    for value in scaled[::-1]:  # Horner's scheme on polynomials of x
        multiplied = [Fraction(0), *result]
        for power, coefficient in enumerate(result):
            multiplied[power] -= coefficient * centre
        result = [coefficient / half for coefficient in multiplied]
        result[0] += Fraction(float(value))
    return tuple(float(coefficient) for coefficient in reversed(result[: len(scaled)]))


def _size_of_terms(high_to_low: tuple[float, ...], x_max: float) -> float:
    """Sum of the absolute terms at the upper edge: what rounding errors of Horner's scheme are proportional to."""
    return float(np.polyval(np.abs(high_to_low), abs(x_max)))


def _margin(high_to_low: tuple[float, ...], x_max: float) -> float:
    """Rise between neighbours of the dense grid that double precision cannot lose."""
    return 32 * EPS * _size_of_terms(high_to_low, x_max)


def _slack(scaled: np.ndarray, margin: float) -> tuple[float, float]:
    """Value at the lower edge and smallest slope on [-1, 1], less what they must at least be."""
    if len(scaled) == 1:
        return float(scaled[0]), 0.0
    slope = powers.polyder(scaled)
    points = _critical_points(slope, -1.0, 1.0)
    value = powers.polyval(-1.0, scaled) - margin
    return float(value), float(powers.polyval(points, slope).min() - margin * DENSE_GRID / 2)


def _critical_points(ascending: np.ndarray, low: float, high: float) -> np.ndarray:
    """Edges and inner extrema of a polynomial: its minimum over the interval is at one of them."""
    derivative = (
        np.trim_zeros(powers.polyder(ascending), "b") if len(ascending) > 1 else np.zeros(0)
    )
    roots = powers.polyroots(derivative) if len(derivative) > 1 else np.zeros(0)
    return np.array([low, high, *np.clip(roots.real, low, high)])


def shaped_solution(r: np.ndarray, projected: np.ndarray) -> np.ndarray:
    """Minimise ``|r c - projected|`` over the coefficients c (ascending, of t) that have the shape.

    ``r`` is upper triangular, from a QR or Cholesky factorisation of the design.
    """
    degree = len(projected) - 1
    if degree == 0:
        return np.maximum(projected / r[0], 0.0)
    points = np.cos(np.linspace(0, np.pi, 8 * degree + 1))
    inverse = np.linalg.inv(r)
    for _ in range(50):
        rows = (
            np.vstack([powers.polyvander(np.array([-1.0]), degree), _slope_rows(points, degree)])
            @ inverse
        )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        solution = inverse @ (projected + _least_distance(rows, -rows @ projected))
        slope = powers.polyder(solution)
        candidates = _critical_points(slope, -1.0, 1.0)
        violated = candidates[powers.polyval(candidates, slope) < -1e-10 * np.abs(solution).max()]
        if not len(violated):
            break
        points = np.concatenate([points, violated])
    return solution


def _slope_rows(points: np.ndarray, degree: int) -> np.ndarray:
    rows = np.zeros((len(points), degree + 1))
    rows[:, 1:] = powers.polyvander(points, degree - 1) * np.arange(1, degree + 1)
    return rows


def _least_distance(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Shortest z with ``rows z >= bounds`` (Lawson and Hanson's LDP, solved by one NNLS)."""
    scale = max(float(np.abs(bounds).max()), EPS)
    design = np.vstack([rows.T, bounds / scale])
    target = np.zeros(len(design))
    target[-1] = 1.0
    weights, _ = nnls(design, target)
    residual = design @ weights - target
    return -scale * residual[:-1] / residual[-1]


def _lifted(scaled: np.ndarray, margin: float) -> np.ndarray:
    """The polynomial raised by the little that rounding left below the constraints."""
    lifted = np.array(scaled)
    value, slope = _slack(lifted, margin)
    lifted[0] += max(-value, 0.0)
    if slope < 0:
        lifted[:2] -= slope  # a multiple of t + 1 leaves the value at -1 as it is
    return lifted


def _result(
    coefficients: tuple[float, ...],
    lowered: int,
    method: str,
    x: np.ndarray,
    domain: tuple[float, float],
) -> FitResult:
    design = np.vander(x, len(coefficients))
    condition = float(np.linalg.cond(design / np.maximum(np.linalg.norm(design, axis=0), EPS)))
    result = FitResult(
        (0.0,) * lowered + tuple(map(float, coefficients)), method, domain, condition, lowered
    )
    return replace(result, warnings=tuple(_doubts(result, x)))


def _doubts(result: FitResult, x: np.ndarray) -> Iterator[str]:
    """What is doubtful about the coefficients, one sentence each."""
    distinct, degree = len(np.unique(x)), result.degree
    if result.lowered:
        spread = (
            f"known at too few places ({distinct})" if distinct <= 2 * degree else "nearly constant"
        )
        yield (
            f"x is {'constant' if distinct == 1 else spread} ({x.min():.6g} to {x.max():.6g}): "
            f"degree {degree - result.lowered} instead of {degree}"
        )
    if result.condition > CONDITION_LIMIT:
        yield f"coefficients are ill-conditioned (condition {result.condition:.1e}): compare curves, not coefficients"
    largest = max(map(abs, result.coefficients_high_to_low))
    if largest > HUGE_COEFFICIENT:
        yield f"huge coefficient ({largest:.2g}): the fit says nothing outside its domain"
    terms = _size_of_terms(result.coefficients_high_to_low, result.domain[1])
    cancellation = terms / max(float(np.abs(result(x)).max()), EPS)
    if cancellation > CANCELLATION_LIMIT:
        digits = math.ceil(math.log10(cancellation)) + 3
        yield f"terms cancel to one part in {cancellation:.1g}: keep at least {digits} digits of the coefficients"
