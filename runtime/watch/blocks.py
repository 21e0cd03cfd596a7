"""Finds a denoiser's block stack and the attention of its blocks, by structure, and puts hooks on blocks."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.nn import Module

from runtime.compat.diffusers_private import ContextReceiver, hook_registry, is_attention
from runtime.errors import ApplyError, UnsupportedModel

# Lists of blocks that work on something else than the latents' stream, or before it enters the stack; a UNet's levels.
_SIDE_STACK = re.compile(
    r"refiner|text|txt|caption|context|vace|siglip|encoder|controlnet|prior|connector|embed|extractor|perceiver|"
    r"attentions"
)
_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.Sequential)
_PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_HOOK = "teacal_block"
_MARK = "_teacal_hooks"  # a denoiser whose blocks are hooked has this attribute
Blocks = Sequence[str | Module]  # a stack named by hand
Stack = list[tuple[str, Module]]  # blocks with their paths
Paths = dict[Module, str]


def find_blocks(root: Module, blocks: Blocks | None = None) -> Stack:
    """The blocks of the main stack as ``(path, block)``, in the order of definition.

    Args:
        root: The denoiser.
        blocks: Names a stack by hand: paths of module lists or of single blocks, or the modules themselves.

    Raises:
        UnsupportedModel: There is no list of blocks with attention, or a name does not fit.
    """
    paths = {module: path for path, module in root.named_modules()}
    chosen = _main_lists(paths) if blocks is None else _named_by_hand(root, paths, blocks)
    stack: Stack = []
    for module in chosen:
        members = module.children() if isinstance(module, _LISTS) else [module]
        stack += [(paths[block], block) for block in members]
    if not stack:
        raise UnsupportedModel(
            f"{type(root).__name__}: no list of transformer blocks with attention found "
            f"(looked at {_listed(paths)}); name the stack with blocks=['path.of.list']"
        )
    return stack


def _main_lists(paths: Paths) -> list[Module]:
    """Lists of which every member has attention; none inside another."""
    chosen: list[Module] = []
    for module, path in paths.items():
        if not isinstance(module, _LISTS) or len(module) == 0 or _SIDE_STACK.search(path):
            continue
        nested = any(path.startswith(f"{paths[outer]}.") for outer in chosen)
        if not nested and all(attention_modules(block) for block in module):
            chosen.append(module)
    return chosen


def _named_by_hand(root: Module, paths: Paths, blocks: Blocks) -> list[Module]:
    modules = {path: module for module, path in paths.items() if path}
    chosen = []
    for block in blocks:
        module = modules.get(block) if isinstance(block, str) else block
        if module is None or module not in modules.values():
            raise UnsupportedModel(
                f"blocks={block!r}: {type(root).__name__} has no such module; its lists are {_listed(paths)}"
            )
        chosen.append(module)
    return chosen


def _listed(paths: Paths) -> str:
    """Paths of the lists that there are, for messages."""
    lists = [
        path for module, path in paths.items() if isinstance(module, nn.ModuleList) and path
    ]
    return ", ".join(lists)[:200] or "none"


def attention_modules(block: Module) -> list[Module]:
    """The attention layers of ``block`` (itself, if it is one), outermost ones only."""
    if is_attention(block):
        return [block]
    attention: list[Module] = []
    inside: set[Module] = set()
    for path, module in block.named_modules():
        if not path or module in inside:
            continue
        # Both together: some blocks have an attention of their own kind first and one of diffusers' classes after it.
        if is_attention(module) or _looks_like_attention(path.rpartition(".")[2], module):
            attention.append(module)
            inside.update(module.modules())
    return attention


def _looks_like_attention(name: str, module: Module) -> bool:
    """Whether a module that diffusers does not know is attention: by its name, and at least two projections."""
    if not _ATTENTION_NAME.search(f"{name} {type(module).__name__}"):
        return False
    inside = list(module.modules())
    if any(map(is_attention, inside)):
        return False  # that one is meant, behind its norm
    projections = [child for child in inside if isinstance(child, _PROJECTIONS)]
    return len(projections) >= 2 or isinstance(module, nn.MultiheadAttention)


@contextmanager
def hooked(
    root: Module,
    blocks: Stack,
    run: Callable,
    receiver: ContextReceiver,
    on_reset: Callable[[], None],
) -> Iterator[None]:
    """With every call of a block of ``root`` handed to ``run(block, original forward, args, kwargs)``.

    Args:
        receiver: Where diffusers says the name of the CFG branch.
        on_reset: Called when the pipeline says that a generation is over.

    Raises:
        ApplyError: Another cache or recorder of this toolkit has hooks on ``root``.
    """
    if hasattr(root, _MARK):
        raise ApplyError(
            f"{type(root).__name__} already carries a cache or recorder of teacal; remove() that one first"
        )
    registry = HookRegistry.check_if_exists_or_initialize(root)
    with ExitStack() as undo:
        setattr(root, _MARK, True)
        undo.callback(delattr, root, _MARK)
        undo.callback(registry.invalidate_child_registries_cache)
        for index, (_, block) in enumerate(blocks):
            hook = _BlockHook(run, receiver, on_reset)
            undo.callback(_unregister, block, hook)
            # A model's context-parallel hook splits the sequence on the first block: ours must see what is left.
            _register(block, hook, innermost=index == 0)
        registry.invalidate_child_registries_cache()
        yield


class _BlockHook(ModelHook):
    _is_stateful = True  # diffusers looks for a receiver on such hooks

    def __init__(
        self, run: Callable, receiver: ContextReceiver, on_reset: Callable[[], None]
    ) -> None:
        super().__init__()
        self.run: Callable | None = run  # None once it is removed: others may still call it
        self.receiver, self.on_reset = receiver, on_reset

    def initialize_hook(self, module: Module) -> Module:
        # What accelerate puts back when its own hook, which was there before this one, is removed.
        self.beneath: Callable | None = getattr(module, "_old_forward", None)
        return module

    def new_forward(self, module: Module, *args: Any, **kwargs: Any) -> Any:
        original: Any = self.fn_ref.original_forward
        if self.run is None:
            return original(*args, **kwargs)
        return self.run(module, original, args, kwargs)

    def reset_state(self, module: Module) -> Module:
        self.on_reset()
        return module


def _register(block: Module, hook: _BlockHook, innermost: bool) -> None:
    """Put ``hook`` on ``block``, around its other hooks or beneath all of them."""
    registry = HookRegistry.check_if_exists_or_initialize(block)
    with _taken_off(registry, list(registry.hooks) if innermost else []):
        registry.register_hook(hook, _HOOK)


def _unregister(block: Module, hook: _BlockHook) -> None:
    """Take ``hook`` off ``block``, whatever was put around it since."""
    hook.run, hook.on_reset = None, lambda: None
    registry = hook_registry(block)
    if registry is None or registry.get_hook(_HOOK) is not hook:
        return
    present = block.forward
    names = list(registry.hooks)
    with _taken_off(registry, names[names.index(_HOOK) + 1 :]):
        registry.remove_hook(_HOOK, recurse=False)
    if hook.beneath is not None and present == hook.beneath:
        block.forward = present  # accelerate's hook is gone, and took ours along


@contextmanager
def _taken_off(registry: HookRegistry, names: list[str]) -> Iterator[None]:
    """Without the hooks called ``names``, removed in reverse order.

    diffusers drops the next hook's forward when one is removed from the middle.
    """
    hooks = {name: registry.get_hook(name) for name in names}
    for name in reversed(names):
        registry.remove_hook(name, recurse=False)
    yield
    for name, hook in hooks.items():
        registry.register_hook(hook, name)
