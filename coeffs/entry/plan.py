"""A plan: which steps compute, and what the others are made of."""

from dataclasses import dataclass
from typing import Literal

from coeffs.entry.fields import Count, Figures, Numbers, Record, Schedule, Text
from coeffs.errors import EntryError


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A fixed schedule: C computes, S skips, one letter per step.

    ``weights`` belong to a fitted forecast: one row per skipped step, of the last computed steps,
    the newest first. ``chosen`` says what else was tried, and by how much this was better.
    """

    schedule: Schedule
    computed_steps: Count | None = None
    sigmas: Numbers | None = None
    forecast: Text = None
    forecast_of: Literal["residual", "output", "guided"] | None = None
    weights: tuple[Numbers, ...] | None = None
    figures: Figures = None
    chosen: Text = None

    def _check(self) -> None:
        computed, skipped = map(self.schedule.count, "CS")
        if self.computed_steps not in (None, computed):
            raise EntryError(
                f"{self.computed_steps}, but the schedule computes {computed}",
                "computed_steps",
            )
        object.__setattr__(self, "computed_steps", computed)
        if (self.forecast == "fitted") != (self.weights is not None):
            raise EntryError(
                f"forecast {self.forecast!r}: only fitted has weights, and must", "weights"
            )
        if self.weights is not None and (
            len(self.weights) != skipped or not all(self.weights)
        ):
            raise EntryError(
                f"{len(self.weights)} rows: expected one per skipped step ({skipped})",
                "weights",
            )

    @property
    def weights_by_step(self) -> dict[int, Numbers]:
        """Skipped step -> weights of the last computed ones; empty but for a fitted forecast."""
        skipped = (step for step, letter in enumerate(self.schedule) if letter == "S")
        return dict(zip(skipped, self.weights or (), strict=False))
