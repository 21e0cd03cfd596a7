"""Plain text for people: tables whose columns line up, numbers, and what a mistyped name may have meant."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from coeffs.errors import did_you_mean as did_you_mean

WIDTH = 100  # where the output is no terminal


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first flush left, the others flush right.

    Columns that do not fit in the terminal's width (``WIDTH`` without one) go into a further block of lines.
    """
    labels, *others = zip(*(map(str, row) for row in (header, *rows)), strict=True)
    first = [cell.ljust(max(map(len, labels))) for cell in labels]
    limit = terminal_width()
    blocks = [first]
    for column in others:
        padded = [cell.rjust(max(map(len, column))) for cell in column]
        if blocks[-1] != first and len(blocks[-1][0]) + 2 + len(padded[0]) > limit:
            blocks.append(first)
        blocks[-1] = [
            f"{line}  {cell}" for line, cell in zip(blocks[-1], padded, strict=True)
        ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def terminal_width(least: int = WIDTH) -> int:
    """Columns of the terminal, or of the variable COLUMNS; ``WIDTH`` where the output goes elsewhere."""
    return max(least, shutil.get_terminal_size((WIDTH, 24)).columns)


def block(title: str, facts: Mapping[str, str]) -> str:
    """A title and the facts below it, one a line; what is empty is left out."""
    shown = {name: text for name, text in facts.items() if text}
    indent = max(map(len, shown), default=0)
    return "\n".join(
        [title, *(f"  {name.ljust(indent)}  {text}" for name, text in shown.items())]
    )


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 1:
        return "1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def volume(size: float) -> str:
    """``45 MiB`` or ``3.5 GiB``."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f} %"


def ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"


def siblings(path: Path) -> list[str]:
    """Everything that lies where ``path`` was looked for, as it would be typed."""
    try:
        return [str(other) for other in path.parent.iterdir()]
    except OSError:
        return []
