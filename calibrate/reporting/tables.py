"""The printed tables of a fit: one row per branch, threshold or scored entry."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from calibrate.fitting.choice import BranchFit
from calibrate.fitting.draft import replayed
from calibrate.fitting.held_out import compare_candidates
from calibrate.fitting.replay import Search, threshold_for_speedup
from calibrate.runs.pairs import TARGET_COLUMNS, Run
from calibrate.text import aligned, number, percent, ratio
from coeffs import Entry

# Heading of a column, the figure in it, and its digits.
SCORES = {
    "R²": ("r2", 2),
    "R² rescaled": ("r2_rescaled", 2),
    "RMSE": ("rmse", 4),
    "bias": ("bias", 4),
    "rank": ("spearman", 2),
}
SHARES = {"below": "below_domain", "above": "above_domain", "negative": "negative"}


def fit_table(entry: Entry, fits: Sequence[BranchFit]) -> str:
    """Both fits of each branch, the recommended one marked, with what needs no polynomial beside them."""
    rows = []
    for branch in fits:
        name = f"{branch.expert}/{branch.branch}" if len(entry.experts) > 1 else branch.branch
        for fit in (branch.fit, *branch.fit.alternatives):
            known = fit.figures or {}
            error = known["rmse_held_out"]
            value, low, high = (
                known[f"spearman_within_step{end}"] for end in ("", "_low", "_high")
            )
            within = number(value)
            if low is not None:
                within = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append({
                "branch": name,
                "fit  ": fit.method + (" *" if fit is branch.fit else "  "),
                "pairs": str(len(branch.pairs)),
                "degree": str(fit.degree),
                "R²": number(known["r2"]),
                "held-out R²": number(known["r2_held_out"]),
                "RMSE": number(error, 4),
                "rank": number(known["spearman_held_out"]),
                "/constant": ratio(error, known["rmse_constant"]),
                "/step mean": ratio(error, known["rmse_step_mean"]),
                "x within step": within,
            })  # fmt: skip
    prompts = max(fit.pairs["prompt_id"].nunique() for fit in fits)
    enough = (f"{fit.branch} {fit.enough or f'more than {prompts}'}" for fit in fits)
    return "\n".join((
        f"Fit of {entry.label}: {entry.signal} -> {entry.target}, {prompts} prompts (* recommended)",
        _table(rows),
        "RMSE and rank correlation by leaving prompts out. /constant, /step mean: that RMSE over the one of the mean,",
        "and of each step's mean. x within step: rank correlation over prompts at the same step (0: x adds nothing).",
        f"Prompts needed: {', '.join(enough)}",
    ))  # fmt: skip


def candidate_table(run: Run, degree: int) -> str:
    """Held-out R² of every signal and target: what could be predicted, and from what."""
    rows = []
    for expert in run.experts:
        table = compare_candidates(run, degree, expert)
        table = table.pivot(
            index=["branch", "signal"], columns="target", values="r2_held_out"
        )
        for (branch, signal), known in table.iterrows():
            label = f"{expert}/{branch}" if len(run.experts) > 1 else branch
            figures = {target: number(known.get(target)) for target in TARGET_COLUMNS}
            rows.append({"branch": label, "signal": signal} | figures)
    return f"Held-out R² by signal and target\n{_table(rows)}"


def score_table(scores: pd.DataFrame) -> str:
    """Others' coefficients on our pairs."""
    rows = [
        {
            "scored": f"{row['candidate']} {row['expert']}/{row['branch']}",
            "pairs": str(row["pairs"]),
            **{
                head: number(row.get(name), digits) for head, (name, digits) in SCORES.items()
            },
            **{head: percent(row.get(share)) for head, share in SHARES.items()},
            "target": row["target"],
            "note": row["note"],
        }
        for row in scores.to_dict("records")
    ]
    note = "R² rescaled: with the best factor. below, above: pairs outside its domain. negative: predicted below 0."
    return f"Others on these pairs\n{_table(rows)}\n{note}"


def replay_table(
    run: Run, entry: Entry, fits: Sequence[BranchFit], speedup: float | None = None
) -> str:
    """Threshold -> computed steps -> expected speed-up; with a marked row for the wanted speed-up where given."""
    search = Search(run, entry)
    thresholds = {0.0, *(row.threshold for row in entry.thresholds)}
    wanted = None
    if speedup is not None:
        wanted = threshold_for_speedup(search, speedup)
        thresholds.add(wanted)
    rows = [
        {
            "threshold": f"{row.threshold:.4g}" + (" <" if row.threshold == wanted else ""),
            "computed steps": f"{row.computed_steps:.1f} of {row.num_steps:.0f}",
            "95 % interval": row.interval or "-",
            "single prompts": row.prompts,
            "expected speed-up": f"{row.speedup:.2f}x",
        }
        for row in replayed(search, fits, sorted(thresholds)).itertuples()
    ]
    basis = "no timing: an upper bound"
    if run.timing:
        share = np.mean([stack / call for call, stack in run.timing.values()])
        basis = f"the stack is {100 * share:.0f} % of a call"
    return "\n".join((
        "Replay of the recorded trajectories with the gate",
        _table(rows),
        f"Speed-up of the denoiser alone ({basis}), as if skipping changed nothing: `calibrate verify` runs it.",
    ))  # fmt: skip


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return aligned(list(rows[0]), [list(row.values()) for row in rows])
