"""Pictures of a run and its fit: every plot is ``f(data, ..., ax=None) -> ax``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, cycle, repeat
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from calibrate.reporting.style import (
    BLUE,
    BRANCH_STYLES,
    INK,
    SERIES_STYLES,
    STYLE,
    VERMILION,
    axes_or_new,
    finish,
)
from coeffs.entry.polynomial import Polynomial
from coeffs.entry.signals import SIGNALS

SIGNAL_LABELS = {
    signal.name: f"x: relative L1 change\nof the {signal.label}"
    for signal in SIGNALS.values()
}
TARGET_LABELS = {
    "output": "y: relative L1 change\nof the output",
    "hidden": "y: relative L1 change\nof the last hidden state",
    "residual": "y: relative L1 change\nof the stack's residual",
}
SIGMA_LABEL = "sigma (noise → image)"
CROWDED = 600  # pairs from which points are drawn small and pale

# By branch; a branch without one of its own has that of "pooled".
Fits = Mapping[str, Polynomial]


def pairs_with_fit(
    pairs: pd.DataFrame,
    fit: Polynomial,
    band: pd.DataFrame | None = None,
    ax: Axes | None = None,
    *,
    signal: str = "modulated_input",
    target: str = "output",
) -> Axes:
    """A branch's recorded pairs and its fitted polynomial over its domain.

    Args:
        pairs: Columns ``x``, ``y`` and ``branch`` (``Run.pairs``), of one branch.
        band: Columns ``x``, ``low``, ``high``: the interval of the fitted curve.
    """
    ax = axes_or_new(ax)
    branch, note = pairs["branch"].iloc[0], "fit"
    color, _ = BRANCH_STYLES[branch]
    label = f"{branch}: {len(pairs)} pairs"
    _points(ax, pairs["x"], pairs["y"], branch, len(pairs) > CROWDED, label)
    if band is not None:
        _range(ax, band["x"], band["low"], band["high"], color)
        note = "fit, 95 % interval"
    domain = fit.domain or (pairs["x"].min(), pairs["x"].max())
    _curve(ax, fit, domain, color=color, label=f"{branch}: {note}")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    x, y = SIGNAL_LABELS[signal].replace("\n", " "), TARGET_LABELS[target]
    return finish(ax, f"{branch}: pairs and fit", x, y)


def curves(
    polynomials: Mapping[str, Polynomial],
    ax: Axes | None = None,
    *,
    domain: tuple[float, float] = (0.0, 0.5),
    title: str = "What the entries predict",
) -> Axes:
    """Predictions of several entries, each over its own domain, or over ``domain`` where none was published."""
    ax = axes_or_new(ax)
    styles = cycle(SERIES_STYLES)
    for (label, polynomial), (color, line) in zip(polynomials.items(), styles, strict=False):
        known = polynomial.domain or domain
        _curve(ax, polynomial, known, color=color, linestyle=line, label=label)
    ax.axhline(0, color=INK, linewidth=0.8)
    xlabel = "x: relative L1 change of the signal"
    return finish(ax, title, xlabel, "predicted relative L1 change")


def residuals(pairs: pd.DataFrame, fits: Fits, ax: Axes | None = None) -> Axes:
    """Measured minus predicted change of every pair over sigma; the line is each step's median.

    A line that leaves zero means that the schedule explains something that x does not.
    """
    ax = axes_or_new(ax)
    for branch, rows in pairs.groupby("branch"):
        predict = np.vectorize(_fit_of(fits, branch).predict)
        rest = rows["y"] - predict(rows["x"])
        _points(ax, rows["sigma"], rest, branch, crowded=True)
        median = rest.groupby(rows["sigma"]).median()
        color, _ = BRANCH_STYLES[branch]
        label = f"{branch}: median per step"
        ax.plot(median.index, median, color=color, linewidth=1.6, label=label)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.invert_xaxis()
    return finish(ax, "What the fit leaves over", SIGMA_LABEL, "measured - predicted change")


def over_sigma(
    pairs: pd.DataFrame,
    column: str = "x",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    title: str = "",
) -> Axes:
    """A logged quantity over sigma, noise to image: median over trajectories and the range from 10 to 90 %."""
    ax = axes_or_new(ax)
    for branch, rows in pairs.groupby("branch"):
        table = rows.groupby("sigma")[column].quantile([0.1, 0.5, 0.9]).unstack()
        style = {"markersize": 3, "linewidth": 1.5}
        _line_in_range(ax, branch, table.index, table[0.5], table[0.1], table[0.9], **style)
    ax.invert_xaxis()
    ax.set_ylim(bottom=0)
    return finish(ax, title, SIGMA_LABEL, label or column)


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
    _range(ax, x, table["computed_low"], table["computed_high"], BLUE)
    ax.plot(x, table["computed_steps"], color=BLUE, linewidth=2, label=label)
    if verified is not None and len(verified):
        points = verified["threshold"], verified["computed_steps"]
        ax.plot(*points, "s", color=VERMILION, label="real cached runs")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "Threshold and computed steps", "threshold", "computed steps")


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Held-out error over the number of prompts used for the fit.

    Args:
        table: Columns ``branch``, ``prompts``, ``rmse``, ``low``, ``high``.
    """
    ax = axes_or_new(ax)
    for branch, rows in table.groupby("branch"):
        columns = (rows[name] for name in ("prompts", "rmse", "low", "high"))
        _line_in_range(ax, branch, *columns, markersize=4)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "How many prompts are enough", "prompts fitted", "held-out RMSE of y")


def fit_plots(
    pairs: pd.DataFrame,
    fits: Fits,
    bands: Mapping[str, pd.DataFrame] | None = None,
    axes: Iterable[Axes | None] = (),
    *,
    signal: str = "modulated_input",
    target: str = "output",
) -> dict[str, Axes]:
    """By name: pairs and fit of each branch, residuals, signal and target over sigma; on ``axes`` in this order."""
    places, plots = chain(axes, repeat(None)), {}
    for branch, own in pairs.groupby("branch"):
        fit, band = _fit_of(fits, branch), (bands or {}).get(str(branch))
        plots[f"pairs-{branch}"] = pairs_with_fit(
            own, fit, band, next(places), signal=signal, target=target
        )
    plots["residuals"] = residuals(pairs, fits, next(places))
    for name, column, label in (
        ("signal", "x", SIGNAL_LABELS[signal]),
        ("target", "y", TARGET_LABELS[target]),
    ):
        title = f"{name.capitalize()} over the schedule"
        plots[name] = over_sigma(pairs, column, next(places), label=label, title=title)
    return plots


def fit_figure(
    pairs: pd.DataFrame,
    fits: Fits,
    bands: Mapping[str, pd.DataFrame] | None = None,
    *,
    title: str = "",
    **names: str,
) -> Figure:
    """``report/fit.png``: pairs and fit per branch above, residuals, signal and target over sigma below.

    ``names`` are signal and target, as of :func:`fit_plots`.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        above, below = parts
        branches = above.subplots(1, pairs["branch"].nunique(), squeeze=False)
        axes = [*branches[0], *below.subplots(1, 3)]
        figure.suptitle(title, fontsize=11)
    fit_plots(pairs, fits, bands, axes, **names)
    return figure


def _fit_of(fits: Fits, branch: Any) -> Polynomial:
    return fits[branch if branch in fits else "pooled"]


def _points(
    ax: Axes,
    x: pd.Series,
    y: pd.Series,
    branch: Any,
    crowded: bool,
    label: str | None = None,
) -> None:
    color, marker = BRANCH_STYLES[branch]
    size, alpha = (7, 0.35) if crowded else (14, 0.6)
    look: Any = {"color": color, "marker": marker, "linewidths": 0, "rasterized": crowded}
    ax.scatter(x, y, s=size, alpha=alpha, label=label, **look)


def _curve(
    ax: Axes, polynomial: Polynomial, domain: tuple[float, float], **style: Any
) -> None:
    """Its predictions over a domain, clamping and sign rule included."""
    x = np.linspace(*domain, 200)
    ax.plot(x, np.vectorize(polynomial.predict)(x), linewidth=2, **style)


def _line_in_range(
    ax: Axes, branch: Any, x: Any, middle: Any, low: Any, high: Any, **style: Any
) -> None:
    color, marker = BRANCH_STYLES[branch]
    _range(ax, x, low, high, color)
    ax.plot(x, middle, label=branch, color=color, marker=marker, **style)


def _range(ax: Axes, x: Any, low: pd.Series, high: pd.Series, color: str) -> None:
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
