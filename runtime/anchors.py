"""What computed steps leave behind, and the forecasts that are made of it."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decide.forecast import Forecast
from runtime.errors import InvalidSetting, WiringError
from runtime.watch.scheduler import Locator


@dataclass
class _Anchor:
    """A computed step: when it was, one tensor per place, and the devices that they came from."""

    step: int
    level: float
    values: list[Tensor]
    devices: list[torch.device]


class Anchors:
    """The values of the last computed steps, as many as skipped steps still use.

    Args:
        forecast: What a skipped step makes of them.
        offload: Keep them in the host's memory.
    """

    def __init__(self, forecast: Forecast, offload: bool = False) -> None:
        self._forecast, self._offload = forecast, offload
        self._anchors: list[_Anchor] = []  # the newest first

    def __len__(self) -> int:
        return len(self._anchors)

    @property
    def values(self) -> list[Tensor]:
        """Everything that is kept."""
        return [value for anchor in self._anchors for value in anchor.values]

    def clear(self) -> None:
        """Forget all computed steps."""
        self._anchors.clear()

    def make_room(self, step: int) -> None:
        """``step`` is going to be computed: drop what no later step uses then."""
        del self._anchors[self._forecast.kept_from(step) - 1 :]

    def add(self, step: int, locator: Locator, values: list[Tensor]) -> None:
        """``step`` was computed and left ``values``; those of a step that is known are further ones."""
        devices = [value.device for value in values]
        if self._offload:
            values = [value.to("cpu") for value in values]
        if self._anchors and self._anchors[0].step == step:
            self._anchors[0].values += values
            self._anchors[0].devices += devices
        else:
            self._anchors.insert(0, _Anchor(step, self._level(step, locator), values, devices))

    def forecast(self, step: int, locator: Locator, index: int) -> Tensor:
        """Value ``index`` at the skipped ``step``; the kept tensor itself where it is reused as it is."""
        levels = [anchor.level for anchor in self._anchors]
        steps = [anchor.step for anchor in self._anchors]
        weights = self._forecast.at(step, self._level(step, locator), levels, steps)
        device = self._anchors[0].devices[index]
        newest = self._anchors[0].values[index].to(device)
        if not any(weights[1:]):
            return newest if weights[0] == 1 else newest * weights[0]
        # In float32: weights of opposite sign cancel most of what a bfloat16 sum would still hold.
        total = newest.float() * weights[0]
        for weight, anchor in zip(weights[1:], self._anchors[1:], strict=False):
            total.add_(anchor.values[index].to(device), alpha=weight)
        return total

    def _level(self, step: int, locator: Locator) -> float:
        """Abscissa of forecasts; 0 where no forecast asks, since reading it may wait for the device."""
        return locator.level(step) if self._forecast.asks_levels else 0.0


class Guided:
    """Forecasts of the guided prediction, at the ``step`` of the pipeline's scheduler.

    What the scheduler receives is kept on computed steps and replaced on skipped ones, so the forecast holds for any
    guidance. One object serves all denoisers of a pipeline: they share the schedule.
    """

    def __init__(self, forecast: Forecast, offload: bool = False) -> None:
        self._anchors = Anchors(forecast, offload)
        self._across_experts = forecast.kind == "fitted"
        self._schedule: Hashable | None = None
        self._experts: set[str] = set()
        self.clear()

    def begin(self, expert: str, schedule: Hashable | None) -> None:
        """``expert`` begins a generation, or its part of the one that another expert began on the same schedule."""
        joins = schedule is not None and schedule == self._schedule and expert not in self._experts
        # Another expert predicts something else: nothing is extrapolated from one to the other, unless weights say so.
        if not joins or not self._across_experts:
            self.clear()
        if not joins:
            self._experts.clear()
        self._schedule = schedule
        self._experts.add(expert)

    def clear(self) -> None:
        """Forget the generation."""
        self._anchors.clear()
        self._step, self._received, self._skip = -1, 0, False
        self._locator: Locator | None = None

    def decided(self, step: int, locator: Locator, skip: bool) -> None:
        """A denoiser was called for ``step``, and skipped or not.

        Raises:
            InvalidSetting: The pipeline does not hand what it predicts to its scheduler.
        """
        if step != self._step:
            unheard = self._locator is not None and not self._received
            if unheard and (skip or self._skip):
                raise InvalidSetting(
                    "forecast_of='guided': this pipeline made a step without calling step() of its scheduler, so "
                    "there is no guided prediction to forecast; use forecast_of='output'"
                )
            self._step, self._received, self._skip = step, 0, False
        self._locator = locator
        self._skip |= skip

    @torch.no_grad()
    def step(self, value: Tensor) -> Tensor | None:
        """A scheduler received ``value``; what it is given instead."""
        if self._locator is None:  # no denoiser was called before
            return None
        index, self._received = self._received, self._received + 1
        if not self._skip:
            if index == 0:
                self._anchors.make_room(self._step)
            self._anchors.add(self._step, self._locator, [value.detach().clone()])
            return None
        forecast = self._anchors.forecast(self._step, self._locator, index)
        if forecast.shape != value.shape:
            raise WiringError(
                f"the scheduler received {tuple(forecast.shape)} on a computed step and {tuple(value.shape)} on a "
                "skipped one; its output is refused: exclude such steps with start/end, or remove the cache"
            )
        return forecast.to(value.dtype, copy=True)
