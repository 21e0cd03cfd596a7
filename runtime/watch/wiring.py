"""How a denoiser is wired around its block stack, learned by watching one computed step instead of reading its code.

While the forward runs, a :class:`torch.overrides.TorchFunctionMode` follows the tensors that come out of the blocks
through slices, casts and additions until they enter a module that is no block: that is the *exit* of the stack, and
what enters there is what a skipped step must replace. Exits whose results never reach the model's output (a text
stream that is normalised and dropped) need nothing. Inside the blocks nothing is followed.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from runtime.errors import UnsupportedModel
from runtime.watch.places import Place, call_tensors, mapped, tensors
from runtime.watch.scheduler import is_time

# Functions that only select or rearrange elements: replayed on the stack's input, they give what would stand at the
# exit if the blocks passed it through.
_SELECTING = re.compile(
    r"^(__getitem__|narrow|select|index_select|view|view_as|reshape|reshape_as|flatten|unflatten|permute|transpose|t|"
    r"swapaxes|movedim|squeeze|unsqueeze|contiguous|chunk|split|tensor_split|unbind)$"
)
# Functions that take only shape, dtype or device from their other tensors.
_LIKE = frozenset({"type_as", "to", "view_as", "reshape_as", "expand_as"})
_FRESH = re.compile(r"_like$|^new_")
_LATENTS = re.compile(r"^(x|sample)$|^(audio_|video_|vision_)?hidden_states$|latents$|_tokens$")


@dataclass(frozen=True)
class Selection:
    """One selecting call, with the index of the result where the function returns several tensors."""

    function: Callable
    args: tuple
    kwargs: dict
    index: int | None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        result = self.function(tensor, *self.args, **self.kwargs)
        return result if self.index is None else result[self.index]


@dataclass(frozen=True)
class Mark:
    """What is known of where a tensor comes from.

    Attributes:
        from_time, from_latents: Depends on the timestep / on the latents.
        selections: Set on tensors that carry a block's result: the selecting calls since the block; ``None`` where
            they cannot be replayed.
        origin: Shape of the block's result that it carries; ``None`` on tensors that carry none.
        source: Which of the block's results that is: its place among them.
        exits: The exits that this tensor has passed.
    """

    from_time: bool = False
    from_latents: bool = False
    origin: tuple[int, ...] | None = None
    source: Place = ()
    selections: tuple[Selection, ...] | None = ()
    exits: frozenset[int] = frozenset()

    @property
    def carries_stack(self) -> bool:
        return self.origin is not None


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and device of one tensor that a skipped block stands in for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def make(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spec":
        return cls(tensor.shape, tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Exit:
    """A place where the stack's result leaves it.

    Attributes:
        module: The module that receives the result, and ``call``, which call of it within one forward.
        place: Where in that module's arguments the result stands, and ``spec``, what it looks like.
        base: Where in the first block's arguments the same stream enters the stack; ``None`` where nothing of a
            matching shape does, so that the whole value is reused and not a residual.
        selections: Selecting calls that bring the base to the shape at the exit.
    """

    module: torch.nn.Module
    call: int
    place: Place
    spec: Spec
    base: Place | None = None
    selections: tuple[Selection, ...] = ()

    def entry(self, args: tuple, kwargs: dict, at: Callable) -> torch.Tensor | None:
        """The stream at the stack's entry as it would stand at this exit; ``None`` without a base."""
        if self.base is None:
            return None
        value = at(self.base, args, kwargs)
        for selection in self.selections:
            value = selection(value)
        return value


@dataclass
class Wiring:
    """What one watched forward has shown.

    Attributes:
        exits: Where the stack's results leave it, the primary stream first.
        outputs: ``(block, call) -> result`` with every tensor replaced by its :class:`Spec`.
        time_embedding: Where in the first block's arguments the time embedding stands, if it is handed there.
        primary: Where in the first block's arguments the generated stream stands (of several, the first or largest).
    """

    exits: tuple[Exit, ...] = ()
    outputs: dict[tuple[torch.nn.Module, int], Any] = field(default_factory=dict)
    time_embedding: Place | None = None
    primary: Place = ("args", 0)

    def is_sole(self, index: int) -> bool:
        """Whether no other exit has the same entry."""
        return [found.base for found in self.exits].count(self.exits[index].base) == 1

    def placeholder(self, block: torch.nn.Module, call: int, made: dict[Spec, torch.Tensor]) -> Any:
        """What a skipped block returns: its last result's structure, filled with zeros that nobody reads.

        ``made`` holds the zeros of this forward; all blocks share them, and may well write into them.
        """

        def stand_in(spec: Spec) -> torch.Tensor:
            if spec not in made:
                made[spec] = spec.make()
            return made[spec]

        return mapped(self.outputs[block, call], stand_in, leaf=Spec)


class _Follow(TorchFunctionMode):
    """Carries the marks of inputs over to results, for every torch function called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        marked = [
            (place, tensor, mark)
            for place, tensor in call_tensors(args[:1] if name in _LIKE else args, kwargs)
            if (mark := self.marks.get(tensor)) is not None
        ]
        if marked and not _FRESH.search(name):
            self._carry(name, func, args, kwargs, marked, result)
        return result

    def _carry(
        self, name: str, func: Callable, args: tuple, kwargs: dict, marked: list, result: Any
    ) -> None:
        if name == "__setitem__":
            target = args[0]
            self.marks[target] = _merged([mark for _, _, mark in marked], tuple(target.shape))
            return
        several = isinstance(result, list | tuple)
        for place, tensor in tensors(result):
            mark = _merged([mark for _, _, mark in marked], tuple(tensor.shape))
            if mark.carries_stack:
                mark = replace(
                    mark,
                    **self._provenance(
                        name, func, args, kwargs, marked, tensor, place if several else ()
                    ),
                )
            self.marks[tensor] = mark

    def _provenance(
        self,
        name: str,
        func: Callable,
        args: tuple,
        kwargs: dict,
        marked: list,
        result: torch.Tensor,
        index: int | None,
    ) -> dict:
        """Which block's result the new tensor carries, and how its elements were selected since."""
        carriers = [(where, tensor, mark) for where, tensor, mark in marked if mark.carries_stack]
        where, _, mark = carriers[0]
        if (
            len(carriers) == 1
            and mark.selections is not None
            and _SELECTING.search(name)
            and where == ("args", 0)
        ):
            selection = Selection(func, args[1:], kwargs, index)
            return {
                "origin": mark.origin,
                "source": mark.source,
                "selections": (*mark.selections, selection),
            }
        for _, tensor, other in carriers:
            if tensor.shape == result.shape:  # element by element: a cast, a sum, a norm
                return {
                    "origin": other.origin,
                    "source": other.source,
                    "selections": other.selections,
                }
        return {"origin": mark.origin, "source": mark.source, "selections": None}


def _merged(marks: list[Mark], shape: tuple[int, ...]) -> Mark:
    carrier = next((mark for mark in marks if mark.carries_stack), None)
    return Mark(
        from_time=any(mark.from_time for mark in marks),
        from_latents=any(mark.from_latents for mark in marks),
        origin=None if carrier is None else carrier.origin,
        source=() if carrier is None else carrier.source,
        selections=None if carrier is None else carrier.selections,
        exits=frozenset().union(*(mark.exits for mark in marks)),
    )


class Observation:
    """Watches one computed forward of ``root`` and learns its :class:`Wiring`.

    Use: :meth:`begin` before the forward (or at the first block), :meth:`block` around every block,
    :meth:`finish` with the output. ``on_exit`` is called for every candidate exit, while its value is at hand.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        blocks: frozenset[torch.nn.Module],
        on_exit: Callable[[int, Exit, torch.Tensor], None],
    ) -> None:
        self.root, self.blocks, self.on_exit = root, blocks, on_exit
        self.wiring = Wiring()
        self._follow = _Follow()
        self._handles: list = []
        self._depth = self._floor = 0
        self._passed: frozenset[int] = frozenset()
        self._bases: dict[Place, Place | None] = {}
        self._exits: list[Exit] = []
        self._calls: dict[torch.nn.Module, int] = {}
        self._head: tuple[tuple, dict] | None = None
        self._active = False

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Start following; ``args`` and ``kwargs`` are the denoiser's own, to tell time from latents."""
        for name, tensor in _named(self.root, args, kwargs):
            if is_time(name) or _LATENTS.search(name):
                self._follow.marks[tensor] = Mark(
                    from_time=is_time(name), from_latents=not is_time(name)
                )
        inside = {module for block in self.blocks for module in block.modules()}
        for module in self.root.modules():
            if module is not self.root and module not in inside:
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
        self._follow.__enter__()
        self._active = True

    def head(self, args: tuple, kwargs: dict) -> None:
        """The first block's arguments: where the streams enter."""
        self._head = (args, kwargs)
        self._floor = self._depth  # the stack may live inside a module of its own
        self.wiring.primary = self._generated(args, kwargs)
        for place, tensor in call_tensors(args, kwargs):
            mark = self._follow.marks.get(tensor)
            if (
                self.wiring.time_embedding is None
                and mark is not None
                and mark.from_time
                and not mark.from_latents
            ):
                self.wiring.time_embedding = place

    def _generated(self, args: tuple, kwargs: dict) -> Place:
        """Where what is generated enters: by its usual name, else the largest tensor that comes from the latents."""
        streams = {
            place: t
            for place, t in call_tensors(args, kwargs)
            if t.is_floating_point() and t.ndim > 1
        }
        named = [place for place in streams if place[-1] == "hidden_states"]
        from_latents = [
            place
            for place, t in streams.items()
            if (m := self._follow.marks.get(t)) and m.from_latents
        ]
        if not streams:
            raise UnsupportedModel(
                f"{type(self.root).__name__}: the first block receives no stream of hidden states; "
                "name another stack with blocks=[...]"
            )
        return (
            named[0]
            if named
            else max(from_latents or [next(iter(streams))], key=lambda p: streams[p].numel())
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is followed inside a block."""
        self._stop()
        try:
            yield
        finally:
            self._follow.__enter__()
            self._active = True

    def block(self, block: torch.nn.Module, call: int, result: Any) -> None:
        """A block has returned ``result``."""
        self.wiring.outputs[block, call] = mapped(result, Spec.of)
        for place, tensor in tensors(result):
            self._follow.marks[tensor] = Mark(origin=tuple(tensor.shape), source=place)

    def abort(self) -> None:
        """Stop following, whatever state the forward is in."""
        self._stop()
        while self._handles:
            self._handles.pop().remove()

    def _stop(self) -> None:
        if self._active:
            self._active = False
            self._follow.__exit__(None, None, None)

    def finish(self, output: Any) -> tuple[Wiring, list[int]]:
        """The wiring, and which of the reported exits it needs (indices in the order of ``on_exit``).

        Raises:
            UnsupportedModel: The stack's result reaches the output without passing a module.
        """
        self.abort()
        needed: set[int] = set()
        for _, tensor in tensors(output):
            mark = self._follow.marks.get(tensor)
            if mark is None:
                continue
            if mark.carries_stack:
                raise UnsupportedModel(
                    f"{type(self.root).__name__}: the blocks' result reaches the model's output without passing a "
                    "module after the stack, so there is no exit to override; name another stack with blocks=[...]"
                )
            needed |= mark.exits
        if not needed:
            raise UnsupportedModel(
                f"{type(self.root).__name__}: no module after the block stack receives its result; "
                "name the stack with blocks=[...]"
            )
        # What is generated comes first: some models send their text stream through an exit before it.
        order = sorted(
            needed, key=lambda index: (self._exits[index].base != self.wiring.primary, index)
        )
        self.wiring.exits = tuple(self._exits[index] for index in order)
        if any(found.base == self.wiring.time_embedding for found in self.wiring.exits):
            self.wiring.time_embedding = (
                None  # a stream that carries the time along is no embedding of it
            )
        return self.wiring, order

    # -- modules that are no blocks -------------------------------------------------------------------------------

    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self._depth += 1
        if self._head is None:
            return
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        if self._depth > self._floor + 1:
            return
        passed: set[int] = set()
        for place, tensor in call_tensors(args, kwargs):
            mark = self._follow.marks.get(tensor)
            if mark is not None and mark.carries_stack:
                found = self._exit(module, call, place, tensor, mark)
                self.on_exit(len(self._exits), found, tensor)
                passed.add(len(self._exits))
                self._exits.append(found)
        self._passed = frozenset(passed)

    def _leave(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._depth -= 1
        if self._head is None or self._depth > self._floor:
            return
        if (
            self._depth < self._floor
        ):  # the module around the stack returns: its results keep their marks
            self._floor = self._depth
            return
        known = [
            m for _, t in call_tensors(args, kwargs) if (m := self._follow.marks.get(t)) is not None
        ]
        exits = frozenset().union(self._passed, *(mark.exits for mark in known))
        for _, tensor in tensors(output):
            self._follow.marks[tensor] = Mark(exits=exits)

    def _exit(
        self, module: torch.nn.Module, call: int, place: Place, value: torch.Tensor, mark: Mark
    ) -> Exit:
        streams = [
            (where, tensor)
            for where, tensor in call_tensors(*self._head)
            if tensor.is_floating_point()
        ]
        taken = {base for source, base in self._bases.items() if source != mark.source}
        same = [where for where, tensor in streams if tensor.shape == value.shape]
        before = [where for where, tensor in streams if tuple(tensor.shape) == mark.origin]
        if same:
            base, selections = _preferred(same, taken), ()
        elif before and mark.selections:
            base, selections = _preferred(before, taken), mark.selections
        else:
            base, selections = None, ()
        self._bases[mark.source] = base
        return Exit(module, call, place, Spec.of(value), base, selections)


def _named(
    module: torch.nn.Module, args: tuple, kwargs: dict
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a call with the names of the parameters that they are passed to."""
    names = list(inspect.signature(module.forward).parameters)
    for place, tensor in call_tensors(args, kwargs):
        kind, key = place[0], place[1]
        yield (names[key] if kind == "args" and key < len(names) else str(key)), tensor


def _preferred(places: list[Place], taken: set[Place | None]) -> Place:
    """The stream among equally shaped arguments: one that no other exit has, by its usual name, else the first."""
    free = [place for place in places if place not in taken] or places
    return next((place for place in free if place[-1] == "hidden_states"), free[0])
