"""Pictures of a run and its fit: every plot is ``f(data, ..., ax=None) -> ax``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from calibrate.reporting.style import (
    BLUE,
    INK,
    STYLE,
    VERMILION,
    axes_or_new,
    branch_style,
    finish,
    series_style,
)
from coeffs.entry.polynomial import Polynomial
from coeffs.entry.signals import SIGNALS

SIGNAL_LABELS = {
    signal.name: f"x: relative L1 change\nof the {signal.label}" for signal in SIGNALS.values()
}
TARGET_LABELS = {
    "output": "y: relative L1 change\nof the output",
    "hidden": "y: relative L1 change\nof the last hidden state",
    "residual": "y: relative L1 change\nof the stack's residual",
}
SIGMA_LABEL = "sigma (noise → image)"
CROWDED = 600  # pairs from which points are drawn small and pale

Fits = Mapping[str, Polynomial] | Polynomial


def predictions(polynomial: Polynomial, x: Any) -> np.ndarray:
    """The polynomial's predictions at every x, clamping and sign rule included."""
    return np.array([polynomial.predict(value) for value in np.asarray(x, float)])


def pairs_with_fit(
    pairs: pd.DataFrame,
    fits: Fits | None = None,
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
    for branch, rows in _by_branch(pairs):
        _points(ax, rows["x"], rows["y"], branch, f"{branch}: {len(rows)} pairs", len(pairs))
    for branch, polynomial in (fits or {}).items():
        color, note = branch_style(branch)[0], "fit"
        low, high = polynomial.domain or (pairs["x"].min(), pairs["x"].max())
        grid = np.linspace(low, high, 200)
        band = (bands or {}).get(branch)
        if band is not None:
            _range(ax, band["x"], band, "low", "high", color)
            note = "fit, 95 % interval"
        curve = predictions(polynomial, grid)
        ax.plot(grid, curve, color=color, linewidth=2, label=f"{branch}: {note}")
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
        color, line = series_style(index)
        curve = predictions(polynomial, grid)
        ax.plot(grid, curve, color=color, linestyle=line, linewidth=2, label=label)
    ax.axhline(0, color=INK, linewidth=0.8)
    return finish(ax, title, "x: relative L1 change of the signal", "predicted relative L1 change")


def residuals(
    pairs: pd.DataFrame,
    fits: Fits,
    ax: Axes | None = None,
    *,
    over: str = "sigma",
    title: str = "What the fit leaves over",
) -> Axes:
    """Measured minus predicted change of every pair over ``sigma`` (or ``x``); the line is each step's median.

    A line that leaves zero means that the schedule explains something that x does not.
    """
    ax = axes_or_new(ax)
    for branch, rows in _by_branch(pairs):
        polynomial = fits if isinstance(fits, Polynomial) else fits.get(branch, fits.get("pooled"))
        if polynomial is None:
            continue
        rest = rows["y"] - predictions(polynomial, rows["x"])
        _points(ax, rows[over], rest, branch, None, CROWDED + 1)
        if over == "sigma":
            median = rest.groupby(rows["sigma"]).median()
            label = f"{branch}: median per step"
            color, _ = branch_style(branch)
            ax.plot(median.index, median, color=color, linewidth=1.6, label=label)
    ax.axhline(0, color=INK, linewidth=0.8)
    if over == "sigma":
        ax.invert_xaxis()
    return finish(ax, title, SIGMA_LABEL if over == "sigma" else "x", "measured - predicted change")


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
    for branch, rows in _by_branch(pairs):
        color, marker = branch_style(branch)
        table = rows.groupby("sigma")[column].quantile([0.1, 0.5, 0.9]).unstack()
        _range(ax, table.index, table, 0.1, 0.9, color)
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 3,
            "linewidth": 1.5,
        }
        ax.plot(table.index, table[0.5], label=branch, **style)
    ax.invert_xaxis()
    ax.set_ylim(bottom=0)
    known = {"x": SIGNAL_LABELS["modulated_input"], "y": TARGET_LABELS["output"]}
    return finish(ax, title, SIGMA_LABEL, label or known.get(column, column))


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
    x, label = table["threshold"], "replayed (range: prompts)"
    _range(ax, x, table, "computed_low", "computed_high", BLUE)
    ax.plot(x, table["computed_steps"], color=BLUE, linewidth=2, label=label)
    if verified is not None and len(verified):
        points = verified["threshold"], verified["computed_steps"]
        ax.plot(*points, color=VERMILION, marker="s", linestyle="none", label="real cached runs")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "Threshold and computed steps", "threshold", "computed steps")


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Held-out error over the number of prompts used for the fit.

    Args:
        table: Columns ``prompts``, ``rmse``, ``low``, ``high``; ``branch`` for one line each.
    """
    ax = axes_or_new(ax)
    for branch, rows in _by_branch(table if "branch" in table else table.assign(branch="pooled")):
        rows, (color, marker) = rows.sort_values("prompts"), branch_style(branch)
        _range(ax, rows["prompts"], rows, "low", "high", color)
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4}
        ax.plot(rows["prompts"], rows["rmse"], label=branch, **style)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "How many prompts are enough", "prompts fitted", "held-out RMSE of y")


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
    branches = _by_branch(pairs)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        above = parts[0].subplots(1, len(branches), squeeze=False)[0]
        for (branch, own), ax in zip(branches, above, strict=True):
            polynomial = fits.get(branch, fits.get("pooled"))
            of_branch = {branch: polynomial} if polynomial else None
            names: dict[str, Any] = {
                "signal": signal,
                "target": target,
                "title": f"{branch}: pairs and fit",
            }
            pairs_with_fit(own, of_branch, bands, ax, **names)
        below = parts[1].subplots(1, 3)
        residuals(pairs, fits, below[0])
        titles = "Signal over the schedule", "Target over the schedule"
        over_sigma(pairs, "x", below[1], label=SIGNAL_LABELS[signal], title=titles[0])
        over_sigma(pairs, "y", below[2], label=TARGET_LABELS[target], title=titles[1])
        if title:
            figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _by_branch(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each branch, the conditional one first."""
    groups = [(str(branch), rows) for branch, rows in table.groupby("branch")]
    return sorted(groups, key=lambda group: (group[0] != "cond", group[0]))


def _points(
    ax: Axes, x: pd.Series, y: pd.Series, branch: str, label: str | None, pairs: int
) -> None:
    color, marker = branch_style(branch)
    crowded = pairs > CROWDED
    size, alpha = (7, 0.35) if crowded else (14, 0.6)
    style: dict[str, Any] = {
        "color": color,
        "marker": marker,
        "linewidths": 0,
        "rasterized": crowded,
    }
    ax.scatter(x, y, s=size, alpha=alpha, label=label, **style)


def _range(ax: Axes, x: Any, table: pd.DataFrame, low: Any, high: Any, color: str) -> None:
    ax.fill_between(x, table[low], table[high], color=color, alpha=0.2, linewidth=0)
