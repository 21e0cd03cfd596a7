"""Fewer steps with a better solver: a second-order one in place of a pipeline's Euler scheduler, with its shift."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from calibrate.trials.baselines import Refused

LEVEL_TOLERANCE = 1e-6


class SecondOrderFlow(FlowMatchEulerDiscreteScheduler):
    """Euler's schedule with the steps of DPM-Solver++ of order 2 (arXiv 2211.01095).

    Levels that the pipeline gives (Flux, Qwen-Image, LongCat-Image) are kept to the bit, with their shift and times:
    diffusers' own scheduler lacks what pipelines work their mean shift out from, and cuts times to whole numbers.
    Where the scheduler is to choose (Stable Diffusion 3), Euler's own choice ends with a level of almost nothing, a
    leap in the log ratio in which the solver works; it gets the evenly spaced levels that other pipelines give.
    """

    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines look at its signature
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        given = signature(super().set_timesteps).bind(*args, **kwargs).arguments
        if given.get("sigmas") is None and given.get("timesteps") is None and not self._respaced:
            steps = given["num_inference_steps"]
            given["sigmas"] = np.linspace(1, 1 / steps, steps)
        super().set_timesteps(**given)
        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=self.config.num_train_timesteps,
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
        )
        solver.set_timesteps(len(self.timesteps), device=self.timesteps.device)
        # Its log ratio is infinite at a level of 1.
        solver.sigmas = self.sigmas.cpu().clamp(max=1 - LEVEL_TOLERANCE)
        solver.timesteps = self.timesteps
        self._solver = solver

    @property
    def _respaced(self) -> bool:
        """Whether the configuration spaces levels by a rule of its own."""
        return any(
            self.config[name]
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; ``generator`` is taken as Euler takes it and never used."""
        if per_token_timesteps is not None:
            raise Refused(
                "this pipeline gives every token a time of its own, which no multistep solver takes"
            )
        if self.step_index is None:
            self._init_step_index(timestep)
            self._solver.set_begin_index(self.step_index)
        # In float32, as Euler's method does: the last steps' sample is part of the next one.
        found = self._solver.step(
            model_output.float(), timestep, sample.float(), return_dict=return_dict
        )
        self._step_index += 1
        if return_dict:
            found.prev_sample = found.prev_sample.to(model_output.dtype)
            return found
        return (found[0].to(model_output.dtype),)


@contextmanager
def second_order(pipeline: Any) -> Iterator[SecondOrderFlow]:
    """Put the second-order solver in place of the pipeline's Euler scheduler, and the scheduler back afterwards.

    Raises:
        Refused: Another scheduler, or a way of using Euler's that leaves nothing to a better solver.
    """
    euler = getattr(pipeline, "scheduler", None)
    _check(euler)
    solver = SecondOrderFlow.from_config(euler.config)
    solver.set_shift(euler.shift)
    pipeline.scheduler = solver
    try:
        yield solver
    finally:
        pipeline.scheduler = euler


def _check(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if scheduler is None:
        raise Refused("the pipeline has no scheduler")
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        order = max(
            getattr(scheduler, "order", 1),
            dict(getattr(scheduler, "config", {})).get("solver_order", 1),
        )
        if order > 1:
            raise Refused(f"{name} is of order {order} already: fewer-steps is the comparison")
        raise Refused(f"{name}: only FlowMatchEulerDiscreteScheduler has a second-order stand-in")
    if scheduler.config.stochastic_sampling:
        raise Refused(
            f"{name} adds noise at every step (stochastic_sampling): a solver's order means nothing"
        )
    if scheduler.config.invert_sigmas:
        raise Refused(
            f"{name} counts noise levels upwards (invert_sigmas), which DPMSolverMultistepScheduler does not"
        )
