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
HOOK = "teacal_block"
Blocks = Sequence[str | Module]  # a stack named by hand
# Ahead of every other entry in the hook chain: this attribute on the denoiser says whose hooks it carries.
_OWNER = "_teacal_hooks"


def find_blocks(root: Module, blocks: Blocks | None = None) -> list[tuple[str, Module]]:
    """The blocks of the main stack as ``(path, block)``, in the order of definition.

    Args:
        root: The denoiser.
        blocks: Names a stack by hand: paths of module lists or of single blocks, or the modules themselves.

    Raises:
        UnsupportedModel: There is no list of blocks with attention, or a name does not fit.
    """
    paths = {module: path for path, module in root.named_modules()}
    chosen = _main_lists(paths) if blocks is None else _named_by_hand(root, paths, blocks)
    stack: list[tuple[str, Module]] = []
    for module in chosen:
        if isinstance(module, _LISTS):
            stack += [
                (f"{paths[module]}.{name}", child) for name, child in module.named_children()
            ]
        else:
            stack.append((paths[module], module))
    if not stack:
        raise UnsupportedModel(
            f"{type(root).__name__}: no list of transformer blocks with attention found "
            f"(looked at {_listed(paths)}); name the stack with blocks=['path.of.list']"
        )
    return stack


def _main_lists(paths: dict[Module, str]) -> list[Module]:
    """Lists of which every member has attention; none inside another."""
    chosen: list[Module] = []
    for module, path in paths.items():
        if not isinstance(module, _LISTS) or len(module) == 0 or _SIDE_STACK.search(path):
            continue
        nested = any(path.startswith(f"{paths[outer]}.") for outer in chosen)
        if not nested and all(attention_modules(block) for block in module):
            chosen.append(module)
    return chosen


def _named_by_hand(root: Module, paths: dict[Module, str], blocks: Blocks) -> list[Module]:
    modules = {path: module for module, path in paths.items() if path}
    chosen = [modules.get(block) if isinstance(block, str) else block for block in blocks]
    for name, module in zip(blocks, chosen, strict=True):
        if module not in modules.values():
            raise UnsupportedModel(
                f"blocks={name!r}: {type(root).__name__} has no such module; its lists are {_listed(paths)}"
            )
    return [module for module in chosen if module is not None]


def _listed(paths: dict[Module, str]) -> str:
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
        on_reset: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.run: Callable | None = run
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


def register(block: Module, hook: BlockHook, innermost: bool = False) -> None:
    """Put ``hook`` on ``block``, around its other hooks or beneath all of them."""
    registry = HookRegistry.check_if_exists_or_initialize(block)
    with _taken_off(registry, list(registry.hooks) if innermost else []):
        registry.register_hook(hook, HOOK)


def unregister(block: Module, hook: BlockHook) -> None:
    """Take ``hook`` off ``block``, whatever was put around it since."""
    hook.run, hook.on_reset = None, lambda: None
    registry = hook_registry(block)
    if registry is None or registry.get_hook(HOOK) is not hook:
        return
    present = block.forward
    names = list(registry.hooks)
    with _taken_off(registry, names[names.index(HOOK) + 1 :]):
        registry.remove_hook(HOOK, recurse=False)
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


class HookSet:
    """The hooks on a denoiser and its blocks, installed and removed as one; derived by who handles them.

    Attributes:
        root: The denoiser.
        blocks: Its blocks with their paths.
        receiver: Hears the names of CFG branches.
        undo: Takes out what is installed.
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
        self.undo = ExitStack()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the hooks in place, all or none; afterwards the model is as it was."""
        root, undo = self.root, self.undo
        if hasattr(root, _OWNER):
            raise ApplyError(
                f"{type(root).__name__} already carries a cache or recorder of teacal; remove() that one first"
            )
        with undo:
            registry = HookRegistry.check_if_exists_or_initialize(root)
            undo.callback(registry.invalidate_child_registries_cache)
            setattr(root, _OWNER, self)
            undo.callback(delattr, root, _OWNER)
            undo.enter_context(root.register_forward_pre_hook(self.begin, with_kwargs=True))
            undo.enter_context(
                root.register_forward_hook(self.end, with_kwargs=True, always_call=True)
            )
            for index, (_, block) in enumerate(self.blocks):
                heard = () if index else (self.receiver, self.reset)
                hook = BlockHook(self.run_block, *heard)
                undo.callback(unregister, block, hook)
                # A model's context-parallel hook splits the sequence on the first block: ours must see what is left.
                register(block, hook, innermost=index == 0)
            registry.invalidate_child_registries_cache()
            yield
