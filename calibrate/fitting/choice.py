"""Which fit of each branch is recommended, and which branch an engine with a single slot gets, with the reasons."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.fitting.held_out import (
    Figures,
    figures,
    held_out,
    learning_curve,
    refit,
    rival_figures,
    rmse,
)
from calibrate.fitting.intervals import Bootstrap, bootstrap
from calibrate.fitting.least_squares import FitResult, fit_polynomial
from calibrate.runs.pairs import Run
from coeffs import Candidate, Counts, Fit
from coeffs.entry.polynomial import negative_ranges

METHODS = ("auto", "polyfit", "constrained")
BETTER = 0.01  # a held-out RMSE has to be this much lower to count as better
POOLING_LOSS = (
    0.10  # share of its held-out RMSE that a branch may lose to one polynomial for all
)
TINY = 1e-300  # instead of an error of 0, which nothing can be divided by


@dataclass(frozen=True)
class BranchFit:
    """The fit of one branch, or of all branches pooled.

    Attributes:
        pairs: The fitted pairs, columns x and y as the signal and target chosen.
        fit: What the entry says of it: the recommended fit, and as its alternative the other one where it differs.
        doubts: What is doubtful about its coefficients, in words.
        resampled: The recommended fit on resampled prompts; None with fewer than three prompts.
        enough: Prompts after which held-out error stops falling; None where more would help.
    """

    expert: str
    branch: str
    pairs: pd.DataFrame
    fit: Fit
    doubts: tuple[str, ...]
    resampled: Bootstrap | None
    enough: int | None

    @property
    def figures(self) -> Figures:
        """See :func:`calibrate.fitting.held_out.figures` and :func:`~calibrate.fitting.held_out.rival_figures`."""
        return self.fit.figures or {}


def fit_branches(
    run: Run,
    degree: int = 4,
    target: str = "output",
    signal: str = "modulated_input",
    method: str = "auto",
) -> list[BranchFit]:
    """Both fits of every expert and branch, and of the branches pooled where there are several."""
    if method not in METHODS:
        raise InvalidOption(f"method {method!r}: expected one of {', '.join(METHODS)}")
    fits = []
    for expert in run.experts:
        recorded = run.rows.loc[run.rows["expert"] == expert, "branch"].value_counts()
        branches = run.branches(expert)
        for branch in [*branches, "pooled"] if len(branches) > 1 else branches:
            pairs = run.pairs(signal, target, expert, branch)
            if pairs.empty:
                raise InvalidOption(
                    f"{expert}/{branch}: no finite pairs of {signal} and {target}, which this model or log lacks; "
                    "choose another --signal or --target"
                )
            excluded = int(recorded.get(branch, recorded.sum())) - len(pairs)
            fits.append(_fit_branch(expert, branch, pairs, degree, method, excluded))
    return fits


def recommended_branch(own: dict[str, BranchFit]) -> tuple[str, str | None]:
    """Which of an expert's fits an engine with one slot gets, and what that costs where it is worth a warning.

    Pooled, unless its held-out RMSE on the first (conditional) branch is more than a tenth above that branch's own.
    """
    main, *others = own
    if not others:
        return main, None
    pairs, losses = own["pooled"].pairs, {}
    unseen = held_out(pairs, refit(own["pooled"].fit))
    for branch in (main, *others[:-1]):
        error = own[branch].figures["rmse_held_out"]
        if unseen is None or error is None:
            return "pooled", None
        rows = pairs["branch"] == branch
        losses[branch] = rmse(pairs["y"][rows], unseen[rows]) / max(error, TINY) - 1
    if max(losses.values()) <= POOLING_LOSS:
        return "pooled", None
    recommended = main if losses[main] > POOLING_LOSS else "pooled"
    lost = ", ".join(f"{branch} {100 * loss:+.0f} %" for branch, loss in losses.items())
    return recommended, (
        f"one polynomial for all branches costs held-out RMSE ({lost}): use one per branch; "
        f"engines with one slot get {recommended}"
    )


def _fit_branch(
    expert: str, branch: str, pairs: pd.DataFrame, degree: int, method: str, excluded: int
) -> BranchFit:
    """Fits the pairs both ways and recommends one; ``excluded`` recorded rows were left out as non-finite."""
    plain, shaped = (
        fit_polynomial(pairs["x"], pairs["y"], degree, name)
        for name in ("polyfit", "constrained")
    )
    results, why = [plain, shaped], "chosen by hand"
    if plain.coefficients_high_to_low == shaped.coefficients_high_to_low:
        results = [shaped if method == "constrained" else plain]
        why = "non-negative and non-decreasing on its domain, so that all sign rules agree"
    rivals = rival_figures(pairs)
    known = {result.method: figures(pairs, result) | rivals for result in results}
    if method == "auto" and len(results) > 1:
        method, why = _choose(plain, known)
    chosen, *others = sorted(results, key=lambda result: result.method != method)

    def stated(result: FitResult) -> dict[str, Any]:
        return {
            "coefficients_high_to_low": result.coefficients_high_to_low,
            "method": result.method,
            "domain": result.domain,
            "figures": known[result.method],
        }

    resampled = bootstrap(pairs, chosen)
    fit = Fit(
        **stated(chosen),
        counts=Counts(
            prompts=pairs["prompt_id"].nunique(),
            trajectories=pairs.groupby(["prompt_id", "seed", "branch"]).ngroups,
            pairs=len(pairs),
            excluded_non_finite=excluded,
        ),
        intervals={"coefficients": resampled.coefficient_intervals()} if resampled else None,
        why=why,
        alternatives=tuple(Candidate(**stated(other)) for other in others),
    )
    _, enough = learning_curve(pairs, degree, chosen.method)
    return BranchFit(expert, branch, pairs, fit, chosen.warnings, resampled, enough)


def _choose(plain: FitResult, of_method: dict[str, Figures]) -> tuple[str, str]:
    """The recommended method and why, where the plain fit lacks the shape."""
    free, shaped = of_method["polyfit"], of_method["constrained"]
    kind, key = "held-out", "rmse_held_out"
    if free[key] is None:
        kind, key = "in-sample", "rmse"
    change = (shaped[key] or 0.0) / max(free[key] or 0.0, TINY) - 1
    compared = f"{kind} RMSE {100 * change:+.1f} %"
    if negative_ranges(plain, plain.domain):
        return "constrained", (
            "the free fit is negative on part of its domain, where engines disagree on what that means; "
            f"non-negative and non-decreasing instead: {compared}"
        )
    if change <= -BETTER:
        return "constrained", f"rises everywhere, and {compared} against the free fit"
    return "polyfit", (
        "non-negative on its domain, so that all sign rules agree; it falls in places, "
        f"but a fit that rises everywhere has {compared}"
    )
