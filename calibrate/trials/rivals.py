"""What a gate and a plan are compared with that has code of its own: a second-order solver, diffusers' caches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import apply_mag_cache
from torch.utils.hooks import RemovableHandle

from calibrate.trials.setting import PatternsOf, Refused
from runtime.compat.diffusers_private import hook_registry
from runtime.watch.blocks import find_blocks

DIFFUSERS_CACHES = ("FirstBlockCache", "MagCache", "SeaCache")
LARGEST_LEVEL = 1 - 1e-6  # the solver's log ratio is infinite at a level of 1
# Configurations that space levels by a rule of their own.
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

Modules = Mapping[str, torch.nn.Module]


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
        respaced = any(self.config[name] for name in RESPACED)
        if given.get("sigmas") is None and given.get("timesteps") is None and not respaced:
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

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        per_token_timesteps: Any = None,
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
        stepped = self._solver.step(model_output.float(), timestep, sample.float())
        self._step_index += 1
        stepped.prev_sample = stepped.prev_sample.to(model_output.dtype)
        return stepped if return_dict else (stepped.prev_sample,)


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
    if scheduler is None:
        raise Refused("the pipeline has no scheduler")
    name = type(scheduler).__name__
    config: Any = getattr(scheduler, "config", {})
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        order = max(getattr(scheduler, "order", 1), config.get("solver_order", 1))
        if order > 1:
            raise Refused(
                f"{name} is of order {order} already: fewer-steps is the comparison"
            )
        raise Refused(
            f"{name}: only FlowMatchEulerDiscreteScheduler has a second-order stand-in"
        )
    if config.stochastic_sampling:
        raise Refused(
            f"{name} adds noise at every step (stochastic_sampling): a solver's order means nothing"
        )
    if config.invert_sigmas:
        raise Refused(
            f"{name} counts noise levels upwards (invert_sigmas), which DPMSolverMultistepScheduler does not"
        )


@contextmanager
def diffusers_cache(
    modules: Modules, name: str, options: Mapping[str, Any]
) -> Iterator[PatternsOf]:
    """One of diffusers' own caches on every denoiser. Raises :class:`Refused` where it cannot be enabled."""
    config = getattr(diffusers, f"{name}Config", None)
    if config is None:
        raise Refused(f"diffusers {diffusers.__version__} has no {name}")
    with cache_taken_off(modules):
        for module in modules.values():
            # Some classes (Stable Diffusion 3) have blocks that MagCache knows, but no enable_cache.
            direct = partial(apply_mag_cache, module) if name == "MagCache" else None
            enable = getattr(module, "enable_cache", direct)
            if enable is None:
                raise Refused(f"{type(module).__name__} has no enable_cache")
            with refusing(f"{name} on {type(module).__name__}"):
                enable(config(**options))
        with counted(modules) as patterns_of:
            yield patterns_of


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Another library raises anything on a model it was not written for: its words in one line, as a refusal."""
    try:
        yield
    except Exception as error:
        raise Refused(f"{what}: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def cache_taken_off(modules: Modules) -> Iterator[None]:
    """Afterwards diffusers' caches are disabled and every hook is off: a refusal half-way leaves some."""
    before = _hooks(modules)
    try:
        yield
    finally:
        for module in modules.values():
            if getattr(module, "is_cache_enabled", False):
                module.disable_cache()  # type: ignore[operator]
        for registry, name in _hooks(modules) - before:
            registry.remove_hook(name, recurse=False)


def _hooks(modules: Modules) -> set[tuple[Any, str]]:
    """Registry and name of all hooks of diffusers'."""
    parts = (part for module in modules.values() for part in module.modules())
    registries = filter(None, map(hook_registry, parts))
    return {(registry, name) for registry in registries for name in registry.hooks}


@contextmanager
def counted(modules: Modules) -> Iterator[PatternsOf]:
    """Watch the last block of every denoiser; the function tells which calls computed it, branch by branch."""
    letters: dict[str, dict[float, str]] = {expert: defaultdict(str) for expert in modules}
    with ExitStack() as stack:
        for expert, module in modules.items():
            stack.enter_context(taken_off(_watched(module, letters[expert])))
        yield lambda: {
            f"{expert}/branch {index}": "".join(branch)
            for expert, by_time in letters.items()
            for index, branch in enumerate(zip(*by_time.values(), strict=False))
        }


def _watched(module: torch.nn.Module, letters: dict[float, str]) -> list[RemovableHandle]:
    """Fill timestep -> one letter per call: C where a module inside the last block ran, S where it did not.

    Calls of one timestep belong to different branches, in turn.
    """
    ran: list[bool] = []

    def after(
        module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        time: Any = kwargs.get("timestep")
        known = isinstance(time, torch.Tensor)
        # The mean, as tokens of a frame that is given have a time of their own, the same at every step.
        letters[float(time.float().mean()) if known else len(letters)] += "C" if ran else "S"
        ran.clear()

    leaves = [part for part in find_blocks(module)[-1][1].modules() if not [*part.children()]]
    inside = [leaf.register_forward_pre_hook(lambda *_: ran.append(True)) for leaf in leaves]
    return [*inside, module.register_forward_hook(after, with_kwargs=True)]


@contextmanager
def taken_off(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove torch's hooks afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
