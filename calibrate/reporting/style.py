"""The look of all pictures: ink, colours, axes, and how a figure is written.

Colours are Okabe and Ito's (safe for colour-blind readers, and readable on white and on dark grey); markers and line
styles repeat what colour says. Text and rules use one ink, which :func:`as_svg` replaces by the page's own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Drawing = Figure | Axes

INK = "#24292f"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8a8f98"),
)
BRANCH_STYLES = {"cond": (BLUE, "o"), "uncond": (VERMILION, "s"), "pooled": (GREEN, "^")}
SERIES_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)
SERIES_LINES = ("-", "--", ":")
# Policies of a kind share the colour; what is compared with all of them comes first. Others are grey.
POLICY_COLORS = {
    "plan": VERMILION,
    "fitted gate": BLUE,
    "fewer steps": PURPLE,
    "uniform skipping": GREEN,
}
POLICY_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
POLICY_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (7, 3)))
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE: dict[Any, Any] = {
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
    **dict.fromkeys(INKED, INK),
}


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (5.6, 3.6)) -> Axes:
    if ax is None:
        with mpl.rc_context(STYLE):
            ax = Figure(figsize=size, layout="constrained").subplots()
    return ax


def finish(ax: Axes, title: str | None, xlabel: str, ylabel: str, *, legend: bool = True) -> Axes:
    with mpl.rc_context(STYLE):
        ax.set_title(title or "", loc="left", fontsize=10.5, fontweight="bold", color=INK)
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


def series_style(index: int) -> tuple[str, str]:
    """Colour and line of the series at this place of a list; lines change when the colours start over."""
    again, place = divmod(index, len(SERIES_COLORS))
    return SERIES_COLORS[place], SERIES_LINES[again % len(SERIES_LINES)]


def policy_color(policy: str) -> str:
    """The colour of a policy's kind."""
    return next((c for kind, c in POLICY_COLORS.items() if policy.startswith(kind)), GREY)


def policy_styles(policies: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each policy: one colour per kind, one marker and line within it.

    They follow from the names alone where a policy is the first of its kind, so that figures agree with each other.
    """
    styles, seen = {}, dict.fromkeys((*POLICY_COLORS.values(), GREY), 0)
    for policy in sorted(policies):
        color = policy_color(policy)
        place = seen[color]
        marker = POLICY_MARKERS[place % len(POLICY_MARKERS)]
        styles[policy] = color, marker, POLICY_LINES[place % len(POLICY_LINES)]
        seen[color] += 1
    return styles


def figure_of(drawing: Drawing) -> Figure:
    figure = drawing.figure if isinstance(drawing, Axes) else drawing
    assert isinstance(figure, Figure)
    return figure


def save(drawing: Drawing, path: Path) -> Path:
    """Write a figure (the format follows the suffix) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure_of(drawing).savefig(path, dpi=150, facecolor="white")
    return path


def as_svg(drawing: Drawing, title: str = "") -> str:
    """The figure as an ``<svg>`` element of any width, without background, whose ink is the page's text colour.

    ``title`` is what a screen reader says of it.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure_of(drawing).savefig(
            buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = text.replace(BLUE.lower(), "var(--blue)")  # too dim on a dark page, which brightens it
    if title:
        head, _, rest = text.partition(">")
        label = escape(title)
        text = f'{head} role="img" aria-label="{label}"><title>{label}</title>{rest}'
    return text
