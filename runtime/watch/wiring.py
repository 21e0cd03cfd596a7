"""How a denoiser is wired around its block stack, and where a tensor of a watched forward comes from."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from runtime.watch.places import Place, call_tensors, mapped, tensors

# Functions that only select or rearrange elements: replayed on the stack's input, they give what would stand at the
# exit if the blocks passed it through.
_SELECTING = re.compile(
    r"^(__getitem__|narrow|select|index_select|view|view_as|reshape|reshape_as|flatten|unflatten|permute|transpose|t|"
    r"swapaxes|movedim|squeeze|unsqueeze|contiguous|chunk|split|tensor_split|unbind)$"
)
# Functions that take only shape, dtype or device from their other tensors.
_LIKE = frozenset({"type_as", "to", "view_as", "reshape_as", "expand_as"})
_FRESH = re.compile(r"_like$|^new_")
Marked = tuple[Place, Tensor, "Mark"]


@dataclass(frozen=True)
class Selection:
    """One selecting call, with the index of the result where the function returns several tensors."""

    function: Callable
    args: tuple
    kwargs: dict
    index: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.function(tensor, *self.args, **self.kwargs)
        return result if self.index is None else result[self.index]


@dataclass(frozen=True)
class Carried:
    """The block's result that a tensor carries.

    Attributes:
        origin: Shape of that result.
        source: Its place among the block's results.
        selections: Selecting calls since the block; ``None`` where they cannot be replayed.
    """

    origin: torch.Size
    source: Place
    selections: tuple[Selection, ...] | None = ()


@dataclass(frozen=True)
class Mark:
    """What is known of where a tensor comes from.

    Attributes:
        sources: What it depends on: ``time``, ``latents``.
        carried: The block's result that it carries, if any.
        exits: The exits that it has passed.
    """

    sources: frozenset[str] = frozenset()
    carried: Carried | None = None
    exits: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and device of one tensor that a skipped block stands in for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
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

    module: Module
    call: int
    place: Place
    spec: Spec
    base: Place | None = None
    selections: tuple[Selection, ...] = ()

    def selected(self, base: Tensor) -> Tensor:
        """The stream at the stack's entry as it would stand at this exit."""
        for selection in self.selections:
            base = selection(base)
        return base


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
    outputs: dict[tuple[Module, int], Any] = field(default_factory=dict)
    time_embedding: Place | None = None
    primary: Place = ("args", 0)

    def is_sole(self, index: int) -> bool:
        """Whether no other exit has the same entry."""
        return [exit.base for exit in self.exits].count(self.exits[index].base) == 1

    def placeholder(self, block: Module, call: int, made: dict[Spec, Tensor]) -> Any:
        """What a skipped block returns: its last result's structure, filled with zeros that nobody reads.

        ``made`` holds the zeros of this forward; all blocks share them, and may well write into them.
        """

        def stand_in(spec: Spec) -> Tensor:
            return made[spec] if spec in made else made.setdefault(spec, spec.make())

        return mapped(self.outputs[block, call], stand_in, leaf=Spec)


class Follow(TorchFunctionMode):
    """Carries the marks of inputs over to results, for every torch function called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def marked(self, *trees: Any) -> list[Marked]:
        """The tensors of a call (its arguments and keyword arguments) that have a mark."""
        return [
            (place, tensor, self.marks[tensor])
            for place, tensor in call_tensors(*trees)
            if tensor in self.marks
        ]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        marked = self.marked(args[:1] if name in _LIKE else args, kwargs)
        if not marked or _FRESH.search(name):
            return result
        marks = [mark for _, _, mark in marked]
        merged = Mark(
            sources=frozenset().union(*(mark.sources for mark in marks)),
            exits=frozenset().union(*(mark.exits for mark in marks)),
        )
        if name == "__setitem__":
            written = next((mark.carried for mark in marks if mark.carried), None)
            self.marks[args[0]] = replace(merged, carried=written)
            return result
        for place, tensor in tensors(result):
            selects = _SELECTING.search(name)
            selection = Selection(func, args[1:], kwargs, place[0] if place else None)
            carried = _carried(marked, tensor.shape, selection if selects else None)
            self.marks[tensor] = replace(merged, carried=carried)
        return result


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
    sole = len(carriers) == 1 and place == ("args", 0)
    if sole and selection is not None and carried.selections is not None:
        return replace(carried, selections=(*carried.selections, selection))
    # Element by element: a cast, a sum, a norm.
    alike = [other for _, tensor, other in carriers if tensor.shape == shape]
    return alike[0] if alike else replace(carried, selections=None)
