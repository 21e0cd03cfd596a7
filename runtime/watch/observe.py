"""Watches one computed forward of a denoiser and learns how it is wired around its block stack.

While the forward runs, a :class:`torch.overrides.TorchFunctionMode` follows the tensors that come out of the blocks
through slices, casts and additions until they enter a module that is no block: that is the *exit* of the stack, and
what enters there is what a skipped step must replace. Exits whose results never reach the model's output (a text
stream that is normalised and dropped) need nothing. Inside the blocks nothing is followed.
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.nn import Module

from runtime.errors import UnsupportedModel
from runtime.watch.places import Place, mapped, streams, tensors
from runtime.watch.scheduler import is_time
from runtime.watch.wiring import (
    Carried,
    Exit,
    Follow,
    Mark,
    Marked,
    Selection,
    Spec,
    Wiring,
)

_LATENTS = re.compile(
    r"^(x|sample)$|^(audio_|video_|vision_)?hidden_states$|latents$|_tokens$"
)


class Observation:
    """Watches one computed forward of ``root`` and learns its :class:`Wiring`.

    Use: :meth:`begin` before the forward (or at the first block), :meth:`block` around every block,
    :meth:`finish` with the output. ``on_exit`` is called for every candidate exit, while its value is at hand.
    """

    def __init__(
        self,
        root: Module,
        blocks: list[Module],
        on_exit: Callable[[int, Exit, Tensor], None],
    ) -> None:
        self.root, self.blocks, self.on_exit = root, blocks, on_exit
        self.wiring = Wiring()
        self._follow = Follow()
        self._following, self._hooks = ExitStack(), ExitStack()
        self._depth = self._floor = 0
        self._passed: frozenset[int] = frozenset()
        self._bases: dict[Place, Place | None] = {}
        self._exits: list[Exit] = []
        self._calls: Counter[Module] = Counter()
        self._streams: dict[Place, Tensor] | None = None

    def begin(self, named: dict[str, Any]) -> None:
        """Start following; ``named`` are the denoiser's arguments, to tell time from latents."""
        for name, value in named.items():
            source = "time" if is_time(name) else "latents"
            if source == "time" or _LATENTS.search(name):
                for _, tensor in tensors(value):
                    self._follow.marks[tensor] = Mark(sources=frozenset({source}))
        inside = {
            self.root,
            *(module for block in self.blocks for module in block.modules()),
        }
        for module in self.root.modules():
            if module not in inside:
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(
                    self._leave, with_kwargs=True, always_call=True
                )
                self._hooks.enter_context(before)
                self._hooks.enter_context(after)
        self._following.enter_context(self._follow)

    def head(self, args: tuple, kwargs: dict) -> None:
        """The first block's arguments: where the streams enter."""
        self._streams = streams(args, kwargs)
        self._floor = self._depth  # the stack may live inside a module of its own
        marked = self._follow.marked(args, kwargs)
        self.wiring.primary = self._generated(marked)
        of_time = (place for place, _, mark in marked if mark.sources == {"time"})
        self.wiring.time_embedding = next(of_time, None)

    def _generated(self, marked: list[Marked]) -> Place:
        """Where what is generated enters: by its usual name, else the largest tensor that comes from the latents."""
        entering = self._streams
        if not entering:
            raise UnsupportedModel(
                f"{type(self.root).__name__}: the first block receives no stream of hidden states; "
                "name another stack with blocks=[...]"
            )
        named = [place for place in entering if place[-1] == "hidden_states"]
        if named:
            return named[0]
        latents = [p for p, _, mark in marked if "latents" in mark.sources and p in entering]
        return max(latents or list(entering)[:1], key=lambda place: entering[place].numel())

    def block(self, block: Module, call: int, run: Callable[[], Any]) -> Any:
        """Run a block, inside of which nothing is followed."""
        self._following.close()
        try:
            result = run()
        finally:
            self._following.enter_context(self._follow)
        self.wiring.outputs[block, call] = mapped(result, Spec.of)
        for place, tensor in tensors(result):
            carried = Carried(origin=tensor.shape, source=place)
            self._follow.marks[tensor] = Mark(carried=carried)
        return result

    def abort(self) -> None:
        """Stop following, whatever state the forward is in."""
        self._following.close()
        self._hooks.close()

    def finish(self, output: Any) -> tuple[Wiring, list[int]]:
        """The wiring, and which of the reported exits it needs (indices in the order of ``on_exit``).

        Raises:
            UnsupportedModel: The stack's result reaches the output without passing a module.
        """
        self.abort()
        reached = [mark for _, _, mark in self._follow.marked((output,), {})]
        needed = frozenset().union(*(mark.exits for mark in reached))
        if not needed or any(mark.carried for mark in reached):
            raise UnsupportedModel(
                f"{type(self.root).__name__}: the blocks' result reaches the model's output without passing a "
                "module after the stack, so there is no exit to override; name another stack with blocks=[...]"
            )
        # What is generated comes first: some models send their text stream through an exit before it.
        wiring = self.wiring
        order = sorted(
            needed, key=lambda index: (self._exits[index].base != wiring.primary, index)
        )
        wiring.exits = tuple(self._exits[index] for index in order)
        if wiring.time_embedding in [exit.base for exit in wiring.exits]:
            # A stream that carries the time along is no embedding of it.
            wiring.time_embedding = None
        return wiring, order

    # -- modules that are no blocks -------------------------------------------------------------------------------

    def _enter(self, module: Module, args: tuple, kwargs: dict) -> None:
        self._depth += 1
        if self._streams is None:
            return
        self._calls[module] += 1
        if self._depth > self._floor + 1:
            return
        first = len(self._exits)
        for place, tensor, mark in self._follow.marked(args, kwargs):
            if mark.carried:
                base, selections = self._base(tensor, mark.carried)
                number = self._calls[module] - 1
                exit = Exit(module, number, place, Spec.of(tensor), base, selections)
                self.on_exit(len(self._exits), exit, tensor)
                self._exits.append(exit)
        self._passed = frozenset(range(first, len(self._exits)))

    def _leave(self, module: Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._depth -= 1
        if self._streams is None or self._depth > self._floor:
            return
        if self._depth < self._floor:
            # The module around the stack returns: its results keep their marks.
            self._floor = self._depth
            return
        received = self._follow.marked(args, kwargs)
        exits = self._passed.union(*(mark.exits for _, _, mark in received))
        for _, tensor in tensors(output):
            self._follow.marks[tensor] = Mark(exits=exits)

    def _base(
        self, value: Tensor, carried: Carried
    ) -> tuple[Place | None, tuple[Selection, ...]]:
        """Where the stream that leaves as ``value`` entered, and what was selected of it since."""
        entering = self._streams or {}
        taken = {base for source, base in self._bases.items() if source != carried.source}
        same = [place for place, tensor in entering.items() if tensor.shape == value.shape]
        before = [
            place for place, tensor in entering.items() if tensor.shape == carried.origin
        ]
        selections = () if same else carried.selections or ()
        places = same or (before if selections else [])
        # One that no other exit has, by its usual name, else the first.
        free = [place for place in places if place not in taken] or places
        named = [place for place in free if place[-1] == "hidden_states"]
        base = next(iter(named or free), None)
        self._bases[carried.source] = base
        return base, selections if base else ()
