"""The printed tables of a fit: plain text, one row per line, numbers aligned."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from calibrate.fitting.choice import BranchFit
from calibrate.fitting.held_out import compare_candidates
from calibrate.fitting.intervals import computed_intervals
from calibrate.fitting.replay import Search, polynomials, replay, summarise, threshold_for_speedup
from calibrate.runs.pairs import TARGET_COLUMNS, Run
from coeffs import Entry


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first flush left, the others flush right."""
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def fit_table(entry: Entry, fits: Sequence[BranchFit]) -> str:
    """Both fits of each branch, the recommended one marked, with what needs no polynomial beside them."""
    prompts, rows = max(one.pairs["prompt_id"].nunique() for one in fits), []
    several = len(entry.experts) > 1
    for one in fits:
        for result in filter(None, (one.chosen, one.other)):
            known = one.figures[result.method]
            rows.append((
                f"{one.expert}/{one.branch}" if several else one.branch,
                result.method + (" *" if result is one.chosen else "  "),
                len(one.pairs), result.degree, number(known["r2"]), number(known["r2_held_out"]),
                number(known["rmse_held_out"], 4), number(known["spearman_held_out"]),
                ratio(known["rmse_held_out"], known["rmse_constant"]),
                ratio(known["rmse_held_out"], known["rmse_step_mean"]),
                within(known),
            ))  # fmt: skip
    header = (
        "branch", "fit  ", "pairs", "degree", "R²", "held-out R²", "RMSE", "rank", "/constant", "/step mean",
        "x within step",
    )  # fmt: skip
    return "\n".join((
        f"Fit of {entry.label}: {entry.signal} -> {entry.target}, {prompts} prompts (* recommended)",
        aligned(header, rows),
        "RMSE and rank correlation by leaving prompts out. /constant, /step mean: that RMSE over the one of the mean,",
        "and of each step's mean. x within step: rank correlation over prompts at the same step (0: x adds nothing).",
        "Prompts that are enough: " + ", ".join(f"{one.branch} {one.enough or 'more'}" for one in fits),
    ))  # fmt: skip


def candidate_table(run: Run, degree: int) -> str:
    """Held-out R² of every signal and target: what could be predicted, and from what."""
    rows = []
    for expert in run.experts:
        table = compare_candidates(run, degree, expert)
        for (branch, signal), group in table.groupby(["branch", "signal"], sort=False):
            known = group.set_index("target")["r2_held_out"]
            label = f"{expert}/{branch}" if len(run.experts) > 1 else branch
            rows.append((label, signal, *(number(known.get(target)) for target in TARGET_COLUMNS)))
    rows.sort(key=lambda row: row[:2])
    return (
        f"Held-out R² by signal and target\n{aligned(('branch', 'signal', *TARGET_COLUMNS), rows)}"
    )


def score_table(scores: pd.DataFrame) -> str:
    """Strangers on our pairs."""
    header = (
        "scored", "pairs", "R²", "R² rescaled", "RMSE", "bias", "rank", "below", "above", "negative", "target", "note"
    )  # fmt: skip
    rows = []
    for row in scores.to_dict("records"):
        label = f"{row['candidate']} {row['expert']}/{row['branch']}"
        rows.append((
            label, row["pairs"], number(row.get("r2")), number(row.get("r2_rescaled")), number(row.get("rmse"), 4),
            number(row.get("bias"), 4), number(row.get("spearman")), percent(row.get("below_domain")),
            percent(row.get("above_domain")), percent(row.get("negative")), row["target"], row["note"],
        ))  # fmt: skip
    note = "R² rescaled: with the best factor. below, above: pairs outside its domain. negative: predicted below 0."
    return f"Others on these pairs\n{aligned(header, rows)}\n{note}"


def replay_table(
    run: Run, entry: Entry, fits: Sequence[BranchFit], speedup: float | None = None
) -> str:
    """Threshold -> computed steps -> expected speed-up; with a marked row for the wanted speed-up where given."""
    of_branch = polynomials(entry, run)
    search = Search(run, of_branch, signal=entry.signal)
    wanted = None if speedup is None else threshold_for_speedup(search, speedup)
    thresholds = sorted(
        {0.0, *(row.threshold for row in entry.thresholds), *([] if wanted is None else [wanted])}
    )
    refits = {(one.expert, one.branch): one.resampled for one in fits}
    intervals = (
        computed_intervals(search, refits, thresholds[1:]) or {}
    )  # threshold 0 computes everything
    rows = [
        (
            f"{row.threshold:.4g}" + (" <" if row.threshold == wanted else ""),
            f"{row.computed_steps:.1f} of {row.num_steps:.0f}",
            " to ".join(f"{edge:.1f}" for edge in intervals.get(row.threshold, ())) or "-",
            f"{row.computed_low:.4g} to {row.computed_high:.4g}",
            f"{row.speedup:.2f}x",
        )
        for row in summarise(
            replay(run, of_branch, thresholds, signal=entry.signal), run.timing
        ).itertuples()
    ]
    share = [stack / call for call, stack in run.timing.values()]
    basis = (
        f"the stack is {100 * np.mean(share):.0f} % of a call"
        if share
        else "no timing: an upper bound"
    )
    return "\n".join((
        "Replay of the recorded trajectories with the gate",
        aligned(("threshold", "computed steps", "95 % interval", "single prompts", "expected speed-up"), rows),
        f"Speed-up of the denoiser alone ({basis}), as if skipping changed nothing: `calibrate verify` runs it.",
    ))  # fmt: skip


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{100 * value:.0f} %"


def ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"


def within(known: dict[str, float | None]) -> str:
    value, low, high = (known[f"spearman_within_step{end}"] for end in ("", "_low", "_high"))
    return number(value) if low is None else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
