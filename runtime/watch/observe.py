"""Watches one computed forward of a denoiser and learns how it is wired around its block stack.

While the forward runs, a :class:`torch.overrides.TorchFunctionMode` follows the tensors that come out of the blocks
through slices, casts and additions until they enter a module that is no block: that is the *exit* of the stack, and
what enters there is what a skipped step must replace. Exits whose results never reach the model's output (a text
stream that is normalised and dropped) need nothing. Inside the blocks nothing is followed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from runtime.errors import UnsupportedModel
from runtime.watch.places import Arguments, Place, Streams, at, mapped, streams, tensors
from runtime.watch.scheduler import is_time
from runtime.watch.wiring import Carried, Exit, Mark, Selection, Spec, Wiring

_LATENTS = re.compile(
    r"^(x|sample)$|^(audio_|video_|vision_)?hidden_states$|latents$|_tokens$"
)

# Functions that only select or rearrange elements: replayed on the stack's input, they give what would stand at the
# exit if the blocks passed it through.
_SELECTING = re.compile(
    r"^(__getitem__|narrow|select|index_select|view|view_as|reshape|reshape_as|flatten|unflatten|permute|transpose|t|"
    r"swapaxes|movedim|squeeze|unsqueeze|contiguous|chunk|split|tensor_split|unbind)$"
)
# Functions that take only shape, dtype or device from their other tensors.
_LIKE = frozenset({"type_as", "to", "view_as", "reshape_as", "expand_as"})
_FRESH = re.compile(r"_like$|^new_")
Marked = tuple[Place, Tensor, Mark]


class Observation(TorchFunctionMode):
    """Watches one computed forward of ``root`` and learns its :class:`Wiring`.

    Use: make it before the forward (or at the first block) with the denoiser's arguments by ``named``, then
    :meth:`head`, :meth:`block` around every block, and :meth:`finish` with the output. ``on_exit`` is called at every
    exit that comes in question.

    Attributes:
        left: Copies of what left the stack, at every exit that came in question.
        entering: What may be a stream among the first block's arguments, once it was called.
        time_embedding: Where in the first block's arguments the time embedding stands, if it is handed there.
    """

    def __init__(
        self,
        root: Module,
        blocks: Iterable[Module],
        named: dict[str, Any],
        on_exit: Callable[[], None],
    ) -> None:
        super().__init__()
        self._on_exit = on_exit
        self.root, self.wiring = root, Wiring()
        self.left: dict[Exit, Tensor] = {}
        self.entering: Streams | None = None
        self.time_embedding: Place | None = None
        self._marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._following, self._hooks = ExitStack(), ExitStack()
        self._depth = self._floor = 0
        self._passed: frozenset[Exit] = frozenset()
        self._bases: dict[Place, Place | None] = {}
        self._calls: Counter[Module] = Counter()
        # What the arguments are called tells time from latents.
        for name, value in named.items():
            source = "time" if is_time(name) else "latents"
            if source == "time" or _LATENTS.search(name):
                for _, tensor in tensors(value):
                    self._marks[tensor] = Mark(sources=frozenset({source}))
        inside = {root, *(module for block in blocks for module in block.modules())}
        for module in root.modules():
            if module not in inside:
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(
                    self._leave, with_kwargs=True, always_call=True
                )
                self._hooks.enter_context(before)
                self._hooks.enter_context(after)
        self._following.enter_context(self)

    def head(self, arguments: Arguments) -> None:
        """The first block's arguments: where the streams enter."""
        self.entering = streams(arguments)
        self._floor = self._depth  # the stack may live inside a module of its own
        marked = self._marked(arguments)
        self.wiring.primary = self._generated(self.entering, marked)
        of_time = (place for place, _, mark in marked if mark.sources == {"time"})
        self.time_embedding = next(of_time, None)

    def _generated(self, entering: Streams, marked: list[Marked]) -> Place:
        """Where what is generated enters: by its usual name, else the largest tensor that comes from the latents."""
        if not entering:
            raise UnsupportedModel(
                f"{type(self.root).__name__}: the first block receives no stream of hidden states; "
                "name another stack with blocks=[...]"
            )
        latents = [p for p, _, mark in marked if "latents" in mark.sources and p in entering]
        largest = max(
            latents or list(entering)[:1], key=lambda place: entering[place].numel()
        )
        return next(filter(_has_usual_name, entering), largest)

    def block(self, block: Module, call: int, run: Callable[[], Any]) -> Any:
        """Run a block, inside of which nothing is followed."""
        self._following.close()
        try:
            result = run()
        finally:
            self._following.enter_context(self)
        self.wiring.outputs[block, call] = mapped(result, Spec.of)
        for place, tensor in tensors(result):
            carried = Carried(origin=tensor.shape, source=place)
            self._marks[tensor] = Mark(carried=carried)
        return result

    def abort(self) -> None:
        """Stop following, whatever state the forward is in."""
        self._following.close()
        self._hooks.close()

    def finish(self, output: Any) -> Wiring:
        """The wiring, with those of the candidate exits that the output needs.

        Raises:
            UnsupportedModel: The stack's result reaches the output without passing a module.
        """
        self.abort()
        reached = [mark for _, _, mark in self._marked(output)]
        needed = frozenset().union(*(mark.exits for mark in reached))
        if not needed or any(mark.carried for mark in reached):
            raise UnsupportedModel(
                f"{type(self.root).__name__}: the blocks' result reaches the model's output without passing a "
                "module after the stack, so there is no exit to override; name another stack with blocks=[...]"
            )
        # What is generated comes first: some models send their text stream through an exit before it.
        exits = [exit for exit in self.left if exit in needed]
        exits.sort(key=lambda exit: exit.base != self.wiring.primary)
        self.wiring.exits = tuple(exits)
        if self.time_embedding in [exit.base for exit in exits]:
            self.time_embedding = None  # a stream that carries the time along
        return self.wiring

    # -- modules that are no blocks -------------------------------------------------------------------------------

    def _enter(self, module: Module, args: tuple, kwargs: dict) -> None:
        self._depth += 1
        if self.entering is None:
            return
        self._calls[module] += 1
        if self._depth > self._floor + 1:
            return
        before, number = set(self.left), self._calls[module] - 1
        for place, tensor, mark in self._marked((args, kwargs)):
            if mark.carried:
                base, selections = self._base(self.entering, tensor, mark.carried)
                exit = Exit(module, number, place, Spec.of(tensor), base, selections)
                self._on_exit()
                self.left[exit] = tensor.detach().clone()
        self._passed = frozenset(self.left.keys() - before)

    def _leave(self, module: Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._depth -= 1
        if self.entering is None or self._depth > self._floor:
            return
        if self._depth < self._floor:
            # The module around the stack returns: its results keep their marks.
            self._floor = self._depth
            return
        received = self._marked((args, kwargs))
        exits = self._passed.union(*(mark.exits for _, _, mark in received))
        for _, tensor in tensors(output):
            self._marks[tensor] = Mark(exits=exits)

    def _base(
        self, entering: Streams, value: Tensor, carried: Carried
    ) -> tuple[Place | None, tuple[Selection, ...]]:
        """Where the stream that leaves as ``value`` entered, and what was selected of it since."""

        def of_shape(shape: tuple[int, ...]) -> list[Place]:
            return [place for place, tensor in entering.items() if tensor.shape == shape]

        places = of_shape(value.shape)
        selections = () if places else carried.selections or ()
        if selections:
            places = of_shape(carried.origin)
        # One that no other exit has, by its usual name, else the first.
        taken = {base for source, base in self._bases.items() if source != carried.source}
        free = [place for place in places if place not in taken] or places
        base = next(filter(_has_usual_name, free), free[0] if free else None)
        self._bases[carried.source] = base
        return base, selections if base else ()

    # -- torch functions, which carry the marks of their inputs over to their results -------------------------------

    def _marked(self, tree: Any) -> list[Marked]:
        """The tensors of a call's arguments or result that have a mark."""
        return [
            (place, tensor, self._marks[tensor])
            for place, tensor in tensors(tree)
            if tensor in self._marks
        ]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        marked = self._marked((args[:1] if name in _LIKE else args, kwargs))
        if not marked or _FRESH.search(name):
            return result
        marks = [mark for _, _, mark in marked]
        merged = Mark(
            sources=frozenset().union(*(mark.sources for mark in marks)),
            exits=frozenset().union(*(mark.exits for mark in marks)),
        )
        if name == "__setitem__":
            written = next((mark.carried for mark in marks if mark.carried), None)
            self._marks[args[0]] = replace(merged, carried=written)
            return result
        for place, tensor in tensors(result):
            selection = None
            if _SELECTING.search(name):
                selection = partial(_replayed, func, args[1:], kwargs, place)
            carried = _carried(marked, tensor.shape, selection)
            self._marks[tensor] = replace(merged, carried=carried)
        return result


def _has_usual_name(place: Place) -> bool:
    return place[-1] == "hidden_states"


def _replayed(
    function: Callable, others: tuple, named: dict, place: Place, tensor: Tensor
) -> Tensor:
    """What ``function``, which may return several tensors, selects of ``tensor``."""
    return at(place, function(tensor, *others, **named))


def _carried(
    marked: list[Marked], shape: torch.Size, selection: Selection | None
) -> Carried | None:
    """Which block's result a new tensor of ``shape`` carries, and how its elements were selected since."""
    carriers = [
        (place, tensor, mark.carried) for place, tensor, mark in marked if mark.carried
    ]
    if not carriers:
        return None
    place, _, carried = carriers[0]
    sole = len(carriers) == 1 and place == (0, 0)
    if sole and selection is not None and carried.selections is not None:
        return replace(carried, selections=(*carried.selections, selection))
    # Element by element: a cast, a sum, a norm.
    alike = [other for _, tensor, other in carriers if tensor.shape == shape]
    return alike[0] if alike else replace(carried, selections=None)
