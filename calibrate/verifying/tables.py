"""The summary of a verification as plain text."""

import numpy as np
import pandas as pd

from calibrate.text import aligned, number
from calibrate.trials.measures import MEASURES, measured


def verdict_table(summary: pd.DataFrame) -> str:
    """The summary as plain text: one row per policy and budget, intervals beside the main measure."""
    main = MEASURES[summary["measure"].iloc[0]]
    others = [measure for measure in measured(summary) if measure is not main]
    heads = ["policy", "threshold", "steps", "speed-up", f"{main.label} {main.unit}"]
    heads += ["95 % interval", "of mean error", "lowest 10 %", "lose 3 dB"]
    rows = []
    for row in summary.to_dict("records"):
        threshold, low, high = (
            row["threshold"],
            row[f"{main.name}_low"],
            row[f"{main.name}_high"],
        )
        cells = [
            row["policy"],
            "-" if pd.isna(threshold) else f"{threshold:.4g}",
            f"{row['computed_steps']:.1f} of {row['num_steps']}",
            number(row["speedup"]),
            number(row[main.name], main.digits) + (" (floor)" if row["at_floor"] else ""),
            f"{low:.1f} to {high:.1f}" if np.isfinite(low) else "-",
            number(row[f"{main.name}_of_mean"], main.digits),
            "broken" if row["low"] == -np.inf else number(row["low"], main.digits),
            "-" if np.isnan(row["lost"]) else f"{row['lost']:.0%}",
        ]
        rows.append([*cells, *(number(row[other.name], other.digits) for other in others)])
    return aligned([*heads, *(other.label for other in others)], rows)
