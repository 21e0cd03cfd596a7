"""Where in a generation a denoiser call stands, read without waiting for the device wherever that is possible."""

import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from runtime.decide.tracker import CallInfo, Times
from runtime.watch.blocks import Blocks
from runtime.watch.places import tensors

# How denoisers call the argument that says where in the schedule they are, the usual name first.
_TIME = re.compile(r"^(timesteps?|t|time|sigma)$|_timesteps?$|_time$")
_CONDITIONING = re.compile(
    r"encoder|prompt|pooled|text|caption|cap_feats|class_labels|input_ids|embeds|cond"
)


class OwnLoop:
    """Denoisers that a sampling loop of the caller's own drives, where functions expect a pipeline.

    Args:
        modules: One denoiser, or several by name.
        scheduler: An object whose ``timesteps`` is made anew for every generation, one element a step; ``step_index``
            and ``sigmas`` (one noise level a step and one after the last) are read where it has them, as those of
            diffusers have. ``None``: steps are counted from the denoiser's calls, and there are no noise levels.
        blocks: Names the block stack of a denoiser in which it cannot be found.
    """

    def __init__(
        self,
        modules: Module | Mapping[str, Module],
        scheduler: Any = None,
        blocks: Blocks | None = None,
    ) -> None:
        if isinstance(modules, Module):
            modules = {"transformer": modules}
        self.modules = dict(modules)
        self.scheduler = scheduler
        self.blocks = blocks

    @property
    def driver(self) -> "OwnLoop | None":
        """Itself where it has a scheduler to read; ``None`` for a bare loop."""
        return None if self.scheduler is None else self


class SchedulerClock:
    """Reads a pipeline's scheduler: its schedule, the step it is at, the length, the noise level.

    The scheduler's public ``timesteps``, ``step_index`` and ``sigmas`` are looked at. A new ``timesteps`` tensor is a
    new generation.

    Args:
        pipeline: Whose scheduler to read; ``None`` where nothing drives the denoiser that could be asked.
        num_steps: Length of the schedule where there is no scheduler to ask.
    """

    def __init__(self, pipeline: Any = None, num_steps: int | None = None) -> None:
        self.pipeline, self._stated_steps = pipeline, num_steps
        self._timesteps: Any = None
        self._sigmas: Any = None
        self._levels: list[float] = []
        self._generation = 0

    @property
    def _scheduler(self) -> Any:
        return getattr(self.pipeline, "scheduler", None)

    def call_info(self, named: dict[str, Any], context: str | None) -> CallInfo:
        """What is known of a denoiser call with the arguments ``named`` in the cache context ``context``."""
        scheduler = self._scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:
            # Kept, so that no other tensor can be given its identity.
            self._timesteps, self._generation = timesteps, self._generation + 1
        index = None  # DDIM and its like keep no count
        if hasattr(scheduler, "step_index"):
            # Before the first step there may be a place to begin at (image to image).
            begins_at = getattr(scheduler, "begin_index", None) or 0
            index = int(begins_at if scheduler.step_index is None else scheduler.step_index)
        return CallInfo(
            context=context,
            schedule=None if self.pipeline is None else self._generation,
            step_index=index,
            num_steps=self._stated_steps if timesteps is None else len(timesteps),
            timestep=lambda: _extent(timestep(named)),
            conditioning=frozenset(_identities(named)),
        )

    def sigma(self, step: int) -> float | None:
        """Noise level of ``step``; ``None`` where the scheduler has no sigmas."""
        sigmas = getattr(self._scheduler, "sigmas", None)
        if sigmas is not self._sigmas:
            # They may lie on the device: read once per schedule, not once per step.
            self._sigmas = sigmas
            self._levels = [] if sigmas is None else sigmas.tolist()
        return self._levels[step] if step < len(self._levels) else None

    def level(self, step: int) -> float:
        """Abscissa of forecasts: the noise level, or minus the step where there is none."""
        sigma = self.sigma(step)
        return float(-step) if sigma is None else sigma


@contextmanager
def hooked_steps(
    pipeline: Any,
    on_step: Callable[[Tensor], Tensor] | None,
    on_stepped: Callable[[Any, Any, Any, Any], None] | None = None,
) -> Iterator[None]:
    """While ``on_step`` sees what a pipeline's schedulers receive as the model's output, and gives them its result.

    That is the prediction after guidance and whatever the pipeline does to it: the one quantity that the solver sees.
    A scheduler is hooked by its class, not by an attribute: pipelines copy schedulers, and the copy of an attribute
    would drive the original. Afterwards copies of them are left alone. ``None`` hooks nothing.

    ``on_stepped`` is told the scheduler, the prediction and the sample that its step received, and what it returned.
    """

    def subclass(own: Any) -> type:
        received = _step_arguments(own)

        @functools.wraps(own.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(received, args, strict=False)) | kwargs
            prediction = given.get(received[0])
            if on_step is not None and isinstance(prediction, Tensor):
                prediction = on_step(prediction)
                if args:
                    args = (prediction, *args[1:])
                else:
                    kwargs[received[0]] = prediction
            stepped = own.step(scheduler, *args, **kwargs)
            if on_stepped is not None:
                on_stepped(scheduler, prediction, given.get("sample"), stepped)
            return stepped

        names = {
            "step": step,
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
        }
        return type(own.__name__, (own,), names)

    components = getattr(pipeline, "components", None) or {}
    parts = [*components.values(), getattr(pipeline, "scheduler", None)]
    schedulers = {id(part): part for part in parts if hasattr(part, "set_timesteps")}
    hooked: list[tuple[Any, type, type]] = []
    try:
        for scheduler in schedulers.values() if on_step or on_stepped else ():
            own = type(scheduler)
            scheduler.__class__ = subclass(own)
            hooked.append((scheduler, own, type(scheduler)))
        yield
    finally:
        on_step = on_stepped = None
        for scheduler, own, replaced in hooked:
            if type(scheduler) is replaced:
                scheduler.__class__ = own


def _step_arguments(own: Any) -> list[str]:
    """Names of what a scheduler's step receives; a step of ``*args`` receives what the step that it overrides does."""
    steps = [own.step, *(base.step for base in own.__mro__ if hasattr(base, "step"))]
    received = [list(inspect.signature(step).parameters.values())[1:] for step in steps]
    named = (
        them for them in received if them[0].kind is not inspect.Parameter.VAR_POSITIONAL
    )
    return [parameter.name for parameter in next(named, received[0])]


def is_time(name: str) -> bool:
    """Whether a denoiser's argument of this name carries the timestep."""
    return _TIME.search(name) is not None


def timestep(named: dict[str, Any]) -> Any:
    """The argument of a denoiser that carries the timestep, as it was given."""
    names = ["timestep", *filter(is_time, named)]
    return next((named[name] for name in names if named.get(name) is not None), None)


def _extent(value: Any) -> Times | None:
    """Lowest and highest of the timesteps that a call was given."""
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else [value]
    times = [torch.as_tensor(part, dtype=torch.float32).detach().flatten() for part in parts]
    low, high = torch.stack(torch.aminmax(torch.cat(times))).tolist()
    return low, high


def _identities(named: dict[str, Any]) -> Iterator[Hashable]:
    """Conditioning tensors by their memory, which is held so that no other tensor can be given it meanwhile."""
    for name, value in named.items():
        if _CONDITIONING.search(name):
            for place, tensor in tensors(value):
                memory, offset = tensor.untyped_storage(), tensor.storage_offset()
                yield name, *place, memory, offset, tensor.shape
