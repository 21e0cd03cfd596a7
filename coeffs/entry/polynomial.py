"""The rescale polynomial of TeaCache: relative L1 change of the signal -> predicted relative L1 change of the target.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108,
section 3.3. Coefficients are always highest power first, the order of ``numpy.polyfit`` and ``numpy.poly1d``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coeffs.errors import InvalidPolynomial

SIGN_RULES = ("clamp", "signed", "abs")
MAX_DEGREE = 6


@dataclass(frozen=True)
class Polynomial:
    """A polynomial with the domain it was fitted on and the rule for negative predictions.

    Args:
        coefficients_high_to_low: One to seven finite numbers, highest power first.
        domain: ``(x_min, x_max)`` of the fitted pairs, dimensionless; ``None`` where it was never published.
        sign_rule: What a negative prediction means: ``clamp`` (0, ours), ``signed`` (kept, as ali-vilab and SGLang
            do), ``abs`` (absolute value, as vLLM-Omni and TensorRT-LLM do).

    Raises:
        InvalidPolynomial: For a wrong number of coefficients, a non-finite number, an empty domain, an unknown rule.
    """

    coefficients_high_to_low: tuple[float, ...]
    domain: tuple[float, float] | None = None
    sign_rule: str = "clamp"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "coefficients_high_to_low", _finite_numbers(self.coefficients_high_to_low)
        )
        if self.sign_rule not in SIGN_RULES:
            raise InvalidPolynomial(
                f"sign rule {self.sign_rule!r}: expected one of {', '.join(SIGN_RULES)}"
            )
        if self.domain is not None:
            domain = tuple(float(edge) for edge in self.domain)
            if (
                len(domain) != 2
                or not all(map(math.isfinite, domain))
                or not 0 <= domain[0] < domain[1]
            ):
                raise InvalidPolynomial(
                    f"domain {self.domain!r}: expected [x_min, x_max] with 0 <= x_min < x_max"
                )
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
        """Predicted change at ``x``: x is clamped to the domain from below, then the sign rule is applied."""
        if self.domain is not None:
            x = max(x, self.domain[0])
        value = self.raw(x)
        if self.sign_rule == "clamp":
            return max(value, 0.0)
        return abs(value) if self.sign_rule == "abs" else value

    def above_domain(self, x: float) -> bool:
        """Whether ``x`` lies above everything that was fitted, so that no prediction may be made from it."""
        return self.domain is not None and x > self.domain[1]


def _finite_numbers(values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise InvalidPolynomial(
            f"coefficients {values!r}: expected a list of numbers, highest power first"
        ) from None
    if not 1 <= len(numbers) <= MAX_DEGREE + 1:
        raise InvalidPolynomial(
            f"{len(numbers)} coefficients: expected 1 to {MAX_DEGREE + 1}, highest power first"
        )
    if not all(map(math.isfinite, numbers)):
        raise InvalidPolynomial(
            f"coefficients {list(numbers)}: expected finite numbers; fit or copy them again"
        )
    return numbers
