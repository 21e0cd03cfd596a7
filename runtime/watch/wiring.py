"""How a denoiser is wired around its block stack, and where a tensor of a watched forward comes from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from runtime.watch.places import Place

Selection = Callable[[Tensor], Tensor]  # one selecting call, to be replayed on another tensor


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
    exits: frozenset["Exit"] = frozenset()


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


@dataclass(frozen=True, eq=False)
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
    base: Place | None
    selections: tuple[Selection, ...]


@dataclass
class Wiring:
    """What one watched forward has shown.

    Attributes:
        exits: Where the stack's results leave it, the primary stream first.
        outputs: ``(block, call) -> result`` with every tensor replaced by its :class:`Spec`.
        primary: Where in the first block's arguments the generated stream stands (of several, the first or largest).
    """

    exits: tuple[Exit, ...] = ()
    outputs: dict[tuple[Module, int], Any] = field(default_factory=dict)
    primary: Place = (0, 0)
