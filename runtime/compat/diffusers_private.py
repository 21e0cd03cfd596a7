"""The only file that touches non-public names of diffusers; a test pins each of them.

``diffusers.hooks`` publishes ``HookRegistry`` and ``ModelHook``. The name of the CFG branch that a pipeline announces
through ``cache_context`` reaches hooks only through a ``StateManager``, and the attention classes are listed in
``diffusers.hooks._common``.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks._common import _ATTENTION_CLASSES
from diffusers.hooks.hooks import StateManager
from torch.nn import Module


class ContextReceiver(StateManager):
    """Receives what a pipeline says with ``cache_context``; holds no state of its own."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # makes no states

    @property
    def name(self) -> str | None:
        return None if self._context is None else self._context.name


def is_attention(module: Module) -> bool:
    """Whether diffusers knows ``module`` as an attention layer."""
    return isinstance(module, _ATTENTION_CLASSES)


def enabled_cache(module: Module) -> str | None:
    """Name of the diffusers cache that is enabled on ``module``, if one is."""
    config = getattr(module, "_cache_config", None)
    return None if config is None else type(config).__name__


def hook_registry(module: Module) -> HookRegistry | None:
    """The hook registry of ``module`` if it has one already."""
    return getattr(module, "_diffusers_hook", None)


def lockstep_group(module: Module) -> "torch.distributed.ProcessGroup | None":
    """The ranks that run every forward of ``module`` together, by ``enable_parallelism`` of diffusers, if any.

    Under context parallelism each of them holds a part of the sequence, under tensor parallelism all of it. Sums over
    the group give the whole sequence's ratio in both cases: equal parts change numerator and denominator alike.
    """
    config = getattr(module, "_parallel_config", None)
    if config is None:
        return None
    if config.context_parallel_config is not None:
        return config.context_parallel_config._flattened_mesh.get_group()
    if config.tensor_parallel_config is not None:
        return config.tensor_parallel_config._mesh.get_group()
    return None


def inner_forward(module: Module) -> Callable:
    """The forward of ``module`` beneath all of its hooks."""
    forward: Callable = getattr(*_innermost(module))
    return forward


def set_inner_forward(module: Module, forward: Callable) -> None:
    """Put ``forward`` beneath all hooks of ``module``."""
    holder, name = _innermost(module)
    if holder is module and getattr(forward, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)  # the class's own
    else:
        setattr(holder, name, forward)


def _innermost(module: Module) -> tuple[Any, str]:
    """What holds the forward beneath all hooks of ``module``, and under which name."""
    hooks = getattr(hook_registry(module), "hooks", None)
    if not hooks:
        return module, "forward"
    reference = next(iter(hooks.values())).fn_ref
    return (
        reference,
        "forward" if reference.original_forward is None else "original_forward",
    )


def unwrapped(module: Module) -> Module:
    """The module itself, without the wrapper of ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)
