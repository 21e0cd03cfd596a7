"""Fitting the rescale polynomial: plain least squares, and the same degree constrained to a usable shape.

Both fits work on t in [-1, 1], the domain scaled to unit size, where powers up to 6 are well conditioned, and are
then written in powers of x. Where ``numpy.polyfit`` on the bare x is well conditioned itself (condition below 1e5,
degree 4 in practice), it gives the same coefficients to 1e-9 relative.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial as Curve
from numpy.polynomial import polynomial as powers
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from calibrate.errors import CalibrateError
from coeffs.entry.polynomial import MAX_DEGREE, Polynomial

EPS = float(np.finfo(float).eps)
# A slope of degree 5 that is non-negative at 200 Chebyshev points falls between them by less than
# 1e-3 of its largest value (Bernstein's inequality); what is left is lifted away.
SHAPE_POINTS = np.cos(np.linspace(0, np.pi, 200))
DENSE_GRID = 4096  # points between which a constrained fit must rise visibly in double precision
# Condition in t above which the highest power is left out; evenly spread x has less than 100.
UNDETERMINED = 1e5
EXPORT_LOSS = 1e-8  # largest relative rounding error of the powers of x
CONDITION_LIMIT = 1e5  # up to here numpy.polyfit on the bare x agrees to 1e-9
CANCELLATION_LIMIT = 1e4  # float32 keeps three digits of the sum
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

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """The bare polynomial."""
        return np.polyval(self.coefficients_high_to_low, np.asarray(x, float))

    def within_domain(self, x: ArrayLike) -> np.ndarray:
        """Values with x clamped to the domain: the gate clamps below it and computes above it."""
        return self(np.clip(x, *self.domain))

    def polynomial(self, sign_rule: str = "clamp") -> Polynomial:
        return Polynomial(self.coefficients_high_to_low, self.domain, sign_rule)


def fit_polynomial(x: ArrayLike, y: ArrayLike, degree: int = 4) -> FitResult:
    """Least squares, equal to ``numpy.polyfit(x, y, degree)``.

    The degree is lowered, with a warning, where x takes too few distinct values to determine it or where the powers
    of x cancel so far that the exported numbers would no longer describe the fit (nearly constant x).
    """
    x, y = _checked(x, y, degree)
    return _result(_plain(x, y, degree), degree, "polyfit", x)


def fit_constrained(x: ArrayLike, y: ArrayLike, degree: int = 4) -> FitResult:
    """Least squares over the polynomials that are non-negative and non-decreasing on their domain.

    The exported numbers, evaluated in double precision, are non-negative and increasing on any grid of up to 4096
    points. The in-sample RMSE is never above that of a constant, which has the shape; where the plain fit has the
    shape already, it is that fit.
    """
    x, y = _checked(x, y, degree)
    curve = _plain(x, y, degree)
    if min(_slack(curve)) < 0:
        q, r = np.linalg.qr(powers.polyvander(scale_to_unit(x, curve.domain), curve.degree()))
        curve = _lifted(Curve(shaped_solution(r, q.T @ y), domain=curve.domain))
    return _result(curve, degree, "constrained", x)


def has_shape(result: FitResult) -> tuple[bool, bool]:
    """Whether a fit is non-negative, and whether it is non-decreasing, on its domain."""
    low, high = result.domain
    curve = Curve(result.coefficients_high_to_low[::-1])
    noise = 16 * EPS * _size_of_terms(result.coefficients_high_to_low, high)
    non_negative = _minimum(curve, low, high) >= -noise
    non_decreasing = _minimum(curve.deriv(), low, high) * (high - low) >= -noise
    return non_negative, non_decreasing


def scale_to_unit(x: np.ndarray, domain: tuple[float, float] | np.ndarray) -> np.ndarray:
    """x in its domain as t in [-1, 1], as numpy's polynomials map it."""
    return np.polynomial.polyutils.mapdomain(x, domain, [-1, 1])


def powers_of_x(curve: Curve) -> np.ndarray:
    """Coefficients of a curve on a domain as those of powers of x, highest first."""
    ascending = curve.convert().coef
    return np.pad(ascending, (0, len(curve.coef) - len(ascending)))[::-1]


def shaped_solution(r: np.ndarray, projected: np.ndarray) -> np.ndarray:
    """Minimise ``|r c - projected|`` over the coefficients c (ascending, of t) that have the shape.

    ``r`` is upper triangular, from a QR or Cholesky factorisation of the design. The constraints are homogeneous, so
    the solution is the projection on a cone, and what NNLS finds is the projection on its polar cone.
    """
    degree = len(projected) - 1
    value_at_left_edge = powers.polyvander(np.array([-1.0]), degree)
    slopes = np.zeros((len(SHAPE_POINTS), degree + 1))
    slopes[:, 1:] = powers.polyvander(SHAPE_POINTS, max(degree - 1, 0))[:, :degree]
    slopes *= np.arange(degree + 1)
    rows = np.vstack([value_at_left_edge, slopes[: None if degree else 0]]) @ np.linalg.inv(r)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights, _ = nnls(-rows.T, projected)
    return np.linalg.solve(r, projected + rows.T @ weights)


def _checked(x: ArrayLike, y: ArrayLike, degree: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    whole = isinstance(degree, int | np.integer) and not isinstance(degree, bool)
    if not whole or not 1 <= degree <= MAX_DEGREE:
        raise CannotFit(f"degree {degree!r}: expected a whole number from 1 to {MAX_DEGREE}")
    if x.ndim != 1 or x.shape != y.shape:
        raise CannotFit(
            f"x of shape {x.shape} and y of shape {y.shape}: expected two equally long rows of numbers"
        )
    if not len(x):
        raise CannotFit("no pairs to fit; record at least one prompt with two or more steps")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise CannotFit("non-finite x or y among the pairs; leave them out first (Run.pairs does)")
    return x, y


def _domain(x: np.ndarray) -> tuple[float, float]:
    """Range of x; a single value gets 1 % on either side, because a domain must not be empty."""
    low, high = float(x.min()), float(x.max())
    return (low, high) if low < high else (0.99 * low, 1.01 * high or 1.0)


def _plain(x: np.ndarray, y: np.ndarray, degree: int) -> Curve:
    """The least-squares curve of the highest degree that x determines."""
    low, high = _domain(x)
    growth = 1 + 2 * abs(low + high) / (high - low)  # of rounding errors in powers of x, per power
    exportable = int(math.log(EXPORT_LOSS / EPS) / math.log(growth))
    kept = min(degree, len(np.unique(x)) - 1, exportable)
    while np.linalg.cond(powers.polyvander(scale_to_unit(x, (low, high)), kept)) > UNDETERMINED:
        kept -= 1
    return Curve.fit(x, y, kept, domain=[low, high])


def _size_of_terms(high_to_low: ArrayLike, x_max: float) -> float:
    """Sum of the absolute terms at the upper edge, which Horner's rounding errors are proportional to."""
    return float(np.polyval(np.abs(high_to_low), abs(x_max)))


def _minimum(curve: Curve, low: float, high: float) -> float:
    """Smallest value between the edges, which lies at one of them or at a root of the derivative."""
    extrema = curve.trim().deriv().trim().roots().real
    return float(curve(np.array([low, high, *np.clip(extrema, low, high)])).min())


def _slack(curve: Curve) -> tuple[float, float]:
    """Value at the lower edge and smallest slope over t, less the rounding that must not hide them."""
    margin = 32 * EPS * _size_of_terms(powers_of_x(curve), curve.domain[1])
    scaled = Curve(curve.coef)
    if curve.degree() == 0:
        return float(scaled.coef[0]), 0.0
    return float(scaled(-1.0) - margin), _minimum(scaled.deriv(), -1, 1) - margin * DENSE_GRID / 2


def _lifted(curve: Curve) -> Curve:
    """The curve raised by what lies below the constraints between the points, and by rounding."""
    value, slope = _slack(curve)
    lifted = np.array(curve.coef, float)
    lifted[0] += max(-value, 0.0)
    if slope < 0:
        lifted[:2] += -slope  # a multiple of t + 1 leaves the value at -1 as it is
    return Curve(lifted, domain=curve.domain)


def _result(curve: Curve, degree: int, method: str, x: np.ndarray) -> FitResult:
    lowered = degree - curve.degree()
    high_to_low = np.pad(powers_of_x(curve), (lowered, 0))
    coefficients = tuple(float(value) for value in high_to_low)
    domain = float(curve.domain[0]), float(curve.domain[1])
    design = np.vander(x, curve.degree() + 1)
    columns = np.maximum(np.linalg.norm(design, axis=0), EPS)
    condition = float(np.linalg.cond(design / columns))
    plain = FitResult(coefficients, method, domain, condition, lowered)
    return FitResult(coefficients, method, domain, condition, lowered, tuple(_doubts(plain, x)))


def _doubts(result: FitResult, x: np.ndarray) -> Iterator[str]:
    """What is doubtful about the coefficients, one sentence each."""
    distinct, degree = len(np.unique(x)), result.degree
    if result.lowered:
        spread = "nearly constant"
        if distinct <= 2 * degree:
            spread = "constant" if distinct == 1 else f"known at too few places ({distinct})"
        yield (
            f"x is {spread} ({x.min():.6g} to {x.max():.6g}): "
            f"degree {degree - result.lowered} instead of {degree}"
        )
    if result.condition > CONDITION_LIMIT:
        yield (
            f"coefficients are ill-conditioned (condition {result.condition:.1e}): "
            "compare curves, not coefficients"
        )
    largest = max(map(abs, result.coefficients_high_to_low))
    if largest > HUGE_COEFFICIENT:
        yield f"huge coefficient ({largest:.2g}): the fit says nothing outside its domain"
    terms = _size_of_terms(result.coefficients_high_to_low, result.domain[1])
    cancellation = terms / max(float(np.abs(result(x)).max()), EPS)
    if cancellation > CANCELLATION_LIMIT:
        digits = math.ceil(math.log10(cancellation)) + 3
        yield (
            f"terms cancel to one part in {cancellation:.1g}: "
            f"keep at least {digits} digits of the coefficients"
        )
