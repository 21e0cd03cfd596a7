"""Draws ``docs/images/architecture.svg``: folders as boxes on their floors, imports as arrows.

    python docs/build_architecture.py

Floors and imports are the ones that ``tests/test_house.py`` checks, so that the picture cannot disagree with the code.
"""

import io
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# Boxes of the picture from the top down; what each is for, in a few words.
ROWS = (
    (("calibrate.commands", "the command line"),),
    (("calibrate.reporting", "pictures and pages"),),
    (
        ("calibrate.certifying", "promises of quality"),
        ("calibrate.verifying", "policies against each other"),
    ),
    (("calibrate.planning", "schedules and forecasts"),),
    (("calibrate.trials", "real runs, measured"),),
    (
        ("calibrate.fitting", "polynomials and their worth"),
        ("calibrate.recording", "the measuring pass"),
    ),
    (("calibrate.runs", "what is on disk"),),
    (("calibrate.model", "loaded how, called how"),),
    (("runtime", "apply, settings, cache"),),
    (("runtime.watch", "hooks and what they learn"),),
    (("runtime.decide", "gate, schedule, forecast"), ("runtime.compat", "private names")),
    (("coeffs.engines", "one writer an engine"),),
    (("coeffs", "registry"),),
    (("coeffs.entry", "what an entry is"),),
)
COLOURS = {"calibrate": "#dbe9f6", "runtime": "#e2f0d9", "coeffs": "#fdebd0"}
WIDTH, HEIGHT = 2.6, 0.62


def folder(module: str) -> str:
    """The box that a module belongs to: the longest name that fits; none for what all share, such as errors."""
    if module.endswith((".errors", ".text", ".stats")):
        return ""
    names = [name for row in ROWS for name, _ in row]
    fitting = [name for name in names if module == name or module.startswith(f"{name}.")]
    return max(fitting, key=len, default="")


def arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Which box imports which; an arrow that a longer way already implies is left out."""
    below: dict[str, set[str]] = {}
    for module, targets in graph.items():
        boxes = {folder(target) for target in targets} - {folder(module), ""}
        below.setdefault(folder(module), set()).update(boxes)
    below.pop("", None)

    def reached(box: str) -> set[str]:
        return below.get(box, set()).union(*(reached(lower) for lower in below.get(box, ())))

    implied = {
        (box, target)
        for box, lower in below.items()
        for middle in lower
        for target in reached(middle)
    }
    return {(box, target) for box, lower in below.items() for target in lower} - implied


def positions() -> dict[str, tuple[float, float]]:
    """Centre of every box."""
    places = {}
    for height, row in enumerate(reversed(ROWS)):
        for column, (name, _) in enumerate(row):
            x = (column - (len(row) - 1) / 2) * (WIDTH + 0.5)
            places[name] = (x, height * 1.05)
    return places


def draw(graph: dict[str, set[str]]) -> bytes:
    """The picture as SVG; the same imports give the same bytes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    matplotlib.rcParams["svg.hashsalt"] = "teacal"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(7, 11))
    axes = figure.add_axes((0, 0, 1, 1))
    places = positions()
    for source, target in sorted(arrows(graph)):
        arrow = FancyArrowPatch(
            places[source],
            places[target],
            connectionstyle="arc3,rad=0.15",
            arrowstyle="-|>",
            mutation_scale=12,
            shrinkA=18,
            shrinkB=18,
            linewidth=1.2,
            color="#7b8794",
            zorder=1,
        )
        axes.add_patch(arrow)
    for name, purpose in (box for row in ROWS for box in row):
        x, y = places[name]
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=COLOURS[name.partition(".")[0]],
            edgecolor="#52606d",
            zorder=2,
        )
        axes.add_patch(box)
        axes.text(
            x,
            y + 0.12,
            name.replace(".", "/"),
            ha="center",
            va="center",
            weight="bold",
            zorder=3,
        )
        axes.text(x, y - 0.14, purpose, ha="center", va="center", size=9, zorder=3)
    axes.set_xlim(-3.4, 3.4)
    axes.set_ylim(-0.6, len(ROWS) * 1.05 - 0.4)
    axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def main() -> None:
    from test_house import GRAPH

    PICTURE.write_bytes(draw(GRAPH))
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main()
