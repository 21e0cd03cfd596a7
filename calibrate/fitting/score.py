"""Scoring others: any entry or list of coefficients on the pairs of our run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fitting.held_out import Figures, r2, rmse, spearman
from calibrate.runs.pairs import SIGNAL_COLUMNS, TARGET_COLUMNS, Run
from coeffs import Entry, Polynomial


def score_polynomial(polynomial: Polynomial, pairs: pd.DataFrame) -> Figures:
    """Figures of any polynomial on pairs (columns x and y), with its own domain and sign rule.

    ``r2`` is bare and may be hugely negative; ``r2_rescaled`` allows the best positive factor, since a factor only
    moves the threshold; ``bias`` is the mean of prediction minus measurement.
    """
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    predicted = np.vectorize(polynomial.predict, otypes=[float])(x)
    size = float(predicted @ predicted)
    factor = max(float(predicted @ y) / size, 0.0) if size else 0.0
    known: Figures = {
        "pairs": len(y),
        "r2": r2(y, predicted),
        "r2_rescaled": r2(y, factor * predicted),
        "rmse": rmse(y, predicted),
        "bias": float(np.mean(predicted - y)),
        "spearman": spearman(predicted, y),
        "negative": float(np.mean(np.polyval(polynomial.coefficients_high_to_low, x) < 0)),
    }
    if polynomial.domain:
        low, high = polynomial.domain
        known |= {
            "below_domain": float(np.mean(x < low)),
            "above_domain": float(np.mean(x > high)),
        }
    return known


def score(candidates: Sequence[Entry | Sequence[float]], run: Run) -> pd.DataFrame:
    """Score candidates on every branch of a run: one row per candidate, expert and branch.

    An entry is scored on the signal and target it was fitted for, with the fit it would use for that branch; a bare
    list (highest power first) on modulated input and output. ``note`` names what does not match the run.
    """
    return pd.DataFrame([
        _score_branch(candidate, run, expert, branch)
        for candidate in candidates
        for expert in run.experts
        for branch in run.branches(expert)
    ])  # fmt: skip


def _score_branch(
    candidate: Entry | Sequence[float], run: Run, expert: str, branch: str
) -> dict[str, Any]:
    label, signal, target = "coefficients", "modulated_input", "output"
    mismatches: dict[str, bool] = {}
    if isinstance(candidate, Entry):
        label, made_for = candidate.label, candidate.transformer_class
        own = expert if expert in candidate.experts else next(iter(candidate.experts))
        polynomial = candidate.fit(own, branch).polynomial(candidate.sign_rule)
        signal = candidate.signal if candidate.signal in SIGNAL_COLUMNS else signal
        target = candidate.target if candidate.target in TARGET_COLUMNS else target
        classes = (run.manifest.get("transformer_classes") or {made_for: made_for}).values()
        mismatches = {
            f"scored with its expert {own}": own != expert,
            "fitted on another signal": candidate.signal != signal,
            f"target {candidate.target}, scored on {target}": candidate.target != target,
            f"made for {made_for}": made_for is not None and made_for not in classes,
        }
    else:
        polynomial = Polynomial(tuple(candidate), None, "signed")
    pairs = run.pairs(signal, target, expert, branch)
    mismatches[f"the log has no {signal}"] = pairs.empty
    row = {
        "expert": expert,
        "branch": branch,
        "candidate": label,
        "signal": signal,
        "target": target,
        "note": "; ".join(text for text, holds in mismatches.items() if holds),
    }
    return row | ({"pairs": 0} if pairs.empty else score_polynomial(polynomial, pairs))
