"""The summary of a verification as plain text."""

import numpy as np
import pandas as pd

from calibrate.text import aligned
from calibrate.trials.measures import MEASURES, measured


def verdict_table(summary: pd.DataFrame) -> str:
    """The summary as plain text: one row per policy and budget, intervals beside the main measure."""
    main = MEASURES[summary["measure"].iloc[0]]
    others = [measure for measure in measured(summary) if measure is not main]
    heads = ["policy", "threshold", "steps", "speed-up", f"{main.label} {main.unit}".strip()]
    heads += ["95 % interval", "of mean error", "lowest 10 %", "lose 3 dB"]
    rows = []
    for row in summary.to_dict("records"):
        form = f".{main.digits}f"
        low, high = row[f"{main.name}_low"], row[f"{main.name}_high"]
        cells = [
            row["policy"],
            _text(row["threshold"], ".4g"),
            f"{row['computed_steps']:.1f} of {row['num_steps']}",
            f"{row['speedup']:.2f}",
            _text(row[main.name], form) + (" (floor)" if row["at_floor"] else ""),
            f"{low:{form}} to {high:{form}}" if np.isfinite(low) else "-",
            _text(row[f"{main.name}_of_mean"], form),
            "broken" if row["low"] == -np.inf else _text(row["low"], form),
            "-" if np.isnan(row["lost"]) else f"{row['lost']:.0%}",
        ]
        rows.append([*cells, *(_text(row[m.name], f".{m.digits}f") for m in others)])
    return aligned([*heads, *(measure.label for measure in others)], rows)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else format(value, form)
