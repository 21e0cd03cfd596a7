"""The decision of one denoising step: compute the block stack or reuse its residual. Pure: no tensors, no torch.

The rule is TeaCache's (arXiv 2411.19108, section 3.3): predicted changes accumulate over consecutive steps, the stack
is skipped while their sum stays below the threshold, and computing resets the sum. Around it stand the guards that a
published polynomial lacks: a fitted domain, a forced window, a cap on consecutive skips.
"""

import math
from dataclasses import dataclass, replace

from coeffs.entry.polynomial import Polynomial
from runtime.errors import InvalidSetting

KINDS = (
    "first",
    "forced",
    "computed",
    "skipped",
    "above_domain",
    "non_finite",
    "shape_changed",
    "streak_cap",
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one step and why.

    Attributes:
        kind: One of :data:`KINDS`; everything but ``skipped`` computes.
        x: Relative L1 change of the signal since the previous step; ``None`` where it was not needed.
        predicted: Predicted change of the target; ``None`` where no prediction was made.
        accumulated: Sum of predictions since the last computed step, this one included.
    """

    kind: str
    x: float | None = None
    predicted: float | None = None
    accumulated: float = 0.0

    @property
    def skip(self) -> bool:
        return self.kind == "skipped"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Settings of a gate.

    Args:
        threshold: Skip while the accumulated predicted change is below it; 0 never skips. It means nothing without
            the polynomial it was chosen for.
        start: First steps that always compute, as a count (``int``) or a fraction of the schedule (``float``).
        end: Last steps that always compute, likewise.
        max_skips: Most consecutive skips; ``None`` lifts the cap.
        compat: Reproduce the published implementations: first and last step computed, no domain, no cap.
    """

    threshold: float
    start: int | float = 1
    end: int | float = 1
    max_skips: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 <= self.threshold < math.inf:
            raise InvalidSetting(
                f"threshold {self.threshold!r}: expected a number >= 0 (0 computes every step)"
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            most = 1 if isinstance(value, float) else math.inf
            if not _is_number(value) or not 0 <= value <= most:
                raise InvalidSetting(
                    f"{name} {value!r}: expected a count of steps (int) or a fraction from 0.0 to 1.0 (float)"
                )
        cap = self.max_skips
        if cap is not None and (type(cap) is not int or cap < 1):
            raise InvalidSetting(
                f"max_skips {cap!r}: expected a count >= 1, or None for no cap"
            )

    @property
    def needs_num_steps(self) -> bool:
        """Whether the window can only be placed when the length of the schedule is known."""
        return self.compat or bool(self.end) or isinstance(self.start, float)

    def forced(self, step: int, num_steps: int | None) -> bool:
        """Whether ``step`` (0-based) lies in the first ``start`` or the last ``end`` steps."""
        start, end = (1, 1) if self.compat else (self.start, self.end)
        if num_steps is None:
            if self.needs_num_steps:
                raise InvalidSetting(
                    "the forced window needs the number of denoising steps, which is unknown here: "
                    "give num_steps=..., or start as a count and end=0"
                )
            return step < start
        return step < _count(start, num_steps) or step >= num_steps - _count(end, num_steps)


class Gate:
    """TeaCache's decision for one trajectory, one call of :meth:`step` per denoising step.

    Example:
        >>> gate = Gate(Polynomial((1.0, 0.0)), GateConfig(threshold=0.25, end=0))
        >>> [gate.step(x, step=t, num_steps=5).kind for t, x in enumerate([None, 0.1, 0.1, 0.1, 0.1])]
        ['first', 'skipped', 'skipped', 'computed', 'skipped']
    """

    def __init__(self, polynomial: Polynomial, config: GateConfig) -> None:
        self.polynomial = replace(polynomial, domain=None) if config.compat else polynomial
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory."""
        self._accumulated = 0.0
        self._skips_in_a_row = 0
        self._started = False

    def known(self, *, step: int, num_steps: int | None) -> Decision | None:
        """The decision where it does not depend on x, else ``None``; changes nothing, :meth:`step` must follow."""
        if not self._started:
            return Decision("first")
        if self.config.threshold == 0:
            return Decision("computed")
        if self.config.forced(step, num_steps):
            return Decision("forced")
        cap = None if self.config.compat else self.config.max_skips
        if cap is not None and self._skips_in_a_row >= cap:
            return Decision("streak_cap")
        return None

    def step(self, x: float | None, *, step: int, num_steps: int | None) -> Decision:
        """Decide step ``step`` of ``num_steps`` from ``x``, the relative L1 change since the previous step.

        ``x`` is ``None`` where there is nothing comparable: the first step, or a changed shape.
        """
        decision = self.known(step=step, num_steps=num_steps) or self._measured(x)
        self._started = True
        self._accumulated = decision.accumulated if decision.skip else 0.0
        self._skips_in_a_row = self._skips_in_a_row + 1 if decision.skip else 0
        return replace(decision, x=x)

    def _measured(self, x: float | None) -> Decision:
        if x is None:
            return Decision("shape_changed")
        if not math.isfinite(x):
            return Decision("non_finite")
        if self.polynomial.above_domain(x):
            return Decision("above_domain")
        predicted = self.polynomial.predict(x)
        accumulated = self._accumulated + predicted
        if not math.isfinite(accumulated):
            return Decision("non_finite", predicted=predicted)
        kind = "skipped" if accumulated < self.config.threshold else "computed"
        return Decision(kind, predicted=predicted, accumulated=accumulated)


class FixedSchedule:
    """A plan instead of a gate: ``"CCSC..."``, one letter per denoising step, C computes and S skips."""

    def __init__(self, schedule: str) -> None:
        if not schedule or set(schedule) - {"C", "S"} or schedule[0] != "C":
            raise InvalidSetting(
                f"schedule {schedule!r}: expected one letter per step, C (compute) or S (skip), the first one C"
            )
        self.schedule = schedule
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory."""
        self._started = False

    def step(self, x: float | None, *, step: int, num_steps: int | None) -> Decision:
        """The planned decision, whatever ``x``; a trajectory that starts on a skip computes its first step."""
        length = len(self.schedule)
        if num_steps not in (None, length):
            raise InvalidSetting(
                f"schedule of {length} steps on a run of {num_steps}: plan again for this number of steps"
            )
        if step >= length:
            raise InvalidSetting(
                f"step {step + 1} of a schedule of {length}: plan for more steps"
            )
        started, self._started = self._started, True
        if not started:
            return Decision("first")
        return Decision("skipped" if self.schedule[step] == "S" else "computed")


# What decides at every step of a trajectory.
Policy = Gate | FixedSchedule


def _count(value: int | float, num_steps: int) -> int:
    return math.ceil(value * num_steps) if isinstance(value, float) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
