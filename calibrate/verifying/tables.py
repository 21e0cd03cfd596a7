"""The summary of a verification as plain text."""

import numpy as np
import pandas as pd

from calibrate.text import aligned
from calibrate.trials.measures import MEASURES, measured


def verdict_table(summary: pd.DataFrame) -> str:
    """The summary as plain text: one row per policy and budget, intervals beside the main measure."""
    main = MEASURES[summary["measure"].iloc[0]]
    name, decimals = main.name, f"{{:.{main.digits}f}}"

    def shown(column: str, form: str = decimals) -> pd.Series:
        cells = summary[column].map(form.format, na_action="ignore")
        return cells.astype(object).fillna("-")  # a column without figures is one of floats

    columns = {
        "policy": summary["policy"],
        "threshold": shown("threshold", "{:.4g}"),
        "steps": shown("computed_steps", "{:.1f}") + shown("num_steps", " of {}"),
        "speed-up": shown("speedup", "{:.2f}"),
        f"{main.label} {main.unit}": shown(name)
        + np.where(summary["at_floor"], " (floor)", ""),
        "95 % interval": shown(f"{name}_low", "{:.1f} to ") + shown(f"{name}_high", "{:.1f}"),
        "of mean error": shown(f"{name}_of_mean"),
        "lowest 10 %": shown("low").replace("-inf", "broken"),
        "lose 3 dB": shown("lost", "{:.0%}"),
    }
    columns["95 % interval"] = columns["95 % interval"].replace("--", "-")  # too few prompts
    for other in measured(summary):
        if other is not main:
            columns[other.label] = shown(other.name, f"{{:.{other.digits}f}}")
    return aligned([*columns], [*zip(*columns.values(), strict=True)])
