"""The look of all pictures: ink, colours, axes, and how a figure is written.

Colours are Okabe and Ito's (safe for colour-blind readers, and readable on white and on dark grey); markers and line
styles repeat what colour says. Text and rules use one ink, which :func:`as_svg` replaces by the page's own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#24292f"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8a8f98",
)  # fmt: skip
BRANCH_STYLES = {"cond": (BLUE, "o"), "uncond": (VERMILION, "s"), "pooled": (GREEN, "^")}
SERIES_STYLES = (
    (BLUE, "o"),
    (VERMILION, "s"),
    (GREEN, "^"),
    (ORANGE, "D"),
    (PURPLE, "v"),
    (SKY, "P"),
    (GREY, "X"),
)
SERIES_LINES = ("-", "--", ":")
# Policies of a kind share the colour; what is compared with all of them comes first. Others are grey.
POLICY_COLORS = (
    ("plan", VERMILION),
    ("fitted gate", BLUE),
    ("fewer steps", PURPLE),
    ("uniform skipping", GREEN),
)
POLICY_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POLICY_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (7, 3)))
STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "calibrate",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (5.6, 3.6)) -> Axes:
    if ax is None:
        with mpl.rc_context(STYLE):
            ax = Figure(figsize=size, layout="constrained").subplots()
    return ax


def finish(ax: Axes, title: str, xlabel: str, ylabel: str, *, legend: bool = True) -> Axes:
    with mpl.rc_context(STYLE):
        ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        ax.set_xlabel(xlabel, fontsize=9.5, color=INK)
        ax.set_ylabel(ylabel, fontsize=9.5, color=INK)
        ax.tick_params(labelsize=8.5, color=GREY, labelcolor=INK, length=3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.grid(True, color=GREY, alpha=0.18, linewidth=0.7)
        ax.set_axisbelow(True)
        if legend and len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend(labelcolor=INK)
    return ax


def branch_style(branch: str) -> tuple[str, str]:
    """Colour and marker of a CFG branch."""
    return BRANCH_STYLES.get(branch, (PURPLE, "D"))


def series_style(index: int) -> tuple[str, str, str]:
    """Colour, marker and line of the series at this place of a list; lines change when the colours start over."""
    return *SERIES_STYLES[index % len(SERIES_STYLES)], SERIES_LINES[
        index // len(SERIES_STYLES) % len(SERIES_LINES)
    ]


def policy_styles(policies: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each policy: one colour per kind, one marker and line within it.

    They follow from the names alone where a policy is the first of its kind, so that figures agree with each other.
    """
    kinds: dict[str, list[str]] = {}
    for policy in sorted(policies):
        kinds.setdefault(
            next((c for name, c in POLICY_COLORS if policy.startswith(name)), GREY), []
        ).append(policy)
    return {
        policy: (
            color,
            POLICY_MARKERS[i % len(POLICY_MARKERS)],
            POLICY_LINES[i % len(POLICY_LINES)],
        )
        for color, members in kinds.items()
        for i, policy in enumerate(members)
    }


def save(figure_or_axes: Figure | Axes, path: Path) -> Path:
    """Write a figure (the format follows the suffix) and return its path."""
    figure = figure_or_axes.figure if isinstance(figure_or_axes, Axes) else figure_or_axes
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def as_svg(figure_or_axes: Figure | Axes) -> str:
    """The figure as an ``<svg>`` element without background whose ink is the page's text colour."""
    figure = figure_or_axes.figure if isinstance(figure_or_axes, Axes) else figure_or_axes
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
