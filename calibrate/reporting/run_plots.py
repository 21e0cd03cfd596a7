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
    VERMILION,
    axes_or_new,
    bare,
    finish,
    policy_styles,
)
from calibrate.trials.measures import MEASURES

LEGEND: dict[str, Any] = {"ncols": 2, "labelcolor": INK, "frameon": False}
LEADING = (VERMILION, BLUE)  # the plan and the gate, in front of the others


def pareto(
    summary: pd.DataFrame, ax: Axes | None = None, *, measure: str = "psnr_db"
) -> Axes:
    """Quality over computed steps, one line per policy, with its interval over prompts; the legend has the best first.

    Args:
        summary: Columns ``policy``, ``computed_steps``, ``{measure}`` and ``{measure}_low``, ``{measure}_high``.
    """
    ranked = by_quality(summary, measure)
    ax = axes_or_new(ax, (7.2, 4.6 + 0.12 * len(ranked)))
    styles = policy_styles(ranked)
    # Policies of equal steps stand side by side, so that none hides another's interval: under one step apart, and
    # under the distance of the budgets.
    budgets = np.unique(np.round(summary["computed_steps"]))
    gap = np.diff(budgets).min() if len(budgets) > 1 else 1.0
    spread = min(0.08 * (len(ranked) - 1), 0.8, 0.4 * gap)
    places = np.linspace(-spread / 2, spread / 2, len(ranked))
    for rank, (policy, place) in enumerate(zip(ranked, places, strict=True)):
        rows = summary[summary["policy"] == policy].sort_values("computed_steps")
        color, marker, line = styles[policy]
        width = 0.9 if color == GREY else 1.3
        if color in LEADING and line == "-":
            width = 2.4
        mean = rows[measure]
        errors = mean - rows[f"{measure}_low"], rows[f"{measure}_high"] - mean
        ax.errorbar(
            rows["computed_steps"] + place,
            mean,
            np.nan_to_num(errors, posinf=0),
            label=policy,
            color=color,
            marker=marker,
            linestyle=line,
            linewidth=width,
            elinewidth=0.7 * width,
            markersize=3.5 + width,
            zorder=2 + width - 0.01 * rank,  # wide ones in front, then better ones
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    known = MEASURES[measure]
    label = f"{known.label} against uncached" + (f" ({known.unit})" if known.unit else "")
    finish(ax, "Quality at equal work (mean, 95 % interval)", "computed steps", label)
    # Below the axes, where all policies have room.
    ax.legend(
        **LEGEND,
        loc="upper left",
        bbox_to_anchor=(-0.08, -0.14),
        fontsize=8.5,
        handlelength=3.2,
    )
    return ax


def by_quality(summary: pd.DataFrame, measure: str = "psnr_db") -> list[str]:
    """The policies of a summary, the best first: by their mean distance from the line through all points.

    Policies have points at different numbers of steps, so that their means alone do not compare.
    """
    finite = summary[np.isfinite(summary[measure])]
    x, line = finite["computed_steps"], np.zeros(1)
    if len(finite):
        line = np.polyfit(x, finite[measure], min(1, x.nunique() - 1))
    rest = summary[measure] - np.polyval(line, summary["computed_steps"])
    means = rest.groupby(summary["policy"], sort=False).mean()
    less_is_better = not MEASURES[measure].higher_is_better
    return list(means.sort_values(ascending=less_is_better, kind="stable").index)


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
    steps = max(map(len, patterns.values()))
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(len(patterns) - 0.5, -0.5))
    ax.set_yticks(range(len(patterns)), list(patterns))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bare(finish(ax, title, "step (filled: computed, empty: skipped)", ""))


def sample_grid(
    samples: Sequence[tuple], ax: Axes | None = None, *, gain: float | None = None
) -> Axes:
    """Rows of one sample each: uncached, cached, and their absolute difference, brightened by ``gain``.

    Args:
        samples: ``(label, uncached, cached, ...)`` with images (height, width, 3) in [0, 1].
        gain: Factor of the difference; by default the power of two that makes the largest one just visible at full.
    """
    labels, uncached, cached, *_ = map(np.array, zip(*samples, strict=True))
    difference = np.abs(uncached - cached).mean(axis=-1, keepdims=True)
    if gain is None:
        largest = max(difference.max(), 1 / 256)  # nothing is brightened more than 256-fold
        gain = 2 ** np.floor(np.log2(1 / largest))
    count, height, width, _ = uncached.shape
    gap = max(1, width // 16)
    cells = np.ones((count, height + gap, 3, width + gap, 3))  # white between the images
    for column, images in enumerate((uncached, cached, gain * difference)):
        cells[:, :height, column, :width] = images
    canvas = cells.reshape(count * (height + gap), -1, 3)[:-gap, :-gap]
    ax = axes_or_new(ax, (5.2, 0.4 + 1.32 * count))
    ax.imshow(canvas.clip(0, 1), interpolation="nearest")
    ax.xaxis.tick_top()
    middles = width / 2 + np.arange(3) * (width + gap)
    ax.set_xticks(middles, ["uncached", "cached", f"difference × {gain:g}"])
    middles = height / 2 + np.arange(count) * (height + gap)
    ax.set_yticks(middles, [fill(label, 20) for label in labels])
    return bare(ax)


def series_grid(samples: Sequence[tuple], ax: Axes | None = None) -> Axes:
    """Rows of one sample each, its channels side by side: the uncached series, and the cached one over it.

    Args:
        samples: ``(label, uncached, cached, ...)`` with series (channels, values).
    """
    ax = axes_or_new(ax, (5.2, 0.4 + 1.32 * len(samples)))
    for row, (_, uncached, cached, *_) in enumerate(samples):
        # Every channel on its own scale; 0.8 of a row leaves a gap to the next.
        low, span = uncached.min(axis=1), np.ptp(uncached, axis=1)
        scale = 0.8 / np.where(span > 0, span, 1)
        channels, length = uncached.shape
        x = np.linspace(0, 0.95, length)[:, None] + np.arange(channels)
        for values, color, name in (
            (uncached, GREY, "uncached"),
            (cached, VERMILION, "cached"),
        ):
            lines = ax.plot(x, (values.T - low) * scale - row, color=color, linewidth=1.2)
            lines[0].set_label("" if row else name)
    middles = [0.4 - row for row in range(len(samples))]
    ax.set_yticks(middles, [fill(label, 20) for label, *_ in samples])
    ax.set_xticks([])
    ax.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1))
    return bare(ax)
