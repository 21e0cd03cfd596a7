"""Scoring a stranger: any entry or list of coefficients on the pairs of our run."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from calibrate.fitting.forecast_error import for_entry
from calibrate.fitting.held_out import r2, rmse, spearman
from calibrate.runs.pairs import Run
from coeffs import Entry, Polynomial

UNKNOWN_TARGET = "output"


def score_polynomial(polynomial: Polynomial, pairs: pd.DataFrame) -> dict[str, float | int | None]:
    """Figures of any polynomial on pairs (columns x and y), with its own domain and sign rule.

    ``r2`` is bare and may be hugely negative; ``r2_rescaled`` allows the best positive factor, since a factor only
    moves the threshold; ``bias`` is the mean of prediction minus measurement.
    """
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    predicted = np.array([polynomial.predict(value) for value in x])
    size = float(predicted @ predicted)
    factor = max(float(predicted @ y) / size, 0.0) if size > 0 else 0.0
    low, high = polynomial.domain or (None, None)
    return {
        "pairs": len(y),
        "r2": r2(y, predicted),
        "r2_rescaled": r2(y, factor * predicted),
        "rmse": rmse(y, predicted),
        "bias": float(np.mean(predicted - y)),
        "spearman": spearman(predicted, y),
        "below_domain": None if low is None else float(np.mean(x < low)),
        "above_domain": None if high is None else float(np.mean(x > high)),
        "negative": float(np.mean([polynomial.raw(value) < 0 for value in x])),
    }


def score(
    candidates: Sequence[Entry | Polynomial | Sequence[float]], run: Run, expert: str | None = None
) -> pd.DataFrame:
    """Score candidates on every branch of a run: one row per candidate, expert and branch.

    An entry is scored on the signal and target it was fitted for, with the fit it would use for that branch; a bare
    list (highest power first) on modulated input and output. ``note`` names what does not match the run.
    """
    rows = []
    for candidate in candidates:
        for name in [expert] if expert else run.experts:
            for branch in run.branches(name):
                rows.append(_score_one(candidate, run, name, branch))
    return pd.DataFrame(rows)


def _score_one(
    candidate: Entry | Polynomial | Sequence[float], run: Run, expert: str, branch: str
) -> dict:
    signal, target, notes, label = "modulated_input", UNKNOWN_TARGET, [], "coefficients"
    if isinstance(candidate, Entry):
        label = candidate.label
        known = expert if expert in candidate.experts else next(iter(candidate.experts))
        polynomial = candidate.fit(known, branch).polynomial(candidate.sign_rule)
        if known != expert:
            notes.append(f"scored with its expert {known}")
        signal = "time_embedding" if candidate.signal == "time_embedding" else "modulated_input"
        if candidate.signal == "other":
            notes.append("fitted on another signal")
        target = UNKNOWN_TARGET if candidate.target == "unknown" else candidate.target
        if candidate.target == "unknown":
            notes.append(f"target unknown, scored on {target}")
        classes = run.manifest.get("transformer_classes") or {}
        if (
            candidate.transformer_class
            and classes
            and candidate.transformer_class not in classes.values()
        ):
            notes.append(f"made for {candidate.transformer_class}")
        run = for_entry(run, candidate)
    elif isinstance(candidate, Polynomial):
        polynomial = candidate
    else:
        polynomial = Polynomial(tuple(candidate), None, "signed")
    row = {
        "candidate": label,
        "expert": expert,
        "branch": branch,
        "signal": signal,
        "target": target,
    }
    pairs = run.pairs(signal, target, expert, branch)
    if pairs.empty:
        return row | {"pairs": 0, "note": "; ".join([*notes, f"the log has no {signal}"])}
    return row | score_polynomial(polynomial, pairs) | {"note": "; ".join(notes)}
