"""Pictures of a run, an entry and a verification: every plot is ``f(data, ..., ax=None) -> ax``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from calibrate.reporting.style import (
    BLUE,
    GREY,
    INK,
    POLICY_LINES,
    STYLE,
    VERMILION,
    axes_or_new,
    branch_style,
    finish,
    policy_styles,
    series_style,
)
from coeffs.entry.polynomial import Polynomial

SIGNAL_LABELS = {
    "modulated_input": "x: relative L1 change\nof the modulated input",
    "time_embedding": "x: relative L1 change\nof the time embedding",
}
TARGET_LABELS = {
    "output": "y: relative L1 change\nof the output",
    "hidden": "y: relative L1 change\nof the last hidden state",
    "residual": "y: relative L1 change\nof the stack's residual",
}
MEASURE_LABELS = {
    "psnr_db": "PSNR against uncached (dB)",
    "ssim": "SSIM against uncached",
    "ms_ssim": "MS-SSIM against uncached",
    "latent_rel_l2": "relative L2 error of the final latents",
    "snr_db": "SNR against uncached (dB)",
    "log_spectral_distance_db": "log-spectral distance (dB)",
    "lpips": "LPIPS against uncached",
}


LESS_IS_BETTER = ("latent_rel_l2", "log_spectral_distance_db", "lpips")
LEADING = (VERMILION, BLUE)  # in front of the others


def _branches(frame: pd.DataFrame) -> list[str]:
    return sorted(frame["branch"].unique(), key=lambda branch: (branch != "cond", branch))


def predictions(polynomial: Polynomial, x: Sequence[float]) -> np.ndarray:
    """The polynomial's predictions at every x, clamping and sign rule included."""
    return np.array([polynomial.predict(value) for value in np.asarray(x, float)])


def pairs_with_fit(
    pairs: pd.DataFrame,
    fits: Mapping[str, Polynomial] | Polynomial | None = None,
    bands: Mapping[str, pd.DataFrame] | None = None,
    ax: Axes | None = None,
    *,
    signal: str = "modulated_input",
    target: str = "output",
    title: str = "Pairs and fit",
) -> Axes:
    """Recorded pairs and the fitted polynomial over its domain.

    Args:
        pairs: Columns ``x``, ``y`` and ``branch`` (``Run.pairs``).
        fits: One polynomial, or one per branch.
        bands: Per branch a table ``x, low, high``: the interval of the fitted curve.
    """
    ax = axes_or_new(ax)
    if isinstance(fits, Polynomial):
        fits = {"pooled": fits}
    crowded = len(pairs) > 600
    for branch in _branches(pairs):
        rows, (color, marker) = pairs[pairs["branch"] == branch], branch_style(branch)
        ax.scatter(
            rows["x"], rows["y"], s=7 if crowded else 14, color=color, marker=marker, linewidths=0,
            alpha=0.35 if crowded else 0.6, label=f"{branch}: {len(rows)} pairs", rasterized=crowded,
        )  # fmt: skip
    for branch, polynomial in (fits or {}).items():
        color, low_high = (
            branch_style(branch)[0],
            polynomial.domain or (pairs["x"].min(), pairs["x"].max()),
        )
        grid = np.linspace(*low_high, 200)
        band = (bands or {}).get(branch)
        if band is not None:
            ax.fill_between(
                band["x"], band["low"], band["high"], color=color, alpha=0.2, linewidth=0
            )
        note = "fit, 95 % interval" if band is not None else "fit"
        ax.plot(
            grid, predictions(polynomial, grid), color=color, linewidth=2, label=f"{branch}: {note}"
        )
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    return finish(ax, title, SIGNAL_LABELS[signal].replace("\n", " "), TARGET_LABELS[target])


def curves(
    polynomials: Mapping[str, Polynomial],
    ax: Axes | None = None,
    *,
    domain: tuple[float, float] = (0.0, 0.5),
    title: str = "What the entries predict",
) -> Axes:
    """Predictions of several entries, each over its own domain, or over ``domain`` where none was published."""
    ax = axes_or_new(ax)
    for index, (label, polynomial) in enumerate(polynomials.items()):
        grid = np.linspace(*(polynomial.domain or domain), 200)
        color, _, line = series_style(index)
        ax.plot(
            grid,
            predictions(polynomial, grid),
            color=color,
            linestyle=line,
            linewidth=2,
            label=label,
        )
    ax.axhline(0, color=INK, linewidth=0.8)
    return finish(ax, title, "x: relative L1 change of the signal", "predicted relative L1 change")


def residuals(
    pairs: pd.DataFrame,
    fits: Mapping[str, Polynomial] | Polynomial,
    ax: Axes | None = None,
    *,
    over: str = "sigma",
    title: str = "What the fit leaves over",
) -> Axes:
    """Measured minus predicted change of every pair over ``sigma`` (or ``x``); the line is each step's median.

    A line that leaves zero means that the schedule explains something that x does not.
    """
    ax = axes_or_new(ax)
    for branch in _branches(pairs):
        polynomial = fits if isinstance(fits, Polynomial) else fits.get(branch, fits.get("pooled"))
        if polynomial is None:
            continue
        rows, (color, marker) = pairs[pairs["branch"] == branch], branch_style(branch)
        rest = rows["y"] - predictions(polynomial, rows["x"])
        ax.scatter(
            rows[over],
            rest,
            s=7,
            color=color,
            marker=marker,
            alpha=0.3,
            linewidths=0,
            rasterized=True,
        )
        if over == "sigma":
            median = rest.groupby(rows["sigma"]).median()
            ax.plot(
                median.index, median, color=color, linewidth=1.6, label=f"{branch}: median per step"
            )
    ax.axhline(0, color=INK, linewidth=0.8)
    if over == "sigma":
        ax.invert_xaxis()
    return finish(
        ax,
        title,
        "sigma (noise → image)" if over == "sigma" else "x",
        "measured - predicted change",
    )


def over_sigma(
    pairs: pd.DataFrame,
    column: str = "x",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    title: str | None = None,
) -> Axes:
    """A logged quantity over sigma, noise to image: median over trajectories and the range from 10 to 90 %."""
    ax = axes_or_new(ax)
    for branch in _branches(pairs):
        rows, (color, marker) = pairs[pairs["branch"] == branch], branch_style(branch)
        table = rows.groupby("sigma")[column].quantile([0.1, 0.5, 0.9]).unstack()
        ax.fill_between(table.index, table[0.1], table[0.9], color=color, alpha=0.2, linewidth=0)
        ax.plot(
            table.index,
            table[0.5],
            color=color,
            marker=marker,
            markersize=3,
            linewidth=1.5,
            label=branch,
        )
    ax.invert_xaxis()
    ax.set_ylim(bottom=0)
    label = label or {"x": SIGNAL_LABELS["modulated_input"], "y": TARGET_LABELS["output"]}.get(
        column, column
    )
    return finish(ax, title, "sigma (noise → image)", label)


def replay_curve(
    table: pd.DataFrame, ax: Axes | None = None, *, verified: pd.DataFrame | None = None
) -> Axes:
    """Computed steps over the threshold, replayed from the log, with the spread over prompts.

    Args:
        table: Columns ``threshold``, ``computed_steps``, ``computed_low``, ``computed_high``.
        verified: Columns ``threshold``, ``computed_steps`` of real cached runs.
    """
    ax = axes_or_new(ax)
    table = table.sort_values("threshold")
    ax.fill_between(
        table["threshold"],
        table["computed_low"],
        table["computed_high"],
        color=BLUE,
        alpha=0.2,
        linewidth=0,
    )
    ax.plot(
        table["threshold"],
        table["computed_steps"],
        color=BLUE,
        linewidth=2,
        label="replayed (range: prompts)",
    )
    if verified is not None and len(verified):
        ax.plot(
            verified["threshold"], verified["computed_steps"], color=VERMILION, marker="s", linestyle="none",
            label="real cached runs",
        )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "Threshold and computed steps", "threshold", "computed steps")


def pareto(summary: pd.DataFrame, ax: Axes | None = None, *, measure: str = "psnr_db") -> Axes:
    """Quality over computed steps, one line per policy, with its interval over prompts; the legend has the best first.

    Args:
        summary: Columns ``policy``, ``computed_steps``, ``{measure}`` and ``{measure}_low``, ``{measure}_high``.
    """
    ranked = by_quality(summary, measure)
    ax = axes_or_new(ax, (7.2, 4.6 + 0.12 * len(ranked)))
    styles, places = (
        policy_styles(ranked),
        np.linspace(-0.5, 0.5, len(ranked)) if len(ranked) > 1 else [0.0],
    )
    spread = min(0.08 * len(ranked), _room(summary["computed_steps"]))
    for rank, (policy, place) in enumerate(zip(ranked, places, strict=True)):
        rows, (color, marker, line) = (
            summary[summary["policy"] == policy].sort_values("computed_steps"),
            styles[policy],
        )
        mean, grey = rows[measure].to_numpy(), color == GREY
        leading = color in LEADING and line == POLICY_LINES[0]  # the plan and the gate
        errors = np.array([mean - rows[f"{measure}_low"], rows[f"{measure}_high"] - mean])
        ax.errorbar(
            # Policies of equal steps stand side by side, so that none hides another's interval.
            rows["computed_steps"] + spread * place, mean, np.where(np.isfinite(errors), errors, 0),
            color=color, marker=marker, linestyle=line, markersize=6 if leading else 4.5,
            linewidth=2.4 if leading else 0.9 if grey else 1.3, elinewidth=1.6 if leading else 0.9, capsize=0,
            alpha=0.7 if grey else 1, zorder=5 if leading else 2 if grey else 3 + 1 / (2 + rank), label=policy,
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Quality at equal work (mean, 95 % interval)"
    finish(ax, title, "computed steps", MEASURE_LABELS[measure], legend=False)
    ax.legend(
        loc="upper left", bbox_to_anchor=(-0.08, -0.14), ncols=2, labelcolor=INK, frameon=False, fontsize=8.5,
        handlelength=3.2,
    )  # fmt: skip
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
    return list(means.sort_values(ascending=measure in LESS_IS_BETTER, kind="stable").index)


def _room(steps: pd.Series) -> float:
    """How many steps wide policies may stand side by side: under one, and under the distance of the budgets."""
    budgets = np.unique(np.round(steps))
    gap = np.diff(budgets).min() if len(budgets) > 1 else 1.0
    return float(min(0.8, 0.4 * gap))


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Held-out error over the number of prompts used for the fit.

    Args:
        table: Columns ``prompts``, ``rmse``, ``low``, ``high``; ``branch`` for one line each.
    """
    ax = axes_or_new(ax)
    groups = table.groupby("branch") if "branch" in table else [("pooled", table)]
    for branch, rows in groups:
        rows, (color, marker) = rows.sort_values("prompts"), branch_style(branch)
        ax.fill_between(
            rows["prompts"], rows["low"], rows["high"], color=color, alpha=0.2, linewidth=0
        )
        ax.plot(
            rows["prompts"], rows["rmse"], color=color, marker=marker, markersize=4, label=branch
        )
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "How many prompts are enough", "prompts fitted", "held-out RMSE of y")


def step_patterns(
    patterns: Mapping[str, str], ax: Axes | None = None, *, title: str = "Computed steps"
) -> Axes:
    """One row of cells per pattern ``"CCSC..."``: filled where the step was computed, empty where skipped."""
    ax = axes_or_new(ax, (6.4, 0.7 + 0.3 * len(patterns)))
    for row, pattern in enumerate(patterns.values()):
        for step, letter in enumerate(pattern):
            face = BLUE if letter == "C" else "none"
            cell = mpl.patches.Rectangle(
                (step - 0.44, row - 0.36), 0.88, 0.72, lw=0.6, ec=GREY, fc=face
            )
            ax.add_patch(cell)
    steps = max(map(len, patterns.values()), default=1)
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(len(patterns) - 0.5, -0.5))
    finish(ax, title, "step (filled: computed, empty: skipped)", "", legend=False)
    ax.set_yticks(range(len(patterns)), list(patterns))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def sample_grid(
    samples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    ax: Axes | None = None,
    *,
    gain: float | None = None,
) -> Axes:
    """Rows of one sample each: uncached, cached, and their absolute difference, brightened by ``gain``.

    Args:
        samples: ``(label, uncached, cached)`` with images (height, width, 3) in [0, 1]; of a video give one frame.
        gain: Factor of the difference; by default the power of two that makes the largest one just visible at full.
    """
    if not samples:
        raise ValueError("no samples to show")
    differences = [
        np.abs(cached - uncached).mean(axis=-1, keepdims=True) for _, uncached, cached in samples
    ]
    if gain is None:
        largest = max(float(difference.max()) for difference in differences)
        gain = 1.0 if largest == 0 else float(2 ** np.clip(np.floor(np.log2(1 / largest)), 0, 8))
    height, width = samples[0][1].shape[:2]
    gap = max(1, width // 16)
    canvas = np.full((len(samples) * (height + gap) - gap, 3 * width + 2 * gap, 4), 0.0)
    for row, ((_, uncached, cached), difference) in enumerate(
        zip(samples, differences, strict=True)
    ):
        top = row * (height + gap)
        for column, image in enumerate(
            (uncached, cached, np.broadcast_to(difference * gain, uncached.shape))
        ):
            left = column * (width + gap)
            canvas[top : top + height, left : left + width, :3] = np.clip(image[..., :3], 0, 1)
            canvas[top : top + height, left : left + width, 3] = 1
    ax = axes_or_new(ax, (5.2, 0.4 + 1.32 * len(samples)))
    ax.imshow(canvas, interpolation="nearest")
    ax.xaxis.tick_top()
    columns = ["uncached", "cached", f"difference × {gain:g}" if gain != 1 else "difference"]
    with mpl.rc_context(STYLE):
        ax.set_xticks([width / 2 + i * (width + gap) for i in range(3)], columns, color=INK)
        rows = [height / 2 + i * (height + gap) for i in range(len(samples))]
        ax.set_yticks(rows, [fill(label, 20) for label, _, _ in samples], color=INK)
    ax.tick_params(length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    return ax


def fit_figure(
    pairs: pd.DataFrame,
    fits: Mapping[str, Polynomial],
    bands: Mapping[str, pd.DataFrame] | None = None,
    *,
    signal: str = "modulated_input",
    target: str = "output",
    title: str | None = None,
) -> Figure:
    """``report/fit.png``: pairs and fit per branch above, residuals, signal and target over sigma below."""
    branches = _branches(pairs)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        for branch, ax in zip(
            branches, above.subplots(1, len(branches), squeeze=False)[0], strict=True
        ):
            polynomial = fits.get(branch, fits.get("pooled"))
            pairs_with_fit(
                pairs[pairs["branch"] == branch], {branch: polynomial} if polynomial else None, bands, ax,
                signal=signal, target=target, title=f"{branch}: pairs and fit",
            )  # fmt: skip
        axes = below.subplots(1, 3)
        residuals(pairs, fits, axes[0])
        over_sigma(
            pairs, "x", axes[1], label=SIGNAL_LABELS[signal], title="Signal over the schedule"
        )
        over_sigma(
            pairs, "y", axes[2], label=TARGET_LABELS[target], title="Target over the schedule"
        )
        if title:
            figure.suptitle(title, fontsize=11, color=INK)
    return figure
