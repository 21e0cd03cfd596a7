"""Pictures of a verification's real runs: quality over steps, patterns, samples; ``f(data, ..., ax=None) -> ax``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from calibrate.reporting.style import (
    BLUE,
    GREY,
    INK,
    POLICY_LINES,
    STYLE,
    VERMILION,
    axes_or_new,
    finish,
    policy_styles,
)
from calibrate.trials.measures import MEASURES

LEADING = (VERMILION, BLUE)  # the plan and the gate, in front of the others


def pareto(summary: pd.DataFrame, ax: Axes | None = None, *, measure: str = "psnr_db") -> Axes:
    """Quality over computed steps, one line per policy, with its interval over prompts; the legend has the best first.

    Args:
        summary: Columns ``policy``, ``computed_steps``, ``{measure}`` and ``{measure}_low``, ``{measure}_high``.
    """
    ranked = by_quality(summary, measure)
    ax = axes_or_new(ax, (7.2, 4.6 + 0.12 * len(ranked)))
    styles = policy_styles(ranked)
    # Policies of equal steps stand side by side, so that none hides another's interval.
    spread = min(0.08 * len(ranked), _room(summary["computed_steps"]))
    places = spread * np.linspace(-0.5, 0.5, len(ranked)) if len(ranked) > 1 else [0.0]
    for rank, (policy, place) in enumerate(zip(ranked, places, strict=True)):
        rows = summary[summary["policy"] == policy].sort_values("computed_steps")
        color, marker, line = styles[policy]
        grey, leading = color == GREY, color in LEADING and line == POLICY_LINES[0]
        mean = rows[measure].to_numpy()
        errors = np.array([mean - rows[f"{measure}_low"], rows[f"{measure}_high"] - mean])
        ax.errorbar(
            rows["computed_steps"] + place, mean, np.where(np.isfinite(errors), errors, 0),
            color=color, marker=marker, linestyle=line, markersize=6 if leading else 4.5,
            linewidth=2.4 if leading else 0.9 if grey else 1.3, elinewidth=1.6 if leading else 0.9,
            alpha=0.7 if grey else 1, zorder=5 if leading else 2 if grey else 3 + 1 / (2 + rank), label=policy,
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Quality at equal work (mean, 95 % interval)"
    finish(ax, title, "computed steps", measure_label(measure), legend=False)
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.08, -0.14), "ncols": 2}
    ax.legend(**below, labelcolor=INK, frameon=False, fontsize=8.5, handlelength=3.2)
    return ax


def by_quality(summary: pd.DataFrame, measure: str = "psnr_db") -> list[str]:
    """The policies of a summary, the best first: by their mean distance from the line through all points.

    Policies have points at different numbers of steps, so that their means alone do not compare.
    """
    finite = summary[np.isfinite(summary[measure])]
    degree = min(1, finite["computed_steps"].nunique() - 1)
    line = np.polyfit(finite["computed_steps"], finite[measure], degree) if len(finite) else [0.0]
    rest = summary[measure] - np.polyval(line, summary["computed_steps"])
    means = rest.groupby(summary["policy"], sort=False).mean()
    less_is_better = not MEASURES[measure].higher_is_better
    return list(means.sort_values(ascending=less_is_better, kind="stable").index)


def measure_label(measure: str) -> str:
    """A measure as the label of an axis."""
    known = MEASURES[measure]
    return f"{known.label} against uncached" + (f" ({known.unit})" if known.unit else "")


def step_patterns(
    patterns: Mapping[str, str], ax: Axes | None = None, *, title: str = "Computed steps"
) -> Axes:
    """One row of cells per pattern ``"CCSC..."``: filled where the step was computed, empty where skipped."""
    ax = axes_or_new(ax, (6.4, 0.7 + 0.3 * len(patterns)))
    for row, pattern in enumerate(patterns.values()):
        for step, letter in enumerate(pattern):
            face = BLUE if letter == "C" else "none"
            corner = step - 0.44, row - 0.36
            ax.add_patch(mpl.patches.Rectangle(corner, 0.88, 0.72, lw=0.6, ec=GREY, fc=face))
    steps = max(map(len, patterns.values()), default=1)
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(len(patterns) - 0.5, -0.5))
    finish(ax, title, "step (filled: computed, empty: skipped)", "", legend=False)
    ax.set_yticks(range(len(patterns)), list(patterns))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def sample_grid(
    samples: Sequence[tuple],
    ax: Axes | None = None,
    *,
    gain: float | None = None,
) -> Axes:
    """Rows of one sample each: uncached, cached, and their absolute difference, brightened by ``gain``.

    Args:
        samples: ``(label, uncached, cached, ...)`` with images (height, width, 3) in [0, 1].
        gain: Factor of the difference; by default the power of two that makes the largest one just visible at full.
    """
    if not samples:
        raise ValueError("no samples to show")
    differences = [np.abs(b - a).mean(axis=-1, keepdims=True) for _, a, b, *_ in samples]
    if gain is None:
        largest = max(float(difference.max()) for difference in differences)
        gain = 1.0 if largest == 0 else float(2 ** np.clip(np.floor(np.log2(1 / largest)), 0, 8))
    height, width = samples[0][1].shape[:2]
    gap = max(1, width // 16)
    rows = []
    for (_, uncached, cached, *_), difference in zip(samples, differences, strict=True):
        shown = uncached, cached, np.broadcast_to(difference * gain, uncached.shape)
        rows.append(np.hstack([_cell(image, gap) for image in shown]))
    canvas = np.vstack(rows)[:-gap, :-gap]
    ax = axes_or_new(ax, (5.2, 0.4 + 1.32 * len(samples)))
    ax.imshow(canvas, interpolation="nearest")
    ax.xaxis.tick_top()
    columns = ["uncached", "cached", f"difference × {gain:g}" if gain != 1 else "difference"]
    middles = [height / 2 + i * (height + gap) for i in range(len(samples))]
    with mpl.rc_context(STYLE):
        ax.set_xticks([width / 2 + i * (width + gap) for i in range(3)], columns, color=INK)
        ax.set_yticks(middles, [fill(label, 20) for label, *_ in samples], color=INK)
    ax.tick_params(length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    return ax


def series_grid(samples: Sequence[tuple], ax: Axes | None = None) -> Axes:
    """Rows of one sample each, its channels side by side: the uncached series, and the cached one over it.

    Args:
        samples: ``(label, uncached, cached, ...)`` with series (channels, values).
    """
    if not samples:
        raise ValueError("no samples to show")
    channels, length = samples[0][1].shape
    ax = axes_or_new(ax, (5.2, 0.4 + 1.32 * len(samples)))
    for row, (_, uncached, cached, *_) in enumerate(samples):
        low = uncached.min(axis=1, keepdims=True)
        span = np.ptp(uncached, axis=1, keepdims=True)
        for values, color, name in ((uncached, GREY, "uncached"), (cached, VERMILION, "cached")):
            # Every channel on its own scale; 0.8 of a row leaves a gap to the next.
            heights = 0.8 * (values - low) / np.where(span > 0, span, 1) - row
            for channel in range(channels):
                x = np.linspace(0, 0.95, length) + channel
                label = name if row == channel == 0 else None
                ax.plot(x, heights[channel], color=color, linewidth=1.2, label=label)
    with mpl.rc_context(STYLE):
        rows = [0.4 - row for row in range(len(samples))]
        ax.set_yticks(rows, [fill(label, 20) for label, *_ in samples], color=INK)
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=9)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, labelcolor=INK)
    return ax


def _cell(image: np.ndarray, gap: int) -> np.ndarray:
    """An image with an opaque alpha channel, and a transparent gap to its right and below."""
    opaque = np.dstack([np.clip(image[..., :3], 0, 1), np.ones(image.shape[:2])])
    return np.pad(opaque, ((0, gap), (0, gap), (0, 0)))


def _room(steps: pd.Series) -> float:
    """How many steps wide policies may stand side by side: under one, and under the distance of the budgets."""
    budgets = np.unique(np.round(steps))
    gap = np.diff(budgets).min() if len(budgets) > 1 else 1.0
    return float(min(0.8, 0.4 * gap))
