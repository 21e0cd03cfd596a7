"""Tensors inside the arguments and results of a module call: where they are, and how to put others there."""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from typing import Any

from torch import Tensor

# What a module is called with: its positional arguments and its named ones.
Arguments = tuple[tuple, dict]
# A place in them: (0, 0), (1, "hidden_states"), one step deeper for every list, tuple or dict.
Place = tuple[Any, ...]
Streams = dict[Place, Tensor]


def tensors(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in nested lists, tuples, dicts (dataclass outputs of diffusers are dicts), with its place."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, (*place, key))


def at(place: Place, tree: Any) -> Any:
    """What stands at ``place``; ``None`` where there is no such place."""
    try:
        return reduce(getitem, place, tree)
    except (KeyError, IndexError, TypeError):
        return None


def streams(arguments: Arguments) -> Streams:
    """What may be a stream of hidden states among the arguments of a block."""
    return {
        place: tensor
        for place, tensor in tensors(arguments)
        if tensor.is_floating_point() and tensor.ndim > 1
    }


def replaced(tree: Any, place: Place, value: Any) -> Any:
    """``tree`` with ``value`` at ``place``; only the containers on the way are copied."""
    if not place:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[place[0]] = replaced(copy[place[0]], place[1:], value)
    return _rebuilt(tree, copy)


def mapped(tree: Any, function: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """``tree`` with ``function`` applied to every ``leaf``; the containers keep their types."""
    if isinstance(tree, leaf):
        return function(tree)
    if isinstance(tree, dict):
        values = {key: mapped(value, function, leaf) for key, value in tree.items()}
        return _rebuilt(tree, values)
    if isinstance(tree, list | tuple):
        return _rebuilt(tree, [mapped(item, function, leaf) for item in tree])
    return tree


def _rebuilt(like: Any, items: Any) -> Any:
    """``items`` (a dict or a list) in a container like ``like``."""
    kind = type(like)
    if isinstance(items, dict):
        return items if kind is dict else kind(**items)
    return kind(*items) if hasattr(like, "_fields") else kind(items)  # a named tuple
