"""Scoring others: any entry or list of coefficients on the pairs of our run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fitting.held_out import Figures, r2, rmse, spearman
from calibrate.runs.pairs import SIGNAL_COLUMNS, TARGET_COLUMNS, Run
from coeffs import Entry, Polynomial

Candidate = Entry | Polynomial | Sequence[float]


def score_polynomial(polynomial: Polynomial, pairs: pd.DataFrame) -> Figures:
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


def score(candidates: Sequence[Candidate], run: Run, expert: str | None = None) -> pd.DataFrame:
    """Score candidates on every branch of a run: one row per candidate, expert and branch.

    An entry is scored on the signal and target it was fitted for, with the fit it would use for that branch; a bare
    list (highest power first) on modulated input and output. ``note`` names what does not match the run.
    """
    rows = []
    for candidate in candidates:
        for name in [expert] if expert else run.experts:
            rows += [_score_branch(candidate, run, name, branch) for branch in run.branches(name)]
    return pd.DataFrame(rows)


def _score_branch(candidate: Candidate, run: Run, expert: str, branch: str) -> dict[str, Any]:
    signal, target, label = "modulated_input", "output", "coefficients"
    notes: list[str] = []
    if isinstance(candidate, Entry):
        label = candidate.label
        known = expert if expert in candidate.experts else next(iter(candidate.experts))
        polynomial = candidate.fit(known, branch).polynomial(candidate.sign_rule)
        signal = candidate.signal if candidate.signal in SIGNAL_COLUMNS else signal
        target = candidate.target if candidate.target in TARGET_COLUMNS else target
        notes = _mismatches(candidate, known, run, expert, target)
    elif isinstance(candidate, Polynomial):
        polynomial = candidate
    else:
        polynomial = Polynomial(tuple(candidate), None, "signed")
    pairs = run.pairs(signal, target, expert, branch)
    figures: Figures = {"pairs": 0}
    if pairs.empty:
        notes.append(f"the log has no {signal}")
    else:
        figures = score_polynomial(polynomial, pairs)
    row = {"candidate": label, "expert": expert, "branch": branch, "signal": signal}
    return row | {"target": target} | figures | {"note": "; ".join(notes)}


def _mismatches(entry: Entry, known: str, run: Run, expert: str, target: str) -> list[str]:
    """What of an entry does not match the run it is scored on, in words."""
    notes = []
    if known != expert:
        notes.append(f"scored with its expert {known}")
    if entry.signal not in SIGNAL_COLUMNS:
        notes.append("fitted on another signal")
    if entry.target != target:
        notes.append(f"target {entry.target}, scored on {target}")
    classes = (run.manifest.get("transformer_classes") or {}).values()
    if entry.transformer_class and classes and entry.transformer_class not in classes:
        notes.append(f"made for {entry.transformer_class}")
    return notes
