"""``compile_blocks``: the blocks' own forwards as graphs, the cache's hooks around them in plain Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from runtime.apply import Handle, denoisers
from runtime.compat.diffusers_private import inner_forward, set_inner_forward
from runtime.errors import ApplyError
from runtime.watch.blocks import Blocks, find_blocks


class _CompiledForward:
    """A block's forward as a graph, with the uncompiled forward beside it for the probe.

    No ``__dict__``: diffusers copies that of a forward onto the hooks around it.
    """

    __slots__ = ("__wrapped__", "compiled", "uncompiled")

    def __init__(self, forward: Callable, options: dict[str, Any]) -> None:
        self.uncompiled = self.__wrapped__ = forward
        self.compiled = torch.compile(forward, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)


class CompiledBlocks(Handle):
    """Compiled blocks, as :func:`compile_blocks` leaves them; a context manager.

    Attributes:
        count: How many blocks are compiled, over all denoisers.
    """

    count = 0

    def remove(self) -> None:
        super().remove()
        self.count = 0


def compile_blocks(
    target: Any,
    *,
    blocks: Blocks | None = None,
    fullgraph: bool = True,
    **options: Any,
) -> CompiledBlocks:
    """Compile the blocks of a pipeline's denoisers, or of a bare denoiser, each on its own.

    Works before and after :func:`runtime.apply_tea_cache`, which decides the same with and without it. Blocks of one
    class share their graphs, so that the cost does not grow with the depth.

    Args:
        target: A pipeline (all its denoisers are compiled), or the denoiser module.
        blocks: Names the block stack of a model of your own: paths of its lists, or modules.
        fullgraph: Fail at the first call if a block cannot be one graph, instead of running it in pieces.
        options: Further arguments of ``torch.compile`` (``mode``, ``backend``, ``dynamic``, ...).

    Returns:
        The handle; use it as a context manager, or call its ``remove()``.

    Raises:
        ApplyError: Blocks or denoiser are compiled already, or their weights move while a block runs.
        UnsupportedModel: There is no block stack.
    """
    modules = denoisers(target)
    targets = [
        (root, path, block)
        for root in modules.values()
        for path, block in find_blocks(root, blocks)
    ]
    for root, path, block in targets:
        _refuse(root, path, block)
    handle = CompiledBlocks()
    for _, _, block in targets:
        compiled = _CompiledForward(inner_forward(block), options | {"fullgraph": fullgraph})
        set_inner_forward(block, compiled)
        handle.installed.callback(_restore, block, compiled)
        handle.count += 1
    return handle


def _restore(block: Module, compiled: _CompiledForward) -> None:
    compiled.compiled = compiled.uncompiled  # for hooks of others, which may hold it
    if inner_forward(block) is compiled:
        set_inner_forward(block, compiled.uncompiled)


def _refuse(root: Module, path: str, block: Module) -> None:
    name = f"{type(root).__name__}.{path}"
    if root._compiled_call_impl is not None:
        raise ApplyError(
            f"{type(root).__name__} is compiled as a whole already, which the cache works with; leave "
            "compile_blocks() out, or load the model again without compile()"
        )
    if block._compiled_call_impl is not None:
        raise ApplyError(
            f"{name} is compiled already (compile_repeated_blocks() or compile()), together with the hooks around it; "
            "load the model again and call compile_blocks() instead"
        )
    if isinstance(inner_forward(block), _CompiledForward):
        raise ApplyError(
            f"{name} is compiled by compile_blocks() already; remove() that handle first"
        )
    for part, module in block.named_modules(prefix=name):
        if hasattr(module, "_hf_hook"):
            raise ApplyError(
                f"{part} moves its weights while it runs (sequential CPU offload), which is no single graph; "
                "use model or group offload instead"
            )
