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
DENSE_GRID = (
    4096  # points between which a constrained fit must rise visibly in double precision
)
# Condition in t above which the highest power is left out; evenly spread x has less than 100.
UNDETERMINED = 1e5
EXPORT_LOSS = 1e-8  # largest relative rounding error of the powers of x
CONDITION_LIMIT = 1e5  # up to here numpy.polyfit on the bare x agrees to 1e-9
CANCELLATION_LIMIT = 1e4  # float32 keeps three digits of the sum
HUGE_COEFFICIENT = 1e6  # a step of 1e-6 outside the domain changes the prediction by 1


class CannotFit(CalibrateError, ValueError):
    """Pairs or a degree that no polynomial can be fitted with."""


@dataclass(frozen=True, kw_only=True)
class FitResult(Polynomial):
    """A fitted polynomial; leading coefficients are 0 where the data determine a lower degree only.

    Attributes:
        domain: Smallest and largest fitted x.
        method: ``polyfit`` or ``constrained``.
        condition: Condition number of the problem as ``numpy.polyfit`` on the bare x sees it.
        warnings: What is doubtful about the coefficients, in words.
    """

    domain: tuple[float, float]
    method: str
    condition: float
    warnings: tuple[str, ...]

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """The bare polynomial."""
        return np.polyval(self.coefficients_high_to_low, np.asarray(x, float))

    def within_domain(self, x: ArrayLike) -> np.ndarray:
        """Values with x clamped to the domain: the gate clamps below it and computes above it."""
        return self(np.clip(np.asarray(x, float), *self.domain))


def fit_polynomial(
    x: ArrayLike, y: ArrayLike, degree: int = 4, method: str = "polyfit"
) -> FitResult:
    """Least squares, equal to ``numpy.polyfit(x, y, degree)``; or ``constrained``.

    The latter is least squares over the polynomials that are non-negative and non-decreasing on their domain. The
    exported numbers, evaluated in double precision, are so on any grid of up to 4096 points. The in-sample RMSE is
    never above that of a constant, which has the shape; where the plain fit has the shape already, it is that fit.

    The degree is lowered, with a warning, where x takes too few distinct values to determine it or where the powers
    of x cancel so far that the exported numbers would no longer describe the fit (nearly constant x).
    """
    x, y = _checked(x, y, degree)
    curve = _plain(x, y, degree)
    if method == "constrained" and min(_slack(curve)) < 0:
        t = scale_to_unit(x, curve.domain)
        q, r = np.linalg.qr(powers.polyvander(t, curve.degree()))
        shaped = shaped_solution(r, q.T @ y)
        curve = _lifted(Curve(shaped, domain=curve.domain))
    coefficients = tuple(powers_of_x(curve, degree).tolist())
    design = np.vander(x, curve.degree() + 1)
    sizes = np.linalg.norm(design, axis=0)
    condition = float(np.linalg.cond(design / np.maximum(sizes, EPS)))
    lowered = degree - curve.degree()
    low, high = curve.domain.tolist()
    return FitResult(
        coefficients,
        domain=(low, high),
        method=method,
        condition=condition,
        warnings=tuple(_doubts(np.array(coefficients), x, lowered, condition)),
    )


def scale_to_unit(x: np.ndarray, domain: tuple[float, float] | np.ndarray) -> np.ndarray:
    """x in its domain as t in [-1, 1], as numpy's polynomials map it."""
    return np.polynomial.polyutils.mapdomain(x, domain, [-1, 1])


def powers_of_x(curve: Curve, degree: int) -> np.ndarray:
    """Coefficients of a curve on a domain as those of powers of x up to a degree, highest first."""
    ascending = curve.convert().coef
    return np.pad(ascending, (0, degree + 1 - len(ascending)))[::-1]


def shaped_solution(r: np.ndarray, projected: np.ndarray) -> np.ndarray:
    """Minimise ``|r c - projected|`` over the coefficients c (ascending, of t) that have the shape.

    ``r`` is upper triangular, from a QR or Cholesky factorisation of the design. The constraints are homogeneous, so
    the solution is the projection on a cone, and what NNLS finds is the projection on its polar cone.
    """
    terms = np.eye(len(projected))
    value_at_left_edge = powers.polyval(-1.0, terms)
    slopes = powers.polyval(SHAPE_POINTS, powers.polyder(terms))
    rows = np.vstack([value_at_left_edge, slopes.T]) @ np.linalg.inv(r)
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(sizes > 0, sizes, 1)  # the slopes of a constant are 0
    weights, _ = nnls(-rows.T, projected)
    return np.linalg.solve(r, projected + rows.T @ weights)


def _checked(x: ArrayLike, y: ArrayLike, degree: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if degree not in range(1, MAX_DEGREE + 1):
        raise CannotFit(f"degree {degree!r}: expected a whole number from 1 to {MAX_DEGREE}")
    if x.ndim != 1 or x.shape != y.shape:
        raise CannotFit(
            f"x of shape {x.shape} and y of shape {y.shape}: expected two equally long rows of numbers"
        )
    if not len(x):
        raise CannotFit("no pairs to fit; record at least one prompt with two or more steps")
    if not np.isfinite([x, y]).all():
        raise CannotFit(
            "non-finite x or y among the pairs; leave them out first (Run.pairs does)"
        )
    return x, y


def _plain(x: np.ndarray, y: np.ndarray, degree: int) -> Curve:
    """The least-squares curve of the highest degree that x determines."""
    low, high = float(x.min()), float(x.max())
    if low == high:  # a domain must not be empty: 1 % on either side
        low, high = 0.99 * low, 1.01 * high or 1.0
    growth = 1 + 2 * abs(low + high) / (
        high - low
    )  # of rounding errors in powers of x, per power
    exportable = int(math.log(EXPORT_LOSS / EPS) / math.log(growth))
    t = scale_to_unit(x, (low, high))
    kept = min(degree, len(np.unique(x)) - 1, exportable)
    while np.linalg.cond(powers.polyvander(t, kept)) > UNDETERMINED:
        kept -= 1
    return Curve.fit(x, y, kept, domain=[low, high])


def _slack(curve: Curve) -> tuple[float, float]:
    """Value at the lower edge and smallest slope over t, less the rounding that must not hide them."""
    # Horner's rounding errors are proportional to the sum of the absolute terms at the upper edge.
    size = powers.polyval(curve.domain[1], np.abs(curve.convert().coef))
    margin = 32 * EPS * size if curve.degree() else 0.0
    slope = Curve(curve.coef).deriv()
    extrema = slope.trim().deriv().trim().roots().real
    smallest = slope(np.clip([-1, 1, *extrema], -1, 1)).min()
    return powers.polyval(-1.0, curve.coef) - margin, smallest - margin * DENSE_GRID / 2


def _lifted(curve: Curve) -> Curve:
    """The curve raised by what lies below the constraints between the points, and by rounding."""
    value, slope = _slack(curve)
    constant = Curve([max(-value, 0.0)], domain=curve.domain)
    rising = Curve([max(-slope, 0.0)] * min(len(curve.coef), 2), domain=curve.domain)
    return (
        curve + constant + rising
    )  # a multiple of t + 1, which leaves the value at -1 as it is


def _doubts(
    coefficients: np.ndarray, x: np.ndarray, lowered: int, condition: float
) -> Iterator[str]:
    """What is doubtful about the coefficients, one sentence each."""
    distinct, degree = len(np.unique(x)), len(coefficients) - 1
    if lowered:
        spread = "nearly constant"
        if distinct <= 2 * degree:
            spread = "constant" if distinct == 1 else f"known at too few places ({distinct})"
        yield (
            f"x is {spread} ({x.min():.6g} to {x.max():.6g}): "
            f"degree {degree - lowered} instead of {degree}"
        )
    if condition > CONDITION_LIMIT:
        yield (
            f"coefficients are ill-conditioned (condition {condition:.1e}): "
            "compare curves, not coefficients"
        )
    terms = np.abs(coefficients)
    if terms.max() > HUGE_COEFFICIENT:
        yield f"huge coefficient ({terms.max():.2g}): the fit says nothing outside its domain"
    largest = np.abs(np.polyval(coefficients, x)).max()
    cancellation = np.polyval(terms, x.max()) / max(largest, EPS)
    if cancellation > CANCELLATION_LIMIT:
        digits = math.ceil(math.log10(cancellation)) + 3
        yield (
            f"terms cancel to one part in {cancellation:.1g}: "
            f"keep at least {digits} digits of the coefficients"
        )
