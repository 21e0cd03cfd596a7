"""Relative L1 distance, the one definition of it: ``sum|cur - prev| / sum|prev|``, accumulated in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements per pass: small enough that no temporary of a tensor's own size exists, large enough to fill the device.
_PIECE = {"cpu": 2**18, "cuda": 2**23}


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of equally shaped tensors along their longest dimension, without copying."""
    first = tensors[0]
    limit = _PIECE.get(first.device.type, 2**22)
    if first.numel() <= limit:
        yield tensors
        return
    dim = max(range(first.ndim), key=lambda axis: first.shape[axis])
    rows = max(1, limit * first.shape[dim] // first.numel())
    yield from zip(*(tensor.split(rows, dim) for tensor in tensors), strict=True)


def l1_sums(cur: Tensor, prev: Tensor) -> Tensor:
    """``[sum|cur - prev|, sum|prev|]`` as a float32 tensor of shape (2,) on the tensors' device.

    Both tensors are read once. Sums, not means, so that ranks of a sharded sequence can add theirs before dividing.
    """
    parts = [piece_sums(now.float(), before.float()) for now, before in pieces(cur, prev)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def piece_sums(cur: Tensor, prev: Tensor) -> Tensor:
    """The sums of one piece in float32."""
    return torch.stack([(cur - prev).abs_().sum(), prev.abs().sum()])


def rel_l1(cur: Tensor, prev: Tensor) -> float:
    """Relative L1 distance of two equally shaped tensors as a Python number (waits for the device once).

    Args:
        cur, prev: Tensors of one shape, any floating dtype.

    Returns:
        The distance; ``nan`` where the denominator is 0 or anything is not finite.
    """
    return ratio(*l1_sums(cur, prev).tolist())


def ratio(numerator: float, denominator: float) -> float:
    """The distance from its two sums; ``nan`` where there is nothing to divide by."""
    return numerator / denominator if denominator > 0 else float("nan")
