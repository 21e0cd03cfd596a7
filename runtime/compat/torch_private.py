"""Steps out of ``torch.compile`` and back in; the only file that touches non-public names of torch.

``torch.compiler.disable`` keeps the compiler away from a function *and all that it calls*. The hooks need two things
more: to keep it away until a later hook of the same forward, and to let it have one call in between (a block's own
forward). Both take the frame callback that ``torch.compile`` runs with, which the names below read and set.
"""

from collections.abc import Callable
from typing import Any

from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip


def stays_python(function: Callable) -> Callable:
    """Decorator: ``function`` is never traced, and the compiler is still on for what it calls."""
    function = skip(function)
    message = "step caching decides outside of graphs; use runtime.compile_blocks() instead"
    setattr(function, "_torchdynamo_disable_msg", message)  # noqa: B010
    return function


def pause() -> Any:
    """Turn the compiler off in this thread; call it from a function that :func:`stays_python` keeps untraced.

    Returns:
        The compiler that was at work, for :func:`resume` and :func:`compiled_by`; ``None`` if none was.
    """
    return set_eval_frame(None)


def resume(compiler: Any) -> None:
    """Turn ``compiler``, which :func:`pause` gave, on again."""
    set_eval_frame(compiler)


def compiled_by(compiler: Any, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Call ``function`` under ``compiler`` while everything around it is paused."""
    set_eval_frame(compiler)
    try:
        return function(*args, **kwargs)
    finally:
        set_eval_frame(None)
