"""The look of all pictures: ink, colours, axes, and how a figure is written.

Colours are Okabe and Ito's (safe for colour-blind readers, and readable on white and on dark grey); markers and line
styles repeat what colour says. Text and rules use one ink, which :func:`as_svg` replaces by the page's own.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
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
# Colour and marker of a CFG branch.
BRANCH_STYLES: Mapping[Any, tuple[str, str]] = defaultdict(
    lambda: (PURPLE, "D"),
    cond=(BLUE, "o"),
    uncond=(VERMILION, "s"),
    pooled=(GREEN, "^"),
)
# Lines change when the colours start over.
SERIES_STYLES = [
    (color, line)
    for line in ("-", "--", ":")
    for color in (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)
]
# Policies of a kind share the colour; what is compared with all of them comes first. Others are grey.
POLICY_COLORS = {
    "plan": VERMILION,
    "fitted gate": BLUE,
    "fewer steps": PURPLE,
    "uniform skipping": GREEN,
}
POLICY_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# One fewer than markers, so that their pairs repeat after 42 policies of a kind and not after 7.
POLICY_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "calibrate",
}
NO_LAYOUT: dict[Any, Any] = {
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
DPI = 150  # of files
# Ticks are made when the figure is drawn, in whatever style is then in force: these are set on the axes.
TICKS: dict[str, Any] = {
    "color": GREY,
    "labelcolor": INK,
    "labelsize": 8.5,
    "length": 3,
    "grid_color": GREY,
    "grid_alpha": 0.18,
    "grid_linewidth": 0.7,
}


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (5.6, 3.6)) -> Axes:
    if ax is None:
        with mpl.rc_context(STYLE):
            ax = Figure(figsize=size, layout="constrained").subplots()
    return ax


def finish(ax: Axes, title: str | None, xlabel: str, ylabel: str) -> Axes:
    """Labels, and a legend where more than one thing has a name."""
    with mpl.rc_context(STYLE):
        ax.set(title=title or "", xlabel=xlabel, ylabel=ylabel)
        ax.tick_params(**TICKS)
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend()
    return ax


def bare(ax: Axes) -> Axes:
    """An axis of cells or images: no frame, no grid, no ticks."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    return ax


def policy_styles(policies: Sequence[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each policy: one colour per kind, one marker and line within it.

    They follow from the names alone where a policy is the first of its kind, so that figures agree with each other.
    """
    kinds = defaultdict(list)
    for policy in sorted(policies):
        colors = (color for kind, color in POLICY_COLORS.items() if policy.startswith(kind))
        kinds[next(colors, GREY)].append(policy)
    return {
        policy: (color, marker, line)
        for color, own in kinds.items()
        for policy, marker, line in zip(own, cycle(POLICY_MARKERS), cycle(POLICY_LINES))
    }


def save(drawing: Drawing, path: Path) -> Path:
    """Write a figure (the format follows the suffix) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(drawing, path)
    return path


def lay_out(drawing: Drawing) -> None:
    """Find the places of all parts, once for every format: that takes longer than drawing them."""
    figure: Any = drawing.figure
    before = figure.dpi
    with mpl.rc_context(STYLE | NO_LAYOUT):
        figure.dpi = DPI
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)
        figure.dpi = before


def as_svg(drawing: Drawing, title: str = "") -> str:
    """The figure as an ``<svg>`` element of any width, without background, whose ink is the page's text colour.

    ``title`` is what a screen reader says of it.
    """
    buffer = io.StringIO()
    _write(drawing, buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    # Too dim on a dark page, which brightens it.
    text = text.replace(BLUE.lower(), "var(--blue)")
    head, _, rest = text.partition(">")
    label = escape(title)
    return f'{head} role="img" aria-label="{label}"><title>{label}</title>{rest}'


def _write(drawing: Drawing, target: Path | io.StringIO, **options: Any) -> None:
    figure: Any = drawing.figure
    with mpl.rc_context(STYLE):
        figure.savefig(target, dpi=DPI, **options)
