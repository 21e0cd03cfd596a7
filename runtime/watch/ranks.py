"""Several ranks, one decision: what a cache has to know of the process groups that its model runs in."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Module

from runtime.errors import ApplyError, WiringError
from runtime.watch.blocks import Stack
from runtime.watch.distance import ratio


def agree(
    group: Any, sums: Tensor | None, past: int, device: torch.device
) -> tuple[float | None, bool]:
    """Add up the sums of all ranks, and see that all of them are at the same point.

    A rank that decides alone leaves the others waiting in the next collective. So every rank takes part in
    every call, whether it has something to compare or not (``sums`` is ``None``), and shows a digest of its past: a
    rank that was reset, or took the call for another branch, is noticed by all of them at once.

    Args:
        sums: ``[sum|cur - prev|, sum|prev|]`` of this rank's part, shape (2,).
        past: Digest of what this rank has decided so far; its low 16 bits count.

    Returns:
        The same on all ranks: the relative L1 change over all of them, ``None`` unless every rank had something to
        compare, and whether all ranks have decided alike so far.
    """
    past &= 0xFFFF
    votes = torch.tensor(
        [0.0, 0.0, sums is None, past, past * past], dtype=torch.float64, device=device
    )
    if sums is not None:
        votes[:2] = sums
    distributed.all_reduce(votes, group=group)
    numerator, denominator, unable, total, squares = votes.tolist()
    # (sum p)^2 = n sum p^2 only if all p are equal (Cauchy-Schwarz); exact in float64 for 16-bit p.
    same_past = total * total == group.size() * squares
    return (None if unable or not same_past else ratio(numerator, denominator)), same_past


def await_gathered(unused: Iterable[Tensor]) -> None:
    """Wait for tensors that nobody will read: an asynchronous gather must not outlive its buffers."""
    for tensor in unused:
        tensor.flatten()[:1].clone()


def gathered(group: Any, mine: Tensor, names: object = None) -> Tensor:
    """The equally shaped tensors of all ranks of ``group``, stacked in the order of ranks.

    Raises:
        WiringError: The ranks hold different shapes, or other ``names`` for what is in them; on all ranks alike.
    """
    outlines: list[Any] = [None] * group.size()
    distributed.all_gather_object(outlines, (tuple(mine.shape), names), group=group)
    if any(outline != outlines[0] for outline in outlines):
        raise WiringError(
            "the ranks that share one model have seen different calls; all of them must run the same pipeline calls, "
            "and start() and finish() must stand around the same ones"
        )
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    if mine.numel():
        distributed.all_gather(parts, mine.contiguous(), group=group)
    return torch.stack(parts)


def refuse_inner_sharding(root: Module, blocks: Stack) -> None:
    """Skipping must not leave out a collective that other ranks, which decide for themselves, still wait for.

    ``fully_shard`` gathers a block's parameters in the block's own pre-hook, which runs on a skipped step too. What is
    sharded inside a block, and every wrapper of the older FullyShardedDataParallel, gathers within the forward that a
    skipped step leaves out.

    Raises:
        ApplyError: Parameters are gathered within a block's forward.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for path, module in root.named_modules(prefix=type(root).__name__):
        if isinstance(module, FullyShardedDataParallel):
            raise ApplyError(
                f"{path} is wrapped in FullyShardedDataParallel: a skipped block would leave other ranks waiting; "
                "shard whole blocks with torch.distributed.fsdp.fully_shard instead"
            )
    for path, block in blocks:
        for inside, module in block.named_modules(prefix=path):
            if module is not block and isinstance(module, FSDPModule):
                raise ApplyError(
                    f"{inside} is sharded apart from its block: a skipped block would leave other ranks waiting; "
                    "shard whole blocks (fully_shard(block) for each of them), or do without the cache"
                )
