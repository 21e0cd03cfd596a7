"""What a skipped step makes of computed ones: the last as it is, or a weighted sum. Pure: weights only.

Weights depend on steps and noise levels alone, so they are known beforehand on the host. Extrapolating outputs
linearly in sigma under Euler's method is the Adams-Bashforth method of second order on a non-uniform grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from coeffs import Plan
from runtime.errors import InvalidSetting

ORDERS = {"reuse": 0, "linear": 1, "quadratic": 2}


@dataclass(frozen=True)
class Forecast:
    """How the value of a skipped step follows from those of computed steps.

    Args:
        kind: ``reuse``, ``linear`` or ``quadratic`` in sigma (in the step where sigmas are unknown), or ``fitted``.
        weights: For ``fitted``: step -> weights of the last computed values, the newest first, as many as the row is
            long. A step that is missing is reused.
        schedule: For ``fitted``: the schedule (``"CCSC..."``) that the weights were made for. Where other steps than
            its own were computed last, the newest value is reused as it is.
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

    @classmethod
    def of_plan(cls, plan: Plan) -> "Forecast":
        """The forecast that a plan states, for its own schedule."""
        return cls(plan.forecast or "reuse", plan.weights_by_step).planned_for(plan.schedule)

    @property
    def order(self) -> int:
        """Degree of the extrapolation in the noise levels; 0 where weights do not follow from them."""
        return ORDERS.get(self.kind, 0)

    def planned_for(self, schedule: str) -> "Forecast":
        """This forecast under ``schedule``; weights fitted for another one are refused."""
        if self.kind != "fitted":
            return self
        if self.schedule not in (None, schedule):
            raise InvalidSetting(
                f"forecast fitted for {self.schedule}, the schedule is {schedule}: give the one that it was fitted for"
            )
        return replace(self, schedule=schedule)

    def kept_from(self, step: int) -> int:
        """How many of the values computed up to ``step`` the skipped steps after it use."""
        if self.kind != "fitted":
            return self.order + 1
        schedule = self.schedule or ""
        used = [
            len(row) - schedule[step + 1 : later].count("C")
            for later, row in self.weights.items()
            if later > step
        ]
        return max(1, *used) if used else 1

    def at(
        self, step: int, level: float, anchors: Sequence[float], steps: Sequence[int] = ()
    ) -> list[float]:
        """Weights of the kept values, newest first, for ``step`` at noise level ``level``.

        Args:
            anchors: Noise levels of the kept values, newest first; fewer than the order asks for lower it.
            steps: The steps that they were computed at; a forecast with a :attr:`schedule` compares them with it.

        Example:
            >>> Forecast("linear").at(2, level=0.4, anchors=[0.6, 0.8])
            [2.0, -1.0]
        """
        if self.kind != "fitted":
            return extrapolation(level, anchors[: self.order + 1])
        row = list(self.weights.get(step, (1.0,)))
        before = (self.schedule or "")[:step]
        computed = [index for index, letter in enumerate(before) if letter == "C"]
        last = computed[::-1][: len(row)]
        is_planned = self.schedule is None or last == list(steps[: len(row)])
        if is_planned and len(row) <= len(anchors):
            return row
        return [1.0] + [0.0] * (len(anchors) - 1)


def extrapolation(level: float, anchors: Sequence[float]) -> list[float]:
    """Lagrange weights at ``level`` of the polynomial through ``anchors``; of equal anchors only the first counts."""
    distinct = list(dict.fromkeys(anchors))
    weights = []
    for index, anchor in enumerate(anchors):
        weight = 0.0 if anchor in anchors[:index] else 1.0
        for other in distinct:
            if other != anchor:
                weight *= (level - other) / (anchor - other)
        weights.append(weight)
    return weights
