"""One forward of a denoiser: what is known of it, how its signals are measured, and who is asked about it."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from runtime.decide.tracker import Position
from runtime.errors import UnsupportedModel
from runtime.watch.observe import Observation
from runtime.watch.places import Place, at, call_tensors, signature
from runtime.watch.scheduler import Locator
from runtime.watch.wiring import Spec, Wiring


class Trajectory:
    """What is kept between the steps of one CFG branch of one denoiser; handlers derive their own."""

    wiring: Wiring | None = None
    signature: tuple | None = None

    def restart(self) -> None:
        """Forget the past: the next step has nothing to be compared with."""
        self.wiring = None
        self.signature = None


class Call:
    """One forward of the denoiser.

    Attributes:
        root: The denoiser.
        locator: Tells noise levels and timesteps.
        time_embedding: Where it stands in the first block's arguments, if that is known.
        compiler: What ``torch.compile(model)`` runs the forward with.
        decided, skip: Whether the first block was reached, and what was decided there.
        observation: Learns the wiring while the forward runs; ``None`` where it is known.
        bases: Copies of the streams that enter the stack.
        results: What the handler made of each exit's value.
        overrides: Values that skipped exits still have to be given.
        stand_ins: Zeros that skipped blocks return.
        head: The first block's arguments, ``stream`` the shape of what is generated there.
        probe: Runs the first block up to its first attention call and gives the modulated input.
    """

    probe: Callable[[], Tensor]

    def __init__(
        self,
        root: Module,
        locator: Locator,
        trajectory: Trajectory,
        position: Position,
        args: tuple,
        kwargs: dict,
    ) -> None:
        self.root, self.locator = root, locator
        self.trajectory, self.position = trajectory, position
        self.args, self.kwargs = args, kwargs
        self.time_embedding: Place | None = None
        self.compiler: Any = None
        self.decided = self.skip = False
        self.observation: Observation | None = None
        self.bases: dict[Place, Tensor] = {}
        self.results: dict[int, Any] = {}
        self.overrides: dict[int, Tensor] = {}
        self.stand_ins: dict[Spec, Tensor] = {}
        self.head: tuple[tuple, dict] = ((), {})
        self.stream: torch.Size = torch.Size()
        self.thread = threading.get_ident()
        self._counts: dict[Module, int] = {}

    def count(self, module: Module) -> int:
        """Which call of ``module`` this is, within the forward and since the stack began."""
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        return number

    @property
    def wiring(self) -> Wiring:
        """The wiring as far as it is known."""
        if self.observation is not None:
            return self.observation.wiring
        assert self.trajectory.wiring is not None
        return self.trajectory.wiring

    def conditions(self, block: Module, whole: bool) -> tuple:
        """What must not change within a trajectory.

        Args:
            whole: Look at the denoiser's arguments too: ranks may hold parts of unequal length, and only the whole
                call's shapes change on all of them at once.
        """
        # Texts among the denoiser's arguments name modes (such as writing or reading a key-value cache).
        modes = tuple(item for item in self.kwargs.items() if isinstance(item[1], str))
        outer = signature(self.args, self.kwargs) if whole else None
        return block, signature(*self.head), modes, outer

    def keep_bases(self) -> None:
        """Copy the streams that enter the stack, since a block may change its input in place."""
        if self.observation is None:
            bases = {exit.base for exit in self.wiring.exits if exit.base is not None}
            streams = [(place, at(place, *self.head)) for place in bases]
        else:
            streams = [
                (place, tensor)
                for place, tensor in call_tensors(*self.head)
                if tensor.is_floating_point() and tensor.ndim > 1
            ]
        self.bases = {place: tensor.detach().clone() for place, tensor in streams}


class Handler:
    """What is done with what the hooks see: the cache decides and reuses, the recorder measures."""

    def begin(self, position: Position) -> None:
        """A generation begins."""

    def end(self) -> None:
        """The generation is over: free what was kept."""

    def new_trajectory(self, branch: str) -> Trajectory:
        """What is kept of a branch that is called for the first time."""
        raise NotImplementedError

    def open(self, call: Call) -> None:
        """A forward begins."""

    def decide(self, call: Call, changed: bool) -> bool:
        """At the first block: whether to skip. ``changed``: not the shapes or modes of the step before."""
        raise NotImplementedError

    def leave(self, call: Call, index: int, value: Tensor, base: Tensor | None) -> Any:
        """A computed step's value at exit ``index``; ``base`` (the handler's to keep) is the stack's input there."""
        raise NotImplementedError

    def keep(self, call: Call, results: list[Any]) -> None:
        """What :meth:`leave` returned for the exits that matter, once all are known."""

    def enter(self, call: Call, index: int, base: Tensor | None) -> Tensor:
        """A skipped step's value for exit ``index``."""
        raise NotImplementedError

    def finish(self, call: Call, output: Any) -> Any:
        """The forward has returned ``output``; what is returned instead, ``None`` for ``output`` itself."""


class Trajectories:
    """The trajectories of one denoiser in the generation under way, by CFG branch.

    Attributes:
        siblings: Those of the pipeline's other denoisers, which may share its schedule.
    """

    def __init__(self, locator: Locator, handler: Handler) -> None:
        self.locator, self.siblings = locator, list[Trajectories]()
        self.branches: dict[str, Trajectory] = {}
        self._handler = handler
        self._step = -1
        self._schedule: Hashable | None = None

    def clear(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        self.branches.clear()
        self.locator.reset()
        self._handler.end()

    def call(self, root: Module, args: tuple, kwargs: dict) -> Call:
        """A call of ``root`` with these arguments: its trajectory, and where in the generation it stands."""
        position = self.locator.locate(args, kwargs)
        if position.new_generation:
            for other in self.siblings:  # an aborted generation may have left them in the middle
                if other._schedule != position.schedule:
                    other.branches.clear()
            self._schedule = position.schedule
            self.branches.clear()
            self._handler.begin(position)
        if position.step != self._step:
            self._step = position.step
            for other in self.siblings:  # another expert's part of the schedule is over
                if other._step < position.step - 1:
                    other.branches.clear()
        if position.branch not in self.branches:
            self.branches[position.branch] = self._handler.new_trajectory(position.branch)
        trajectory = self.branches[position.branch]
        if not position.consecutive:
            trajectory.restart()
        return Call(root, self.locator, trajectory, position, args, kwargs)


def measured(call: Call, signal: str) -> Tensor | None:
    """The signal called ``signal`` (a key of ``coeffs.entry.signals.SIGNALS``); ``None`` where the model has none."""
    return _MEASURES[signal](call)


def _time_embedding(call: Call) -> Tensor | None:
    # At the first step ever only what has been observed so far tells where it stands.
    place = call.time_embedding or call.wiring.time_embedding
    return None if place is None else at(place, *call.head)


_MEASURES: dict[str, Callable[[Call], Tensor | None]] = {
    "modulated_input": lambda call: call.probe(),
    "time_embedding": _time_embedding,
}


class StopForward(BaseException):
    """Ends the probe at the first attention call. No Exception, so that no model's own handler swallows it."""


def probed(call: Call, block: Module, original: Callable, attention: list[Module]) -> Tensor:
    """The modulated input: the first block's own forward, stopped at its first attention call."""
    args, kwargs = call.head
    # A block that is an attention layer itself has no forward to stop: its input is the signal.
    if block in attention:
        return _hidden_states(args, kwargs, call.stream)
    seen: list[Tensor] = []

    def stop(module: Module, inputs: tuple, named: dict) -> None:
        seen.append(_hidden_states(inputs, named, call.stream))
        raise StopForward

    handles = [module.register_forward_pre_hook(stop, with_kwargs=True) for module in attention]
    try:
        # Without the graph that compile_blocks() made of it: a graph knows no hooks that come and go.
        getattr(original, "uncompiled", original)(*args, **kwargs)
    except StopForward:
        return seen[0]
    finally:
        for handle in handles:
            handle.remove()
    raise UnsupportedModel(
        f"{type(call.root).__name__}: the first block ({type(block).__name__}) ran without calling any of its "
        "attention layers, so there is no modulated input to watch; name another stack with blocks=[...]"
    )


def _hidden_states(args: tuple, kwargs: dict, stream: torch.Size) -> Tensor:
    """What an attention layer receives as hidden states: by name, else the tensor shaped like the stream."""
    value = kwargs.get("hidden_states")
    if isinstance(value, Tensor):
        return value
    received = [tensor for _, tensor in call_tensors(args, kwargs)]
    return next((tensor for tensor in received if tensor.shape == stream), received[0])
