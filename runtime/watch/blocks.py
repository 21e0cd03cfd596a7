"""Finds a denoiser's block stack and the attention of its blocks, by structure."""

import re
from collections.abc import Sequence

from torch import nn

from runtime.compat.diffusers_private import is_attention
from runtime.errors import UnsupportedModel

# Lists of blocks that work on something else than the latents' stream, or before it enters the stack; a UNet's levels.
_SIDE_STACK = re.compile(
    r"refiner|text|txt|caption|context|vace|siglip|encoder|controlnet|prior|connector|embed|extractor|perceiver|"
    r"attentions"
)
_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)


def find_blocks(
    root: nn.Module, blocks: Sequence[str | nn.Module] | None = None
) -> list[tuple[str, nn.Module]]:
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
    found: list[tuple[str, nn.Module]] = []
    for path, module in named.items():
        if (
            not isinstance(module, nn.ModuleList | nn.Sequential)
            or len(module) == 0
            or _SIDE_STACK.search(path)
        ):
            continue
        if any(path.startswith(f"{block_path}.") for block_path, _ in found):
            continue
        if all(attention_modules(block) for block in module):
            found += [(f"{path}.{name}", block) for name, block in module.named_children()]
    if not found:
        raise UnsupportedModel(
            f"{type(root).__name__}: no list of transformer blocks with attention found "
            f"(looked at {_lists(named) or 'no lists at all'}); name the stack with blocks=['path.of.list']"
        )
    return found


def _named_by_hand(
    root: nn.Module, named: dict, blocks: Sequence[str | nn.Module]
) -> list[tuple[str, nn.Module]]:
    paths = {module: path for path, module in named.items()}
    found: list[tuple[str, nn.Module]] = []
    for block in blocks:
        module = named.get(block) if isinstance(block, str) else block
        if module is None or module not in paths or module is root:
            raise UnsupportedModel(
                f"blocks={block!r}: {type(root).__name__} has no such module; its lists are {_lists(named) or 'none'}"
            )
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found += [(f"{paths[module]}.{name}", child) for name, child in module.named_children()]
        else:
            found.append((paths[module], module))
    if not found:
        raise UnsupportedModel("blocks=[]: expected at least one path or module")
    return found


def attention_modules(block: nn.Module) -> list[nn.Module]:
    """The attention layers of ``block`` (itself, if it is one), outermost ones only."""
    if is_attention(block):
        return [block]
    # Both together: some blocks have an attention of their own kind first and one of diffusers' classes after it.
    return _outermost(
        block, lambda name, module: is_attention(module) or _looks_like_attention(name, module)
    )


def _outermost(block: nn.Module, accepts) -> list[nn.Module]:
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for path, module in block.named_modules():
        if path and module not in inside and accepts(path.rpartition(".")[2], module):
            found.append(module)
            inside.update(module.modules())
    return found


def _looks_like_attention(name: str, module: nn.Module) -> bool:
    """An attention layer of a model of one's own: called so, and with the projections to show for it."""
    called_so = _ATTENTION_NAME.search(name) or _ATTENTION_NAME.search(type(module).__name__)
    projections = sum(
        isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) for child in module.modules()
    )
    wraps_one = any(
        is_attention(child) for child in module.modules()
    )  # then that one is meant, behind its norm
    return (
        bool(called_so)
        and not wraps_one
        and (projections >= 2 or isinstance(module, nn.MultiheadAttention))
    )


def _lists(named: dict[str, nn.Module]) -> str:
    return ", ".join(
        path for path, module in named.items() if isinstance(module, nn.ModuleList) and path
    )[:200]
