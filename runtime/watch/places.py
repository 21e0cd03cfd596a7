"""Tensors inside the arguments and results of a module call: where they are, and how to put others there."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

# A place in a call: ("args", 0), ("kwargs", "hidden_states"), one step deeper for every list, tuple or dict.
Place = tuple[Any, ...]


def tensors(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in nested lists, tuples, dicts (dataclass outputs of diffusers are dicts), with its place."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, (*place, key))


def call_tensors(args: tuple, kwargs: dict) -> Iterator[tuple[Place, Tensor]]:
    """The tensors of a call, positional ones first."""
    return tensors({"args": args, "kwargs": kwargs})


def at(place: Place, args: tuple, kwargs: dict) -> Any:
    """What stands at ``place`` of a call; ``None`` where the call has no such place."""
    value: Any = {"args": args, "kwargs": kwargs}
    try:
        for key in place:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


def streams(args: tuple, kwargs: dict) -> dict[Place, Tensor]:
    """What may be a stream of hidden states among the arguments of a block."""
    return {
        place: tensor
        for place, tensor in call_tensors(args, kwargs)
        if tensor.is_floating_point() and tensor.ndim > 1
    }


def replaced(place: Place, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call with ``value`` at ``place``; only the containers on the way are copied."""
    both = _replaced({"args": args, "kwargs": kwargs}, place, value)
    return both["args"], both["kwargs"]


def _replaced(tree: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    key, *rest = place
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = _replaced(tree[key], tuple(rest), value)
    return copy if isinstance(tree, dict) else _rebuild(tree, copy)


def mapped(tree: Any, function: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """``tree`` with ``function`` applied to every ``leaf``; the containers keep their types."""
    if isinstance(tree, leaf):
        return function(tree)
    if isinstance(tree, dict):
        values = {key: mapped(value, function, leaf) for key, value in tree.items()}
        return values if type(tree) is dict else type(tree)(**values)
    if isinstance(tree, list | tuple):
        return _rebuild(tree, [mapped(item, function, leaf) for item in tree])
    return tree


def _rebuild(like: list | tuple, items: list) -> list | tuple:
    if hasattr(like, "_fields"):  # a named tuple
        return type(like)(*items)
    return type(like)(items)
