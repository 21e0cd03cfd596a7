"""Finds a denoiser's block stack and the attention of its blocks, by structure, and puts hooks on blocks."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
HOOK = "teacal_block"
# Ahead of every other entry in the hook chain: this attribute on the denoiser says whose hooks it carries.
_OWNER = "_teacal_hooks"


def find_blocks(
    root: Module, blocks: Sequence[str | Module] | None = None
) -> list[tuple[str, Module]]:
    """The blocks of the main stack as ``(path, block)``, in the order of definition.

    Args:
        root: The denoiser.
        blocks: Names a stack by hand: paths of module lists or of single blocks, or the modules themselves.

    Raises:
        UnsupportedModel: There is no list of blocks with attention, or a name does not fit.
    """
    named = dict(root.named_modules())
    if blocks is not None:
        return _named_by_hand(root, named, blocks)
    stack: list[tuple[str, Module]] = []
    for path, module in named.items():
        if (
            not isinstance(module, nn.ModuleList | nn.Sequential)
            or len(module) == 0
            or _SIDE_STACK.search(path)
        ):
            continue
        if any(path.startswith(f"{block_path}.") for block_path, _ in stack):
            continue
        if all(attention_modules(block) for block in module):
            stack += [(f"{path}.{name}", block) for name, block in module.named_children()]
    if not stack:
        raise UnsupportedModel(
            f"{type(root).__name__}: no list of transformer blocks with attention found "
            f"(looked at {_lists(named) or 'no lists at all'}); name the stack with blocks=['path.of.list']"
        )
    return stack


def _named_by_hand(
    root: Module, named: dict, blocks: Sequence[str | Module]
) -> list[tuple[str, Module]]:
    paths = {module: path for path, module in named.items()}
    stack: list[tuple[str, Module]] = []
    for block in blocks:
        module = named.get(block) if isinstance(block, str) else block
        if module is None or module not in paths or module is root:
            raise UnsupportedModel(
                f"blocks={block!r}: {type(root).__name__} has no such module; its lists are {_lists(named) or 'none'}"
            )
        if isinstance(module, nn.ModuleList | nn.Sequential):
            stack += [(f"{paths[module]}.{name}", child) for name, child in module.named_children()]
        else:
            stack.append((paths[module], module))
    if not stack:
        raise UnsupportedModel("blocks=[]: expected at least one path or module")
    return stack


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
    if not (_ATTENTION_NAME.search(name) or _ATTENTION_NAME.search(type(module).__name__)):
        return False
    if any(is_attention(child) for child in module.modules()):
        return False  # that one is meant, behind its norm
    projections = [
        child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    return len(projections) >= 2 or isinstance(module, nn.MultiheadAttention)


def _lists(named: dict[str, Module]) -> str:
    return ", ".join(
        path for path, module in named.items() if isinstance(module, nn.ModuleList) and path
    )[:200]


class BlockHook(ModelHook):
    """Passes every call of a block to ``run(block, original forward, args, kwargs)``.

    Args:
        receiver: Where diffusers says the name of the CFG branch; it looks for one on stateful hooks.
        on_reset: Called when the pipeline says that a generation is over.
    """

    _is_stateful = True

    def __init__(
        self,
        run: Callable,
        receiver: ContextReceiver | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.run: Callable | None = run
        self.receiver, self.on_reset = receiver, on_reset
        # What accelerate puts back when its own hook, which was there before this one, is removed.
        self.beneath: Callable | None = None

    def initialize_hook(self, module: Module) -> Module:
        self.beneath = getattr(module, "_old_forward", None)
        return module

    def new_forward(self, module: Module, *args: Any, **kwargs: Any) -> Any:
        original: Any = self.fn_ref.original_forward
        if self.run is None:
            return original(*args, **kwargs)
        return self.run(module, original, args, kwargs)

    def reset_state(self, module: Module) -> Module:
        if self.on_reset is not None:
            self.on_reset()
        return module


def register(block: Module, hook: BlockHook, innermost: bool = False) -> None:
    """Put ``hook`` on ``block``, around its other hooks or beneath all of them."""
    registry = HookRegistry.check_if_exists_or_initialize(block)
    others = _taken_off(registry, list(registry.hooks) if innermost else [])
    registry.register_hook(hook, HOOK)
    for name, other in others:
        registry.register_hook(other, name)


def unregister(block: Module, hook: BlockHook) -> None:
    """Take ``hook`` off ``block``, whatever was put around it since."""
    hook.run = hook.on_reset = None
    registry = hook_registry(block)
    if registry is None or registry.get_hook(HOOK) is not hook:
        return
    present = block.forward
    names = list(registry.hooks)
    others = _taken_off(registry, names[names.index(HOOK) + 1 :])
    registry.remove_hook(HOOK, recurse=False)
    for name, other in others:
        registry.register_hook(other, name)
    if hook.beneath is not None and present == hook.beneath:
        block.forward = present  # accelerate's hook is gone, and took ours along


def _taken_off(registry: HookRegistry, names: list[str]) -> list[tuple[str, Any]]:
    """The hooks called ``names``, removed in reverse order.

    diffusers drops the next hook's forward when one is removed from the middle.
    """
    hooks = [(name, registry.get_hook(name)) for name in names]
    for name in reversed(names):
        registry.remove_hook(name, recurse=False)
    return hooks


class HookSet:
    """The hooks on a denoiser and its blocks, installed and removed as one; derived by who handles them.

    Attributes:
        root: The denoiser.
        blocks: Its blocks with their paths.
        receiver: Hears the names of CFG branches.
        installed: What :meth:`remove` has to undo.
        begin, end: Forward hooks of the denoiser; ``end`` also runs where the forward failed, with no output.
        run_block: Takes the place of every block's forward.
        reset: Called when the pipeline says that a generation is over.
    """

    begin: Callable
    end: Callable
    run_block: Callable
    reset: Callable

    def __init__(self, root: Module, blocks: list[tuple[str, Module]]) -> None:
        self.root, self.blocks = root, blocks
        self.receiver = ContextReceiver()
        self.installed = ExitStack()

    def install(self) -> None:
        """Put the hooks in place, all or none."""
        root = self.root
        if hasattr(root, _OWNER):
            raise ApplyError(
                f"{type(root).__name__} already carries a cache or recorder of teacal; remove() that one first"
            )
        with ExitStack() as undo:
            registry = HookRegistry.check_if_exists_or_initialize(root)
            undo.callback(registry.invalidate_child_registries_cache)
            setattr(root, _OWNER, self)
            undo.callback(delattr, root, _OWNER)
            before = root.register_forward_pre_hook(self.begin, with_kwargs=True)
            undo.callback(before.remove)
            after = root.register_forward_hook(self.end, with_kwargs=True, always_call=True)
            undo.callback(after.remove)
            for index, (_, block) in enumerate(self.blocks):
                first = index == 0
                hook = BlockHook(self.run_block, *(self.receiver, self.reset) if first else ())
                undo.callback(unregister, block, hook)
                # A model's context-parallel hook splits the sequence on the first block: ours must see what is left.
                register(block, hook, innermost=first)
            registry.invalidate_child_registries_cache()
            self.installed = undo.pop_all()

    def remove(self) -> None:
        """Take everything out again; the model is as it was. Does nothing when nothing is installed."""
        self.installed.close()
