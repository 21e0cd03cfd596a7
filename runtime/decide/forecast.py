"""What a skipped step reuses: the last residual as it is, or a forecast from the last few. Pure: weights only.

A forecast is linear in the residuals of the last computed steps; its weights depend on the noise levels alone, so
that they are known beforehand on the host. Extrapolating outputs linearly in sigma under Euler's method is the
Adams-Bashforth method of second order on a non-uniform grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.errors import InvalidSetting

ORDERS = {"reuse": 0, "linear": 1, "quadratic": 2}


@dataclass(frozen=True)
class Forecast:
    """How the residual of a skipped step follows from those of computed steps.

    Args:
        kind: ``reuse``, ``linear`` or ``quadratic`` in sigma (in the step where sigmas are unknown), or ``fitted``.
        weights: For ``fitted``: step -> weights of the last computed residuals, the newest first. A step that is
            missing is reused.
        schedule: For ``fitted``: the schedule (``"CCSC..."``) that the weights were made for. Where other steps than
            its own were computed last, the newest residual is reused as it is.
    """

    kind: str = "reuse"
    weights: Mapping[int, Sequence[float]] = field(default_factory=dict)
    schedule: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*ORDERS, "fitted"):
            raise InvalidSetting(
                f"forecast {self.kind!r}: expected one of {', '.join(ORDERS)}, fitted"
            )
        if (self.kind == "fitted") != bool(self.weights):
            raise InvalidSetting(
                f"forecast {self.kind!r} with {len(self.weights)} weights: only fitted has them, and must"
            )
        if self.schedule is not None and self.kind != "fitted":
            raise InvalidSetting(
                f"forecast {self.kind!r} with a schedule: it follows any; only fitted has one"
            )

    @property
    def kept(self) -> int:
        """How many residuals have to be kept."""
        if self.kind == "fitted":
            return max(len(row) for row in self.weights.values())
        return ORDERS[self.kind] + 1

    @property
    def asks_levels(self) -> bool:
        """Whether weights follow from the noise levels."""
        return ORDERS.get(self.kind, 0) > 0

    def at(
        self, step: int, level: float, anchors: Sequence[float], steps: Sequence[int] = ()
    ) -> list[float]:
        """Weights of the kept residuals, newest first, for ``step`` at noise level ``level``.

        Args:
            anchors: Noise levels of the kept residuals, newest first; fewer than :attr:`kept` lower the order.
            steps: The steps that they were computed at; a forecast with a :attr:`schedule` compares them with it.

        Example:
            >>> Forecast("linear").at(2, level=0.4, anchors=[0.6, 0.8])
            [2.0, -1.0]
        """
        if self.kind == "fitted":
            row = list(self.weights.get(step, (1.0,)))
            usable = len(row) <= len(anchors) and self._planned(step, steps[: len(row)])
            return row if usable else [1.0] + [0.0] * (len(anchors) - 1)
        return extrapolation(level, list(anchors)[: self.kept])

    def _planned(self, step: int, steps: Sequence[int]) -> bool:
        """Whether ``steps`` are the last that the schedule computes before ``step``."""
        if self.schedule is None:
            return True
        computed = [
            before
            for before in range(step - 1, -1, -1)
            if self.schedule[before : before + 1] == "C"
        ]
        return computed[: len(steps)] == list(steps)


def extrapolation(level: float, anchors: Sequence[float]) -> list[float]:
    """Lagrange weights at ``level`` of the polynomial through ``anchors``; of equal anchors only the first counts."""
    distinct = [anchor for index, anchor in enumerate(anchors) if anchor not in anchors[:index]]
    weights = []
    for index, anchor in enumerate(anchors):
        if anchor in anchors[:index]:
            weights.append(0.0)
            continue
        weight = 1.0
        for other in distinct:
            if other != anchor:
                weight *= (level - other) / (anchor - other)
        weights.append(weight)
    return weights
