"""What a gate and a plan are compared with that has code of its own: a second-order solver, diffusers' caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from calibrate.trials.setting import Refused
from runtime.compat.diffusers_private import hook_registry
from runtime.watch.blocks import find_blocks

DIFFUSERS_CACHES = ("FirstBlockCache", "MagCache", "SeaCache")
LARGEST_LEVEL = 1 - 1e-6  # the solver's log ratio is infinite at a level of 1


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
        solver.sigmas = self.sigmas.cpu().clamp(max=LARGEST_LEVEL)
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
        stepped = self._solver.step(
            model_output.float(), timestep, sample.float(), return_dict=return_dict
        )
        self._step_index += 1
        if return_dict:
            stepped.prev_sample = stepped.prev_sample.to(model_output.dtype)
            return stepped
        return (stepped[0].to(model_output.dtype),)


@contextmanager
def second_order(pipeline: Any) -> Iterator[SecondOrderFlow]:
    """Put the second-order solver in place of the pipeline's Euler scheduler, and the scheduler back afterwards.

    Raises:
        Refused: Another scheduler, or a way of using Euler's that leaves nothing to a better solver.
    """
    euler: Any = getattr(pipeline, "scheduler", None)
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


@contextmanager
def diffusers_cache(
    modules: Mapping[str, torch.nn.Module], name: str, options: Mapping[str, Any]
) -> Iterator[Callable[[], dict[str, str]]]:
    """One of diffusers' own caches on every denoiser. Raises :class:`Refused` where it cannot be enabled."""
    import diffusers

    config = getattr(diffusers, f"{name}Config", None)
    if config is None:
        raise Refused(f"diffusers {diffusers.__version__} has no {name}")
    with hooks_restored(modules):
        try:
            for module in modules.values():
                _enable(module, name, lambda: config(**options))
            with counted(modules) as patterns_of:
                yield patterns_of
        finally:
            cached: Iterable[Any] = modules.values()
            for module in cached:
                if getattr(module, "is_cache_enabled", False):
                    module.disable_cache()


def _enable(module: Any, name: str, config: Callable[[], Any]) -> None:
    if not hasattr(module, "enable_cache"):
        raise Refused(f"{type(module).__name__} has no enable_cache")
    try:
        module.enable_cache(config())
    except Exception as error:  # a cache raises anything on a model it was not written for
        raise Refused(
            f"{name} on {type(module).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None


@contextmanager
def hooks_restored(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Take off every diffusers hook that was put on the modules meanwhile; a refusal half-way leaves some."""
    before = {part: set(registry.hooks) for part, registry in _registries(modules)}
    try:
        yield
    finally:
        for part, registry in _registries(modules):
            for hook in set(registry.hooks) - before.get(part, set()):
                registry.remove_hook(hook, recurse=False)


def _registries(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, Any]]:
    for module in modules.values():
        for part in module.modules():
            registry = hook_registry(part)
            if registry is not None:
                yield part, registry


@contextmanager
def counted(modules: Mapping[str, torch.nn.Module]) -> Iterator[Callable[[], dict[str, str]]]:
    """Watch the last block of every denoiser; the function tells which calls computed it, branch by branch."""
    counters = {expert: _StackCounter(module) for expert, module in modules.items()}
    try:
        yield lambda: {
            f"{expert}/branch {index}": pattern
            for expert, counter in counters.items()
            for index, pattern in enumerate(counter.patterns())
        }
    finally:
        for counter in counters.values():
            counter.remove()


class _StackCounter:
    """One letter per denoiser call: C where a module inside the last block ran, S where it did not.

    Calls of one timestep belong to different branches, in turn.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._letters: dict[float, str] = {}
        self._ran = False
        inside = [
            part for part in find_blocks(module)[-1][1].modules() if not list(part.children())
        ]
        self._handles = [part.register_forward_pre_hook(self._inside) for part in inside]
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def _inside(self, module: torch.nn.Module, args: tuple) -> None:
        self._ran = True

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        time_of = kwargs.get("timestep")
        key = (
            float(time_of.flatten()[0])
            if isinstance(time_of, torch.Tensor)
            else float(len(self._letters))
        )
        self._letters[key] = self._letters.get(key, "") + ("C" if self._ran else "S")
        self._ran = False

    def patterns(self) -> list[str]:
        """One pattern per branch."""
        return ["".join(letters) for letters in zip(*self._letters.values(), strict=False)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
