"""The rescale polynomial of TeaCache: relative change of the signal -> predicted one of the target.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108, section 3.3. Coefficients are always highest power first, the order of
``numpy.polyfit``.
"""

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import mul

from coeffs.entry.fields import Numbers
from coeffs.errors import EntryError

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
        EntryError: For a wrong number of coefficients, a non-finite number, an empty domain, an
            unknown rule.
    """

    coefficients_high_to_low: Numbers
    domain: Interval | None = None
    sign_rule: str = "clamp"

    def __post_init__(self) -> None:
        try:
            numbers = tuple(map(float, self.coefficients_high_to_low))
            low, high = map(float, UNKNOWN_DOMAIN if self.domain is None else self.domain)
        except (TypeError, ValueError):
            raise EntryError(
                "coefficients and domain: expected lists of numbers, the domain two"
            ) from None
        if not 1 <= len(numbers) <= MAX_DEGREE + 1 or not all(map(math.isfinite, numbers)):
            raise EntryError(
                f"{len(numbers)} coefficients: expected 1 to {MAX_DEGREE + 1} finite numbers, "
                "highest power first"
            )
        if not 0 <= low < high < math.inf:
            raise EntryError(
                f"domain {(low, high)}: expected [x_min, x_max] with 0 <= x_min < x_max"
            )
        if self.sign_rule not in SIGN_RULES:
            raise EntryError(
                f"sign rule {self.sign_rule!r}: expected one of {', '.join(SIGN_RULES)}"
            )
        object.__setattr__(self, "coefficients_high_to_low", numbers)
        if self.domain is not None:
            object.__setattr__(self, "domain", (low, high))

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
        return Polynomial(tuple(map(mul, self.coefficients_high_to_low, powers)) or (0.0,))


# --- shape on the domain --------------------------------------------------------------------------


def negative_ranges(polynomial: Polynomial, domain: Interval) -> list[Interval]:
    """Intervals of the domain in which the bare polynomial is negative.

    Rounding at a double root of a constrained fit does not count as negative.
    """
    edges = sorted(
        [*domain, *_roots(polynomial.slope(), domain), *_roots(polynomial, domain)]
    )
    floor = -1e-9 * max(1e-12, *(abs(polynomial.raw(x)) for x in edges))

    def negative(piece: Interval) -> bool:
        return polynomial.raw(sum(piece) / 2) < floor

    runs = [list(pieces) for below, pieces in groupby(pairwise(edges), negative) if below]
    return [(run[0][0], run[-1][1]) for run in runs]


def falling_ranges(polynomial: Polynomial, domain: Interval) -> list[Interval]:
    """Intervals in which a larger change of the signal predicts a smaller change of the target."""
    return negative_ranges(polynomial.slope(), domain)


def _roots(polynomial: Polynomial, domain: Interval) -> list[float]:
    """Where the sign changes; between two turning points it does so at most once."""
    if not polynomial.degree:
        return []
    roots = []
    for left, right in pairwise([domain[0], *_roots(polynomial.slope(), domain), domain[1]]):
        rises = polynomial.raw(left) < 0
        if rises == (polynomial.raw(right) < 0):
            continue
        for _ in range(60):  # halves any interval down to the last bit of its edges
            middle = (left + right) / 2
            if (polynomial.raw(middle) < 0) == rises:
                left = middle
            else:
                right = middle
        roots.append(right)
    return roots


# --- order of the list ----------------------------------------------------------------------------


def check_order(coefficients: Numbers, domain: Interval | None = None) -> None:
    """Refuse a list that is plausible only when read lowest power first.

    Relative changes between neighbouring steps lie well below 3. A list is refused when its
    polynomial is outside -3..3 on the whole domain and the reversed list comes inside it there.

    Raises:
        EntryError: For such a list.
    """
    low, high = domain or UNKNOWN_DOMAIN
    grid = [low + (high - low) * step / 64 for step in range(65)]

    def plausible(values: Numbers) -> bool:
        return any(abs(value) <= 3 for value in map(Polynomial(values).raw, grid))

    if not plausible(coefficients) and plausible(coefficients[::-1]):
        raise EntryError(
            f"predicts a change above 3 everywhere in {low:g} to {high:g}, but not when reversed: "
            "the list looks lowest power first; write it highest power first (numpy.polyfit's order)",
            "coefficients_high_to_low",
        )


def check_control_value(coefficients: Numbers, stored: float) -> None:
    """Refuse a list that does not give the stored value at x = 0.1.

    Raises:
        EntryError: For such a list, saying whether it is in reversed order.
    """

    def gives_stored(values: Numbers) -> bool:
        # Rounding grows with the terms, which may cancel: compare with the sum of their sizes.
        size = Polynomial(tuple(map(abs, values))).raw(CONTROL_X)
        return abs(Polynomial(values).raw(CONTROL_X) - stored) <= 1e-9 * size

    if not gives_stored(coefficients):
        why = "one of the two was changed"
        if gives_stored(coefficients[::-1]):
            why = "they are in reversed order"
        value = Polynomial(coefficients).raw(CONTROL_X)
        raise EntryError(
            f"{stored!r}, but the coefficients give {value!r}: {why}; restore them",
            "value_at_0p1",
        )
