"""One forward of a denoiser: what is known of it, how its signals are measured, and who is asked about it."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import Module

from runtime.decide.tracker import Position
from runtime.errors import UnsupportedModel
from runtime.watch.distance import l1_sums
from runtime.watch.observe import Observation
from runtime.watch.places import Arguments, Place, Streams, at, tensors
from runtime.watch.wiring import Exit, Spec, Wiring


class Trajectory:
    """What is kept between the steps of one CFG branch of one denoiser; handlers derive their own.

    Attributes:
        wiring: How the denoiser is wired, once a forward has shown it.
        conditions: What must not change from step to step.
        buffers: The previous step's tensors by name, written over step by step.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the past: the next step has nothing to be compared with."""
        self.wiring: Wiring | None = None
        self.conditions: tuple | None = None
        self.buffers: dict[str, Tensor] = {}

    def previous(self, name: str, like: Tensor) -> Tensor | None:
        """The tensor of the previous step, where it is comparable."""
        kept = self.buffers.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            return None
        return kept

    def keep(self, name: str, tensor: Tensor) -> None:
        """``tensor`` becomes the previous one."""
        kept = self.previous(name, tensor)
        if kept is None:
            self.buffers[name] = tensor.detach().clone()
        else:
            kept.copy_(tensor)

    def change(self, name: str, tensor: Tensor, needed: bool = True) -> Tensor | None:
        """The sums of the change since the previous step, where it is ``needed``; ``tensor`` becomes the previous one.

        See :func:`runtime.watch.distance.l1_sums`.
        """
        before = self.previous(name, tensor) if needed else None
        sums = None if before is None else l1_sums(tensor, before)
        self.keep(name, tensor)
        return sums


@dataclass(eq=False)
class Call:
    """One forward of the denoiser.

    Attributes:
        root: The denoiser.
        named: Its arguments by the names of its parameters.
        compiler: What ``torch.compile(model)`` runs the forward with.
        time_embedding: Where it stands in the first block's arguments, if it is known to.
        observation: Learns the wiring while the forward runs; ``None`` where it is known.
        decided, skip: Whether the first block was reached, and what was decided there.
        first_block: That block, its own forward, and its attention layers; ``arguments``: what it was called with.
        bases: The streams that enter the stack; copies where a block may change them in place.
        left: The exits that a computed step has passed.
        overrides: Values that skipped exits still have to be given.
        zeros: What skipped blocks return; all of them share one tensor of a kind, and may well write into it.
        counts: How often each module was called, within the forward and since the stack began.
    """

    root: Module
    trajectory: Trajectory
    position: Position
    named: dict[str, Any]
    compiler: Any
    time_embedding: Place | None
    observation: Observation | None = None
    decided: bool = False
    skip: bool = False
    first_block: tuple[Module, Callable, list[Module]] = field(init=False)
    arguments: Arguments = ((), {})
    bases: Streams = field(default_factory=dict)
    left: set[Exit] = field(default_factory=set)
    overrides: dict[Exit, Tensor] = field(default_factory=dict)
    zeros: Callable[[Spec], Tensor] = field(default_factory=lambda: cache(Spec.make))
    counts: Counter[Module] = field(default_factory=Counter)
    thread: int = field(default_factory=threading.get_ident)

    def count(self, module: Module) -> int:
        """Which call of ``module`` this is."""
        self.counts[module] += 1
        return self.counts[module] - 1

    @property
    def wiring(self) -> Wiring:
        """The wiring as far as it is known."""
        known = self.observation or self.trajectory
        assert known.wiring is not None
        return known.wiring

    def conditions(self, with_arguments: bool) -> tuple:
        """What must not change within a trajectory.

        Args:
            with_arguments: Look at the denoiser's arguments too: ranks may hold parts of unequal length, and only the
                shapes of the entire call change on all of them at once.
        """
        # Texts among the denoiser's arguments name modes (such as writing or reading a key-value cache).
        modes = [item for item in self.named.items() if isinstance(item[1], str)]
        seen = (self.arguments, self.named if with_arguments else None)
        shapes = [(place, Spec.of(tensor)) for place, tensor in tensors(seen)]
        return self.first_block[0], modes, shapes

    def keep_bases(self) -> None:
        """Look up the streams that enter the stack."""
        places = {exit.base for exit in self.wiring.exits if exit.base is not None}
        if self.observation is not None:
            places = set(self.observation.entering or ())
        for place in places:
            tensor = at(place, self.arguments)
            self.bases[place] = tensor if self.skip else tensor.detach().clone()

    def base(self, exit: Exit) -> Tensor | None:
        """The stream at the stack's entry as it would stand at ``exit``."""
        if exit.base is None:
            return None
        base = self.bases[exit.base]
        for selection in exit.selections:
            base = selection(base)
        return base


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

    def reached_exit(self) -> None:
        """While the wiring is being learned: a value leaves the stack, at an exit that may or may not matter."""

    def leave(self, call: Call, exit: Exit, value: Tensor, base: Tensor | None) -> None:
        """A computed step's value at an exit; ``base`` (the handler's to keep) is the stack's input there.

        While the wiring is being learned it comes after the forward, when the exits that matter are known.
        """
        raise NotImplementedError

    def enter(self, call: Call, exit: Exit, base: Tensor | None) -> Tensor:
        """A skipped step's value for an exit."""
        raise NotImplementedError

    def finish(self, call: Call, output: Any) -> Any:
        """The forward has returned ``output``; what is returned instead, ``None`` for ``output`` itself."""


def measured(call: Call, signal: str) -> Tensor | None:
    """The signal called ``signal`` (a key of ``coeffs.entry.signals.SIGNALS``); ``None`` where the model has none."""
    return _MEASURES[signal](call)


class _StopForward(BaseException):
    """Ends the probe at the first attention call. No Exception, so that no model's own handler swallows it."""


def _modulated_input(call: Call) -> Tensor:
    """The probe: the first block's own forward, stopped at its first attention call."""
    args, kwargs = call.arguments
    block, original, attention = call.first_block
    # A block that is an attention layer itself has no forward to stop: its input is the signal.
    if block in attention:
        return _hidden_states(call, args, kwargs)
    seen: list[Tensor] = []

    def stop(module: Module, inputs: tuple, named: dict) -> None:
        seen.append(_hidden_states(call, inputs, named))
        raise _StopForward

    handles = [
        module.register_forward_pre_hook(stop, with_kwargs=True) for module in attention
    ]
    try:
        # Without the graph that compile_blocks() made of it: a graph knows no hooks that come and go.
        getattr(original, "uncompiled", original)(*args, **kwargs)
    except _StopForward:
        return seen[0]
    finally:
        for handle in handles:
            handle.remove()
    raise UnsupportedModel(
        f"{type(call.root).__name__}: the first block ({type(block).__name__}) ran without calling any of its "
        "attention layers, so there is no modulated input to watch; name another stack with blocks=[...]"
    )


def _hidden_states(call: Call, args: tuple, kwargs: dict) -> Tensor:
    """What an attention layer receives as hidden states: by name, else the tensor shaped like what is generated."""
    value = kwargs.get("hidden_states")
    if isinstance(value, Tensor):
        return value
    generated = at(call.wiring.primary, call.arguments)
    received = [tensor for _, tensor in tensors((args, kwargs))]
    return next(
        (tensor for tensor in received if tensor.shape == generated.shape), received[0]
    )


def _time_embedding(call: Call) -> Tensor | None:
    place = call.time_embedding
    return None if place is None else at(place, call.arguments)


# One for each of coeffs.entry.signals.SIGNALS, by its name.
_MEASURES: dict[str, Callable[[Call], Tensor | None]] = {
    "modulated_input": _modulated_input,
    "time_embedding": _time_embedding,
}
