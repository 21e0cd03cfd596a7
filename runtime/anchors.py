"""What computed steps leave behind, and the forecasts that are made of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.decide.forecast import Forecast


@dataclass
class _Anchor:
    """A computed step: when it was, one tensor per place, and the devices that they came from."""

    step: int
    level: float
    values: list[torch.Tensor]
    devices: list[torch.device]


class Anchors:
    """The values of the last computed steps, as many as skipped steps still use.

    Args:
        forecast: What a skipped step makes of them.
        sigma: Noise level of a step; ``None`` where the scheduler tells none.
        offload: Keep them in the host's memory.
    """

    def __init__(
        self, forecast: Forecast, sigma: Callable[[int], float | None], offload: bool = False
    ) -> None:
        self._forecast, self._sigma, self._offload = forecast, sigma, offload
        self._anchors: list[_Anchor] = []  # the newest first

    def __len__(self) -> int:
        return len(self._anchors)

    @property
    def values(self) -> list[torch.Tensor]:
        """Everything that is kept."""
        return [value for anchor in self._anchors for value in anchor.values]

    def clear(self) -> None:
        """Forget all computed steps."""
        self._anchors.clear()

    def make_room(self, step: int) -> None:
        """``step`` is going to be computed: drop what no later step uses then."""
        del self._anchors[self._forecast.kept_from(step) - 1 :]

    def add(self, step: int, values: list[torch.Tensor]) -> None:
        """``step`` was computed and left ``values``."""
        devices = [value.device for value in values]
        if self._offload:
            values = [value.to("cpu") for value in values]
        self._anchors.insert(0, _Anchor(step, self._level(step), values, devices))

    def forecast(self, step: int, index: int) -> torch.Tensor:
        """Value ``index`` at the skipped ``step``; the kept tensor itself where it is reused as it is."""
        levels = [anchor.level for anchor in self._anchors]
        steps = [anchor.step for anchor in self._anchors]
        weights = self._forecast.at(step, self._level(step), levels, steps)
        device = self._anchors[0].devices[index]
        newest = self._anchors[0].values[index].to(device)
        if not any(weights[1:]):
            return newest if weights[0] == 1 else newest * weights[0]
        # In float32: weights of opposite sign cancel most of what a bfloat16 sum would still hold.
        total = newest.float() * weights[0]
        for weight, anchor in zip(weights[1:], self._anchors[1:], strict=False):
            total.add_(anchor.values[index].to(device), alpha=weight)
        return total

    def _level(self, step: int) -> float:
        """Abscissa of forecasts: the noise level, or the step where there is none; 0 where no forecast asks."""
        if not self._forecast.asks_levels:
            return 0.0
        sigma = self._sigma(step)
        return float(-step) if sigma is None else sigma
