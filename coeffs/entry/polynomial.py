"""The rescale polynomial of TeaCache: relative change of the signal -> predicted one of the target.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108, section 3.3. Coefficients are always highest power first, the order of
``numpy.polyfit``.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from coeffs.errors import EntryError, InvalidPolynomial

SIGN_RULES = ("clamp", "signed", "abs")
# Published sets have degree 1 to 5; one more is room for a refit.
MAX_DEGREE = 6
# Inside the domain of every shipped set; a file stores the value here to prove the list's order.
CONTROL_X = 0.1
# Stands for a domain that was never published: relative changes seldom reach 0.5.
UNKNOWN_DOMAIN = (0.0, 0.5)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Polynomial:
    """A polynomial with the domain it was fitted on and the rule for negative predictions.

    Args:
        coefficients_high_to_low: One to seven finite numbers, highest power first.
        domain: ``(x_min, x_max)`` of the fitted pairs; ``None`` where it was never published.
        sign_rule: What a negative prediction means: ``clamp`` (0, ours), ``signed`` (kept, as
            ali-vilab and SGLang do), ``abs`` (absolute value, as vLLM-Omni and TensorRT-LLM do).

    Raises:
        InvalidPolynomial: For a wrong number of coefficients, a non-finite number, an empty domain,
            an unknown rule.
    """

    coefficients_high_to_low: tuple[float, ...]
    domain: Interval | None = None
    sign_rule: str = "clamp"

    def __post_init__(self) -> None:
        numbers = _finite_numbers(self.coefficients_high_to_low)
        object.__setattr__(self, "coefficients_high_to_low", numbers)
        if self.sign_rule not in SIGN_RULES:
            known = ", ".join(SIGN_RULES)
            raise InvalidPolynomial(f"sign rule {self.sign_rule!r}: expected one of {known}")
        if self.domain is None:
            return
        domain = tuple(float(edge) for edge in self.domain)
        finite = all(map(math.isfinite, domain))
        if len(domain) != 2 or not finite or not 0 <= domain[0] < domain[1]:
            expected = "expected [x_min, x_max] with 0 <= x_min < x_max"
            raise InvalidPolynomial(f"domain {self.domain!r}: {expected}")
        object.__setattr__(self, "domain", domain)

    @property
    def degree(self) -> int:
        return len(self.coefficients_high_to_low) - 1

    def raw(self, x: float) -> float:
        """Value of the bare polynomial at ``x`` (Horner's scheme), no clamping."""
        value = 0.0
        for coefficient in self.coefficients_high_to_low:
            value = value * x + coefficient
        return value

    def predict(self, x: float) -> float:
        """Predicted change: x is clamped to the domain from below, then the sign rule applies."""
        if self.domain is not None:
            x = max(x, self.domain[0])
        value = self.raw(x)
        if self.sign_rule == "clamp":
            return max(value, 0.0)
        return abs(value) if self.sign_rule == "abs" else value

    def above_domain(self, x: float) -> bool:
        """Whether ``x`` is above every fitted pair, so that no prediction may be made from it."""
        return self.domain is not None and x > self.domain[1]

    def slope(self) -> "Polynomial":
        """The derivative."""
        powers = range(self.degree, 0, -1)
        products = zip(self.coefficients_high_to_low, powers, strict=False)
        return Polynomial(tuple(value * power for value, power in products) or (0.0,))


def _finite_numbers(values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        problem = f"coefficients {values!r}: expected a list of numbers, highest power first"
        raise InvalidPolynomial(problem) from None
    if not 1 <= len(numbers) <= MAX_DEGREE + 1:
        expected = f"expected 1 to {MAX_DEGREE + 1}, highest power first"
        raise InvalidPolynomial(f"{len(numbers)} coefficients: {expected}")
    if not all(map(math.isfinite, numbers)):
        problem = f"coefficients {list(numbers)}: expected finite numbers; fit or copy them again"
        raise InvalidPolynomial(problem)
    return numbers


# --- shape on the domain --------------------------------------------------------------------------


def negative_ranges(polynomial: Polynomial, domain: Interval) -> list[Interval]:
    """Intervals of the domain in which the bare polynomial is negative.

    Rounding at a double root of a constrained fit does not count as negative.
    """
    low, high = domain
    edges = [low, *_turns(polynomial, low, high), *_roots(polynomial, low, high), high]
    edges.sort()
    largest = max(abs(polynomial.raw(x)) for x in edges)
    floor = -1e-9 * max(1e-12, largest)
    ranges: list[Interval] = []
    for left, right in itertools.pairwise(edges):
        if polynomial.raw((left + right) / 2) >= floor:
            continue
        if ranges and ranges[-1][1] == left:
            left = ranges.pop()[0]
        ranges.append((left, right))
    return ranges


def falling_ranges(polynomial: Polynomial, domain: Interval) -> list[Interval]:
    """Intervals in which a larger change of the signal predicts a smaller change of the target."""
    return negative_ranges(polynomial.slope(), domain)


def _turns(polynomial: Polynomial, low: float, high: float) -> list[float]:
    return _roots(polynomial.slope(), low, high) if polynomial.degree else []


def _roots(polynomial: Polynomial, low: float, high: float) -> list[float]:
    """Where the sign changes; between two turning points it does so at most once."""
    edges = [low, *_turns(polynomial, low, high), high]
    roots = []
    for left, right in itertools.pairwise(edges):
        rises = polynomial.raw(left) < 0
        if rises == (polynomial.raw(right) < 0):
            continue
        for _ in range(60):  # halves any interval down to the last bit of its edges
            middle = (left + right) / 2
            if (polynomial.raw(middle) < 0) == rises:
                left = middle
            else:
                right = middle
        roots.append((left + right) / 2)
    return roots


# --- order of the list ----------------------------------------------------------------------------


def check_order(coefficients: tuple[float, ...], domain: Interval | None = None) -> None:
    """Refuse a list that is plausible only when read lowest power first.

    Relative changes between neighbouring steps lie well below 3. A list is refused when its
    polynomial is outside -3..3 on the whole domain and the reversed list comes inside it there.

    Raises:
        EntryError: For such a list.
    """
    low, high = domain or UNKNOWN_DOMAIN
    grid = [low + (high - low) * step / 64 for step in range(65)]

    def plausible(values: tuple[float, ...]) -> bool:
        raw = Polynomial(values).raw
        return any(abs(raw(x)) <= 3 for x in grid)

    if not plausible(coefficients) and plausible(coefficients[::-1]):
        problem = (
            f"predicts a change above 3 everywhere in {low:g} to {high:g}, but not when reversed: "
            "the list looks lowest power first; write it highest power first (numpy.polyfit's order)"
        )
        raise EntryError(problem, ("coefficients_high_to_low",))


def check_control_value(coefficients: tuple[float, ...], stored: float) -> None:
    """Refuse a list that does not give the stored value at x = 0.1.

    Raises:
        EntryError: For such a list, saying whether it is in reversed order.
    """

    def gives_stored(values: tuple[float, ...]) -> bool:
        # Rounding grows with the terms, which may cancel: compare with the sum of their sizes.
        size = Polynomial(tuple(map(abs, values))).raw(CONTROL_X)
        return abs(Polynomial(values).raw(CONTROL_X) - stored) <= 1e-9 * size

    if gives_stored(coefficients):
        return
    reversed_order = gives_stored(coefficients[::-1])
    why = "they are in reversed order" if reversed_order else "one of the two was changed"
    value = Polynomial(coefficients).raw(CONTROL_X)
    problem = f"{stored!r}, but the coefficients give {value!r}: {why}; restore them"
    raise EntryError(problem, ("value_at_0p1",))
