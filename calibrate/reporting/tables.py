"""The printed tables of a fit: one row per branch, threshold or scored entry."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fitting.choice import BranchFit
from calibrate.fitting.draft import replayed
from calibrate.fitting.held_out import compare_candidates
from calibrate.fitting.replay import Search, polynomials, threshold_for_speedup
from calibrate.runs.pairs import TARGET_COLUMNS, Run
from calibrate.text import aligned, number, percent, ratio
from coeffs import Entry

SCORE_HEADER = (
    *("scored", "pairs", "R²", "R² rescaled", "RMSE", "bias", "rank", "below", "above"),
    *("negative", "target", "note"),
)
REPLAY_HEADER = (
    *(
        "threshold",
        "computed steps",
        "95 % interval",
        "single prompts",
        "expected speed-up",
    ),
)


def fit_table(entry: Entry, fits: Sequence[BranchFit]) -> str:
    """Both fits of each branch, the recommended one marked, with what needs no polynomial beside them."""
    rows: list[dict[str, Any]] = []
    for fit in fits:
        name = f"{fit.expert}/{fit.branch}" if len(entry.experts) > 1 else fit.branch
        for result in fit.results:
            known = fit.figures[result.method]
            error = known["rmse_held_out"]
            value, low, high = (
                known[f"spearman_within_step{end}"] for end in ("", "_low", "_high")
            )
            within = number(value)
            if low is not None:
                within = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append({
                "branch": name,
                "fit  ": result.method + (" *" if result is fit.chosen else "  "),
                "pairs": len(fit.pairs),
                "degree": result.degree,
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
        aligned(list(rows[0]), [list(row.values()) for row in rows]),
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
            rows.append(
                (label, signal, *(number(known.get(target)) for target in TARGET_COLUMNS))
            )
    body = aligned(("branch", "signal", *TARGET_COLUMNS), rows)
    return f"Held-out R² by signal and target\n{body}"


def score_table(scores: pd.DataFrame) -> str:
    """Others' coefficients on our pairs."""
    rows = []
    for row in scores.to_dict("records"):
        outside = (row.get(name) for name in ("below_domain", "above_domain", "negative"))
        rows.append((
            f"{row['candidate']} {row['expert']}/{row['branch']}",
            *(str(row["pairs"]), number(row.get("r2")), number(row.get("r2_rescaled"))),
            *(number(row.get("rmse"), 4), number(row.get("bias"), 4), number(row.get("spearman"))),
            *(percent(share) for share in outside),
            *(row["target"], row["note"]),
        ))  # fmt: skip
    note = "R² rescaled: with the best factor. below, above: pairs outside its domain. negative: predicted below 0."
    return f"Others on these pairs\n{aligned(SCORE_HEADER, rows)}\n{note}"


def replay_table(
    run: Run, entry: Entry, fits: Sequence[BranchFit], speedup: float | None = None
) -> str:
    """Threshold -> computed steps -> expected speed-up; with a marked row for the wanted speed-up where given."""
    thresholds = {0.0, *(row.threshold for row in entry.thresholds)}
    wanted = None
    if speedup is not None:
        search = Search(run, polynomials(entry, run), signal=entry.signal)
        wanted = threshold_for_speedup(search, speedup)
        thresholds.add(wanted)
    rows = []
    for row in replayed(run, entry, fits, sorted(thresholds)).itertuples():
        rows.append((
            f"{row.threshold:.4g}" + (" <" if row.threshold == wanted else ""),
            f"{row.computed_steps:.1f} of {row.num_steps:.0f}",
            f"{row.low:.1f} to {row.high:.1f}" if np.isfinite(row.low) else "-",
            f"{row.computed_low:.4g} to {row.computed_high:.4g}",
            f"{row.speedup:.2f}x",
        ))  # fmt: skip
    basis = "no timing: an upper bound"
    if run.timing:
        share = np.mean([stack / call for call, stack in run.timing.values()])
        basis = f"the stack is {100 * share:.0f} % of a call"
    return "\n".join((
        "Replay of the recorded trajectories with the gate",
        aligned(REPLAY_HEADER, rows),
        f"Speed-up of the denoiser alone ({basis}), as if skipping changed nothing: `calibrate verify` runs it.",
    ))  # fmt: skip
