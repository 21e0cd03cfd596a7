"""The draft entry: everything that a log says about a model, with the doubts in words.

Deterministic: the same pairs and manifest give the same bytes, but for ``source.created`` and ``source.command``.
"""

import dataclasses
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.fitting.choice import BETTER, BranchFit, fit_branches, recommended_branch
from calibrate.fitting.held_out import Figures
from calibrate.fitting.intervals import computed_intervals
from calibrate.fitting.least_squares import FitResult, has_shape
from calibrate.fitting.replay import Search, polynomials, replay, summarise, threshold_grid
from calibrate.runs.pairs import Run, load_run

EMBEDDED_MODEL = "tiny-longcat-image"
POOR_R2 = 0.5  # the polynomial explains less than half of the variance
FEW_PROMPTS = 8  # as in the verdicts: intervals of fewer prompts are rough


def fit(run: Any, **options: Any) -> coeffs.Entry:
    """Fit a recorded run and draft its registry entry, as ``calibrate fit`` does.

    Args:
        run: A run folder, several of one protocol, a table of pairs, or a loaded :class:`~calibrate.runs.pairs.Run`.
        options: ``degree``, ``target``, ``signal``, ``method`` of :func:`draft_entry`.
    """
    return draft_entry(run if isinstance(run, Run) else load_run(run), **options)


def draft_entry(
    run: Run,
    *,
    degree: int = 4,
    target: str = "output",
    signal: str = "modulated_input",
    method: str = "auto",
    command: str | None = None,
) -> coeffs.Entry:
    """Fit a run and say how good it is, as a registry entry (version 0, a draft).

    Args:
        degree: 1 to 6.
        target: ``output`` (the paper's), ``hidden`` or ``residual``.
        signal: ``modulated_input`` or ``time_embedding``.
        method: Which fit is recommended: ``auto`` decides on held-out pairs, ``polyfit`` or ``constrained`` force one.
            The other one is kept as an alternative.
        command: The command line to store as the entry's origin.

    Raises:
        CalibrateError: For a run or options that cannot be fitted.
    """
    fits = fit_branches(run, degree, target, signal, method)
    return entry_of(run, fits, target, signal, command)


def entry_of(
    run: Run, fits: Sequence[BranchFit], target: Any, signal: Any, command: str | None = None
) -> coeffs.Entry:
    """The entry of fits made by :func:`fit_branches`."""
    manifest = run.manifest
    warnings, experts = _run_warnings(run), {}
    for expert in run.experts:
        own = {fit.branch: fit for fit in fits if fit.expert == expert}
        recommended, loss = recommended_branch(own)
        for branch, fit in own.items():
            # The runtime uses the branches' own fits: the pooled one's doubts matter where it is handed out.
            if branch in (recommended, *run.branches(expert)):
                warnings += _fit_warnings(fit)
        warnings += [f"{expert}: {loss}"] if loss else []
        experts[expert] = coeffs.Expert(
            recommended=recommended,
            branches={branch: _entry_fit(fit) for branch, fit in own.items()},
            mag_ratios=_mag_ratios(run, expert),
        )
    classes = manifest.get("transformer_classes") or {}
    entry = coeffs.Entry(
        model=slug(str(manifest.get("model") or "unnamed")),
        status="measured",
        transformer_class=classes.get("transformer") or next(iter(classes.values()), None),
        pipeline_class=manifest.get("pipeline_class"),
        checkpoint=_record(coeffs.Checkpoint, manifest.get("checkpoint")),
        signal=signal,
        target=target,
        sign_rule="clamp",
        protocol=protocol_of(manifest.get("protocol")),
        experts=experts,
        warnings=tuple(dict.fromkeys(warnings)),
        source=_source(run, command),
    )
    return dataclasses.replace(entry, thresholds=_thresholds(run, entry, fits))


def replayed(
    run: Run, entry: coeffs.Entry, fits: Sequence[BranchFit], thresholds: Sequence[float] = ()
) -> pd.DataFrame:
    """The summary of a replay, with the 95 % interval of the mean of computed steps (``low``, ``high``).

    By default at thresholds that compute about evenly spaced shares of the steps.
    """
    of_branch = polynomials(entry, run)
    search = Search(run, of_branch, signal=entry.signal)
    grid = list(thresholds) or threshold_grid(search)
    table = summarise(replay(run, of_branch, grid, signal=entry.signal), run.timing)
    refits = {(fit.expert, fit.branch): fit.resampled for fit in fits}
    # Threshold 0 computes everything, whatever the fit.
    intervals = computed_intervals(search, refits, [t for t in grid if t > 0]) or {}
    edges = [intervals.get(threshold, (np.nan, np.nan)) for threshold in table["threshold"]]
    return table.assign(low=[low for low, _ in edges], high=[high for _, high in edges])


def slug(model: str) -> str:
    """A model's name as the registry spells it: lower case, at most one slash."""
    parts = [
        re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("._-")[:64]
        for part in re.split(r"[/\\]", model)
    ]
    return "/".join([part.strip("._-") for part in parts if part][-2:]) or "unnamed"


def _entry_fit(fit: BranchFit) -> coeffs.Fit:
    counts = coeffs.Counts(
        prompts=fit.pairs["prompt_id"].nunique(),
        trajectories=len(fit.pairs[["prompt_id", "seed", "branch"]].drop_duplicates()),
        pairs=len(fit.pairs),
        excluded_non_finite=fit.excluded,
    )
    intervals = None
    if fit.resampled:
        intervals = {"coefficients": fit.resampled.coefficient_intervals()}
    others = (coeffs.Candidate(**_candidate(fit, fit.other)),) if fit.other else ()
    chosen = _candidate(fit, fit.chosen)
    return coeffs.Fit(
        **chosen, counts=counts, intervals=intervals, why=fit.why, alternatives=others
    )


def _candidate(fit: BranchFit, result: FitResult) -> dict[str, Any]:
    return {
        "coefficients_high_to_low": result.coefficients_high_to_low,
        "degree": result.degree,
        "method": result.method,
        "domain": result.domain,
        "figures": fit.figures[result.method],
    }


def _mag_ratios(run: Run, expert: str) -> dict[str, tuple[float, ...]] | None:
    """MagCache's curve per branch: mean magnitude ratio, index = step, 1 at step 0. None for mixed schedules."""
    rows = run.frame[run.frame["expert"] == expert]
    if rows["num_steps"].nunique() != 1:
        return None
    means = rows.groupby(["branch", "step"])["mag_ratio"].mean()
    curves = {}
    for branch in run.branches(expert):
        curve = means[branch]
        if np.isfinite(curve).all() and list(curve.index) == list(range(1, len(curve) + 1)):
            curves[branch] = (1.0, *map(float, curve))
    return curves or None


def _thresholds(
    run: Run, entry: coeffs.Entry, fits: Sequence[BranchFit]
) -> tuple[coeffs.Threshold, ...]:
    """Replayed thresholds with their interval: no timing in it, so that the same pairs give the same entry."""
    rows = []
    for row in replayed(run, entry, fits).itertuples():
        if row.threshold == 0:
            continue
        note = f"prompts {row.computed_low:.4g} to {row.computed_high:.4g}"
        if np.isfinite(row.low):
            note += f", 95 % interval of the mean {row.low:.1f} to {row.high:.1f}"
        rows.append(
            coeffs.Threshold(
                threshold=float(row.threshold),
                computed_steps=float(row.computed_steps),
                kind="replay",
                num_steps=round(row.num_steps),
                note=note,
            )
        )
    return tuple(rows)


def _run_warnings(run: Run) -> list[str]:
    warnings, prompts = [], len(run.prompts)
    if run.manifest.get("model") == EMBEDDED_MODEL:
        warnings.append(
            "measured on the embedded tiny model: the figures say nothing about any other model"
        )
    if run.excluded:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in run.excluded.items())
        total = sum(run.excluded.values())
        warnings.append(f"{total} of {len(run.rows)} pairs excluded: {reasons}")
    wanted = {row.get("prompt_id") for row in run.manifest.get("prompts") or []}
    if len(wanted) > prompts:
        warnings.append(f"{prompts} of {len(wanted)} prompts recorded: the run is incomplete")
    if prompts == 1:
        warnings.append("one prompt only: nothing can be held out, all figures are in-sample")
    elif prompts < FEW_PROMPTS:
        warnings.append(f"{prompts} prompts only: held-out figures and intervals are rough")
    steps = sorted(run.frame["num_steps"].unique())
    if run.frame.groupby("expert")["step"].nunique().min() == 1:
        warnings.append(
            "one pair per trajectory only: a polynomial of x cannot be told from the schedule"
        )
    elif len(steps) == 1:
        warnings.append(
            f"recorded at {steps[0]} steps only: thresholds do not carry over to other numbers of steps"
        )
    return warnings


def _fit_warnings(fit: BranchFit) -> list[str]:
    warnings, known = list(fit.chosen.warnings), fit.chosen_figures
    non_negative, _ = has_shape(fit.chosen)
    if not non_negative:
        warnings.append(
            "negative on part of its domain: engines with other sign rules will decide differently"
        )
    if known["r2"] is None:
        warnings.append("the target is constant: there is nothing to predict")
    if (unseen := known["r2_held_out"]) is not None:
        if unseen <= (known["r2_constant"] or 0.0):
            warnings.append(
                f"no better than a constant on held-out prompts (R² {unseen:.2f}): skip uniformly instead"
            )
        elif unseen < POOR_R2:
            warnings.append(f"poor fit (held-out R² {unseen:.2f})")
        warnings += _schedule_warnings(known)
        if fit.enough is None and fit.pairs["prompt_id"].nunique() >= FEW_PROMPTS:
            warnings.append(
                "the held-out error still falls with the number of prompts: record more"
            )
    return [f"{fit.expert}/{fit.branch}: {text}" for text in warnings]


def _schedule_warnings(known: Figures) -> list[str]:
    """What speaks for a fixed plan instead of a polynomial of x; the figures are held-out ones."""
    warnings = []
    own, of_step = known["rmse_held_out"] or 0.0, known["rmse_step_mean"] or 0.0
    if of_step < (1 - BETTER) * own:
        warnings.append(
            f"the mean of each step predicts better than this polynomial (held-out RMSE {of_step:.2g} "
            f"against {own:.2g}): a fixed plan may do better"
        )
    within, low, high = (known[f"spearman_within_step{end}"] for end in ("", "_low", "_high"))
    if within is None:
        warnings.append(
            "x is the same for all prompts at each step: it adds nothing beyond the schedule"
        )
    elif low is not None and low <= 0:
        warnings.append(
            "x adds nothing measurable beyond the schedule (rank correlation within steps "
            f"{within:.2f}, 95 % interval {low:.2f} to {high:.2f})"
        )
    return warnings


def _record(record: type, values: dict | None) -> Any:
    """The record with those values of a manifest that it has a field for."""
    names = {spec.name for spec in dataclasses.fields(record)}
    given = {key: value for key, value in (values or {}).items() if value is not None}
    return record(**{key: given[key] for key in given if key in names})


def protocol_of(values: dict | None) -> coeffs.Protocol:
    """The record of a manifest's protocol."""
    values = dict(values or {})
    arguments = values.pop("call_arguments", None) or {}
    for key, value in arguments.items():
        if not isinstance(value, str | int | float | bool | None):
            arguments = arguments | {key: str(value)}
    return _record(coeffs.Protocol, values | {"call_arguments": arguments})


def _source(run: Run, command: str | None) -> coeffs.Source:
    versions = run.manifest.get("versions") or {}
    return coeffs.Source(
        run_id=run.manifest.get("run_id"),
        log_sha256=run.log_sha256,
        toolkit=versions.get("teacal"),
        torch=versions.get("torch"),
        diffusers=versions.get("diffusers"),
        device=run.manifest.get("device"),
        command=command,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
