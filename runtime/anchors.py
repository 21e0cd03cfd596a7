"""What computed steps leave behind, and the forecasts that are made of it."""

import copy
import functools
import inspect
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coeffs import Plan
from runtime.decide.forecast import Forecast
from runtime.errors import InvalidSetting, WiringError


class Anchors(dict[int, dict[Hashable, Tensor]]):
    """The last computed steps with what each left, by name; the newest last, as many as skipped steps still use.

    Args:
        forecast: What a skipped step makes of them.
        level: Noise level of a step, or whatever takes its place.
        offload: Keep their values in the host's memory.
    """

    def __init__(
        self, forecast: Forecast, level: Callable[[int], float], offload: bool = False
    ) -> None:
        super().__init__()
        self._forecast, self._level, self._offload = forecast, level, offload

    def make_room(self, step: int) -> None:
        """``step`` is going to be computed: drop what no later step uses then."""
        for old in list(self)[::-1][self._forecast.kept_from(step) - 1 :]:
            del self[old]

    def add(self, step: int, name: Hashable, value: Tensor) -> None:
        """``step`` was computed and left ``value``, which is the caller's to give away."""
        self.setdefault(step, {})[name] = value.to("cpu") if self._offload else value

    def forecast(self, step: int, name: Hashable, device: torch.device) -> Tensor:
        """What is called ``name`` at the skipped ``step``; the kept tensor itself where it is reused as it is."""
        steps = list(self)[::-1]
        # Levels are asked for where the forecast needs them, since reading one may wait for the device.
        level, *levels = [
            self._level(at) if self._forecast.order else 0.0 for at in (step, *steps)
        ]
        weights = self._forecast.at(step, level, levels, steps)
        newest, *older = (self[at][name] for at in steps)
        newest = newest.to(device)
        if not any(weights[1:]):
            return newest if weights[0] == 1 else newest * weights[0]
        # In float32: weights of opposite sign cancel most of what a bfloat16 sum would still hold.
        total = newest.float() * weights[0]
        for weight, value in zip(weights[1:], older, strict=False):
            total.add_(value.to(device), alpha=weight)
        return total


class Guided:
    """Forecasts of the guided prediction, at the ``step`` of the pipeline's scheduler.

    What the scheduler receives is kept on computed steps and replaced on skipped ones, so the forecast holds for any
    guidance. One object serves all denoisers of a pipeline: they share the schedule.

    Args:
        anchors: Keeps what the scheduler receives.
        across_experts: Whether a second expert's steps may be forecast from the first's. It predicts something else,
            so only fitted weights may.
    """

    def __init__(self, anchors: Anchors, across_experts: bool = False) -> None:
        self._anchors, self._across_experts = anchors, across_experts
        self.clear()

    def begin(self, joins: bool) -> None:
        """A denoiser begins a generation, or ``joins`` the one that another expert began."""
        if not (joins and self._across_experts):
            self.clear()

    def clear(self) -> None:
        """Forget the generation."""
        self._anchors.clear()
        self._step, self._received, self._skip = -1, 0, False

    def decided(self, step: int, skip: bool) -> None:
        """A denoiser was called for ``step``, and skipped or not.

        Raises:
            InvalidSetting: The pipeline does not hand what it predicts to its scheduler.
        """
        if step != self._step:
            unheard = self._step >= 0 and not self._received
            if unheard and (skip or self._skip):
                raise InvalidSetting(
                    "forecast_of='guided': this pipeline made a step without calling step() of its scheduler, so "
                    "there is no guided prediction to forecast; use forecast_of='output'"
                )
            self._step, self._received, self._skip = step, 0, False
        self._skip |= skip

    @torch.no_grad()
    def step(self, value: Tensor) -> Tensor:
        """A scheduler received ``value``; what it is given instead."""
        if self._step < 0:  # no denoiser was called before
            return value
        index, self._received = self._received, self._received + 1
        if not self._skip:
            if index == 0:
                self._anchors.make_room(self._step)
            self._anchors.add(self._step, index, value.detach().clone())
            return value
        forecast = self._anchors.forecast(self._step, index, value.device)
        if forecast.shape != value.shape:
            raise WiringError(
                f"the scheduler received {tuple(forecast.shape)} on a computed step and {tuple(value.shape)} on a "
                "skipped one; its output is refused: exclude such steps with start/end, or remove the cache"
            )
        return forecast.to(value.dtype, copy=True)


def plan_scheduler(scheduler: Any, plan: Plan) -> Any:
    """A copy of a diffusers scheduler that runs a plan without hooks: one step for each computed one.

    The pipeline is called with the plan's number of steps and makes as many as the plan computes. Each takes the
    skipped steps behind it too, with the forecasts of the plan and the scheduler's own rule, so that the result is
    that of ``apply_tea_cache(pipe, schedule=plan)`` to the bit. Nothing else may change the latents in between.

    Raises:
        InvalidSetting: The plan forecasts something that a scheduler does not receive.

    Example:
        pipe.scheduler = plan_scheduler(pipe.scheduler, entry.plans[0])
    """
    if plan.forecast_of != "guided":
        raise InvalidSetting(
            f"a plan with forecasts of the {plan.forecast_of or 'residual'}: a scheduler receives the guided "
            "prediction alone; apply it with apply_tea_cache"
        )
    own: Any = type(scheduler)
    computed = [step for step, letter in enumerate(plan.schedule) if letter == "C"]
    signature = inspect.signature(own.step)

    class Planned(own):
        timesteps: Any

        @functools.wraps(own.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            own.set_timesteps(self, *args, **kwargs)
            if len(self.timesteps) != len(plan.schedule):
                raise InvalidSetting(
                    f"{len(self.timesteps)} steps: the plan is one of {len(plan.schedule)}; ask for as many"
                )
            sigmas = getattr(self, "sigmas", -torch.arange(len(plan.schedule))).tolist()
            self._guided = Guided(Anchors(Forecast.of_plan(plan), sigmas.__getitem__))
            self._all_timesteps = self.timesteps
            self.timesteps = self._all_timesteps[computed]
            self._spans = list(pairwise([*computed, len(plan.schedule)]))

        @functools.wraps(own.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            output, time, sample = list(given)[1:4]
            first, after = self._spans.pop(0)
            # The scheduler's own rule looks up where it is in the whole schedule.
            shown, self.timesteps = self.timesteps, self._all_timesteps
            for step in range(first, after):
                self._guided.decided(step, skip=step > first)
                given[output] = self._guided.step(given[output])
                given[time] = self.timesteps[step]
                stepped = own.step(**given)
                given[sample] = (
                    stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
                )
            self.timesteps = shown
            return stepped

    # Pipelines and their configurations know schedulers by name.
    Planned.__name__ = own.__name__
    planned = copy.deepcopy(scheduler)
    planned.__class__ = Planned
    return planned
