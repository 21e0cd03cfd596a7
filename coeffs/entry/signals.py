"""The signals that are recorded, fitted and watched: the one table of them.

A further signal is a row here and a measurement in ``runtime/watch/call.py``; columns of runs, options and labels
follow.
"""

from dataclasses import dataclass
from typing import Annotated

from coeffs.entry.fields import Pattern


@dataclass(frozen=True)
class Signal:
    """One signal.

    Attributes:
        name: As entries, ``fit --signal`` and ``apply_tea_cache`` call it.
        column: Column of a run's pairs with its relative L1 change.
        label: What it is, for axes of plots.
    """

    name: str
    column: str
    label: str


MODULATED_INPUT = Signal("modulated_input", "x", "modulated input")
TIME_EMBEDDING = Signal("time_embedding", "x_time_embedding", "time embedding")
SIGNALS = {signal.name: signal for signal in (MODULATED_INPUT, TIME_EMBEDDING)}

# What an entry may say: one of them, another that only its engine watches, or none where it holds
# magnitude ratios only.
_NAMES = (*SIGNALS, "other", "none")
SignalName = Annotated[str, Pattern("|".join(_NAMES), f"one of {', '.join(_NAMES)}")]
