"""The target of a gate that forecasts: not how much the model changes, but by how much the forecast is wrong.

Where skipped steps are extrapolated, a fast but even change costs nothing. The error of a step's forecast from the
steps before it follows from the Gram log of a run, for every branch on its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import NoPlan, branch_gram, levels_of, read_gram
from calibrate.runs.pairs import FORECAST_ERROR, Run
from coeffs import Entry
from runtime.decide.forecast import ORDERS, extrapolation

COLUMN = "y_forecast_error"


def forecast_errors(
    gram: NDArray[np.float64], levels: NDArray[np.float64], order: int
) -> NDArray[np.float64]:
    """Relative error of each step's forecast from the steps just before it.

    Args:
        gram: Inner products of one branch's outputs or residuals v, shape (T, T).
        levels: Noise levels, shape (T,).
        order: 1 extrapolates linearly from two steps, 2 quadratically from three; the first steps have fewer.

    Returns:
        ``|v_t - forecast_t| / |v_(t-1)|`` (L2), shape (T,); NaN at step 0, and where v_(t-1) is zero.
    """
    errors = np.full(len(gram), np.nan)
    for step in range(1, len(gram)):
        anchors = list(range(step - 1, max(step - 2 - order, -1), -1))
        row = np.zeros(len(gram))
        row[step] = 1.0
        row[anchors] -= extrapolation(levels[step], [levels[anchor] for anchor in anchors])
        before = gram[step - 1, step - 1]
        errors[step] = np.sqrt(max(row @ gram @ row, 0.0) / before) if before > 0 else np.nan
    return errors


def with_forecast_errors(run: Run, forecast: str, forecast_of: str = "output") -> Run:
    """The run with the target ``forecast_error`` beside the recorded ones.

    Args:
        forecast: ``linear`` or ``quadratic``.
        forecast_of: ``output`` or ``residual``.

    Raises:
        InvalidOption: Another forecast: reusing is judged by the change itself.
        NoPlan: The run holds no Gram matrices of that.
    """
    if forecast not in ORDERS or forecast == "reuse" or forecast_of not in ("output", "residual"):
        raise InvalidOption(
            f"forecast {forecast!r} of {forecast_of!r}: expected linear or quadratic of output or residual; a gate "
            "that reuses is fitted on the change, without a forecast"
        )
    if not run.folders:
        raise NoPlan(
            "a bare table has no Gram matrices; fit the folder of a run recorded with --gram"
        )
    found: dict[tuple, float] = {}
    for folder in map(RunFolder.open, run.folders):
        ids = {group.name: group.prompt for group in folder.groups}
        for path in sorted((folder.path / "gram").glob("*.npz")):
            if path.stem not in ids:
                continue
            prompt = ids[path.stem]
            for expert, arrays in read_gram(path).items():
                for branch, errors in _errors_of(arrays, forecast, forecast_of).items():
                    begin = int(arrays.get("first_step", 0))
                    for step, value in enumerate(errors, begin):
                        found[prompt.prompt_id, prompt.seed, expert, branch, step] = value
    if not found:
        raise NoPlan(
            f"{run.path}: no Gram matrices of the {forecast_of} in it; record it again with `calibrate record --gram`"
        )

    def added(table: pd.DataFrame) -> pd.DataFrame:
        keys = zip(
            table["prompt_id"],
            table["seed"],
            table["expert"],
            table["branch"],
            table["step"],
            strict=True,
        )
        return table.assign(**{COLUMN: [found.get(key, np.nan) for key in keys]})

    return replace(run, frame=added(run.frame), rows=added(run.rows))


def for_entry(run: Run, entry: Entry) -> Run:
    """The run with the target that the entry was fitted on."""
    if entry.target != FORECAST_ERROR or COLUMN in run.frame:
        return run
    return with_forecast_errors(run, entry.forecast, entry.forecast_of)


def _errors_of(
    arrays: Mapping[str, Any], forecast: str, forecast_of: str
) -> dict[str, NDArray[np.float64]]:
    if forecast_of not in arrays:
        return {}
    names = [str(name) for name in arrays["branches"]]
    grams = branch_gram(arrays[forecast_of], len(names))
    if "joint" in arrays:  # one call for both, and one pair
        names, grams = [str(arrays["joint"])], grams.sum(0, keepdims=True)
    levels = levels_of(arrays["sigmas"])
    return {
        name: forecast_errors(gram, levels, ORDERS[forecast])
        for name, gram in zip(names, grams, strict=True)
    }
