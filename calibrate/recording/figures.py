"""The figures of one step: sums for relative distances, MagCache's ratios, and how parts of a sequence combine."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coeffs.entry.signals import SIGNALS
from runtime.watch.distance import piece_sums, pieces, ratio

# Figures of one step, in the order they are stacked on the device: two sums for each distance, then the ratios.
SIGNAL_COLUMNS = tuple(signal.column for signal in SIGNALS.values())
DISTANCES = (*SIGNAL_COLUMNS, "y_output", "y_hidden", "y_residual")
Row = dict[str, Any]
_RATIOS = ("mag_ratio", "mag_ratio_std", "cos_distance")


def stacked(row: dict[str, Tensor]) -> Tensor:
    """The figures of a row as one tensor; distances that the model does not have are zeros."""
    zero = torch.zeros(2, device=row["ratios"].device)
    return torch.cat([row.get(name, zero) for name in DISTANCES] + [row["ratios"]])


def named(figures: list[float]) -> dict[str, float]:
    """The columns of a row from its stacked figures; NaN where there was nothing to divide by."""
    sums = zip(DISTANCES, figures[::2], figures[1::2], strict=False)
    row = {name: ratio(numerator, denominator) for name, numerator, denominator in sums}
    return row | dict(zip(_RATIOS, figures[2 * len(DISTANCES) :], strict=True))


def exit_figures(
    hidden: Tensor,
    entry: Tensor | None,
    hidden_before: Tensor,
    entry_before: Tensor | None,
) -> dict[str, Tensor]:
    """Distances of the stack's output and residual, and MagCache's ratios, from one reading of each tensor.

    Args:
        hidden, hidden_before: The stack's output at this step and the previous, shape (..., dim).
        entry, entry_before: Its input; ``None`` where the output has no counterpart there (the residual is then the
            output itself).

    Returns:
        ``y_hidden`` and ``y_residual`` as sums (see :func:`runtime.watch.distance.l1_sums`), shape (2,), and
        ``ratios``, shape (3,): mean and standard deviation over tokens of ``|r_t| / |r_(t-1)|`` (L2 over dim;
        MagCache, arXiv 2506.09045), and the mean cosine distance of ``r_t`` and ``r_(t-1)``. Residuals are formed in
        float32.
    """
    rows = [
        tensor.reshape(-1, tensor.shape[-1])
        for tensor in (hidden, hidden_before, entry, entry_before)
        if tensor is not None
    ]
    y_hidden = torch.zeros(2, device=hidden.device)
    y_residual = torch.zeros(2, device=hidden.device)
    ratios, cosines = [], []
    for part in token_pieces(*rows):
        now, before = part[0].float(), part[1].float()
        y_hidden += piece_sums(now, before)
        if len(part) == 4:
            now, before = now - part[2].float(), before - part[3].float()
        y_residual += piece_sums(now, before)
        norm, norm_before = now.norm(dim=-1), before.norm(dim=-1)
        ratios.append(norm / (norm_before + 1e-8))
        cosines.append((now * before).sum(-1) / (norm * norm_before).clamp_min(1e-12))
    cosine = torch.cat(cosines).mean()
    std, mean = torch.std_mean(torch.cat(ratios), correction=0)
    return {
        "y_hidden": y_hidden,
        "y_residual": y_residual,
        "ratios": torch.stack([mean, std, 1 - cosine]),
    }


def over_parts(parts: Tensor, tokens: Tensor) -> Tensor:
    """The figures of whole tensors from those of their parts.

    Sums are added. What every part holds entire (the gathered output, an embedding of the time) is then counted
    several times over in the numerator and in the denominator, so that the ratio stays what it was.

    Args:
        parts: Figures of each part, shape (parts, rows, figures).
        tokens: Number of tokens that each part has, shape (parts, rows).

    Returns:
        Shape (rows, figures), float64, on the host.
    """
    parts, tokens = parts.cpu().double(), tokens.cpu().double()
    if parts.ndim < 3:  # no rows
        return parts.sum(0)
    sums, ratios = parts.split([2 * len(DISTANCES), len(_RATIOS)], dim=-1)
    weights = tokens / tokens.sum(0)
    mean, std, cosine = ratios.unbind(-1)
    overall = (weights * mean).sum(0)
    variance = (weights * (std**2 + (mean - overall) ** 2)).sum(0)
    combined = torch.stack([overall, variance.sqrt(), (weights * cosine).sum(0)], dim=-1)
    return torch.cat([sums.sum(0), combined], dim=-1)


def token_pieces(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of (tokens, dim) tensors that never split a token."""
    return pieces(*rows) if rows[0].shape[0] >= rows[0].shape[1] else iter([rows])


def prediction(output: Any) -> Any:
    """The denoiser's prediction in what its forward returned: the first field of an output class, or of a tuple."""
    if isinstance(output, dict):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def counted_on(trajectories: list[list[Row]]) -> list[Row]:
    """All rows; where a pipeline ran several schedules (chunks, stages), a branch's steps are counted on.

    Between two schedules there is no pair, as there is none at the first step.
    """
    counted: list[Row] = []
    taken: dict[str, int] = {}
    for rows in filter(None, trajectories):
        branch = rows[0]["branch"]
        offset = taken.get(branch, 0)
        counted += [row | {"step": row["step"] + offset} for row in rows]
        taken[branch] = offset + max(row["num_steps"] or row["step"] + 1 for row in rows)
    return counted


def highest(timestep: Any) -> Any:
    """The highest of the timesteps that a call was given; on the device where it lies there."""
    if isinstance(timestep, list | tuple):
        return max(float(torch.as_tensor(item).float().max()) for item in timestep)
    return timestep.float().max() if isinstance(timestep, Tensor) else float(timestep)


def number_steps(rows: list[Row]) -> None:
    """Where no scheduler says how long the schedule is, it is as long as what was seen."""
    for row in rows:
        if row["num_steps"] is None:
            steps = [other["step"] for other in rows if other["expert"] == row["expert"]]
            row["num_steps"] = max(steps) + 1
