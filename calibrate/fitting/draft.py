"""The draft entry: everything that a log says about a model, with the doubts in words.

Deterministic: the same pairs and manifest give the same bytes, but for ``source.created`` and ``source.command``.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

import coeffs
from calibrate.fitting.choice import BETTER, BranchFit, fit_branches, recommended_branch
from calibrate.fitting.intervals import computed_intervals
from calibrate.fitting.replay import Search, threshold_grid
from calibrate.fitting.statistics import ENOUGH_PROMPTS
from calibrate.model.table import EMBEDDED_MODEL
from calibrate.runs.pairs import Run, load_run
from coeffs.entry.polynomial import negative_ranges

POOR_R2 = 0.5  # the polynomial explains less than half of the variance


def fit(
    run: Any,
    *,
    degree: int = 4,
    target: str = "output",
    signal: str = "modulated_input",
    method: str = "auto",
    command: str | None = None,
) -> coeffs.Entry:
    """Fit a recorded run and draft its registry entry (version 0), as ``calibrate fit`` does.

    Args:
        run: A run folder, several of one protocol, a table of pairs, or a loaded :class:`~calibrate.runs.pairs.Run`.
        degree: 1 to 6.
        target: ``output`` (the paper's), ``hidden`` or ``residual``.
        signal: ``modulated_input`` or ``time_embedding``.
        method: Which fit is recommended: ``auto`` decides on held-out pairs, ``polyfit`` or ``constrained`` force one.
            The other one is kept as an alternative.
        command: The command line to store as the entry's origin.

    Raises:
        CalibrateError: For a run or options that cannot be fitted.
    """
    run = run if isinstance(run, Run) else load_run(run)
    fits = fit_branches(run, degree, target, signal, method)
    return entry_of(run, fits, target, signal, command)


def entry_of(
    run: Run,
    fits: Sequence[BranchFit],
    target: Any,
    signal: Any,
    command: str | None = None,
) -> coeffs.Entry:
    """The entry of fits made by :func:`fit_branches`."""
    manifest = run.manifest
    warnings, experts = list(_run_warnings(run)), {}
    for expert in run.experts:
        own = {fit.branch: fit for fit in fits if fit.expert == expert}
        recommended, loss = recommended_branch(own)
        for branch, fit in own.items():
            # The runtime uses the branches' own fits: the pooled one's doubts matter where it is handed out.
            if branch in (recommended, *run.branches(expert)):
                warnings += [f"{expert}/{branch}: {text}" for text in _fit_warnings(fit)]
        warnings += [f"{expert}: {loss}"] if loss else []
        experts[expert] = coeffs.Expert(
            recommended=recommended,
            branches={branch: fit.fit for branch, fit in own.items()},
            mag_ratios=_mag_ratios(run.frame[run.frame["expert"] == expert]),
        )
    classes = manifest.get("transformer_classes") or {}
    versions = manifest.get("versions") or {}
    measured = {
        "toolkit": versions.get("teacal"),
        "log_sha256": run.log_sha256,
        "command": command,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    entry = coeffs.Entry(
        model=slug(str(manifest.get("model", ""))),
        status="measured",
        transformer_class=next(iter(classes.values()), None),
        pipeline_class=manifest.get("pipeline_class"),
        checkpoint=_known(coeffs.Checkpoint, manifest.get("checkpoint")),
        signal=signal,
        target=target,
        protocol=protocol_of(manifest.get("protocol")),
        experts=experts,
        warnings=tuple(dict.fromkeys(warnings)),
        source=_known(coeffs.Source, manifest | versions | measured),
    )
    search = Search(run, entry)
    return replace(
        entry, thresholds=_thresholds(replayed(search, fits, threshold_grid(search)))
    )


def replayed(
    search: Search, fits: Sequence[BranchFit], thresholds: Sequence[float]
) -> pd.DataFrame:
    """The summary of a replay; in words ``prompts``, the range, and ``interval``, the mean's 95 % one or nothing."""
    refits = {(fit.expert, fit.branch): fit.resampled for fit in fits}
    edges = computed_intervals(search, refits, thresholds).T
    table = search.summary(thresholds)
    ranges = table[["computed_low", "computed_high"]].to_numpy()
    return table.assign(
        prompts=[f"{low:.4g} to {high:.4g}" for low, high in ranges],
        interval=["" if np.isnan(low) else f"{low:.1f} to {high:.1f}" for low, high in edges],
    )


def slug(model: str) -> str:
    """A model's name as the registry spells it: lower case, at most one slash."""
    parts = [
        re.sub(r"[^a-z0-9._-]+", "-", part).strip("._-")[:64].strip("._-")
        for part in re.split(r"[/\\]", model.lower())
    ]
    return "/".join(list(filter(None, parts))[-2:]) or "unnamed"


def _mag_ratios(rows: pd.DataFrame) -> dict[str, tuple[float, ...]] | None:
    """MagCache's curve per branch: mean magnitude ratio, index = step, 1 at step 0. None for mixed schedules."""
    if rows["num_steps"].nunique() != 1:
        return None
    curves = {}
    for branch, own in rows.groupby("branch"):
        curve = own.groupby("step")["mag_ratio"].mean()
        if np.isfinite(curve).all() and curve.index.max() == len(curve):
            curves[str(branch)] = (1.0, *curve.tolist())
    return curves or None


def _thresholds(table: pd.DataFrame) -> tuple[coeffs.Threshold, ...]:
    """Replayed thresholds with their interval: no timing in it, so that the same pairs give the same entry."""
    return tuple(
        coeffs.Threshold(
            threshold=row.threshold,
            computed_steps=row.computed_steps,
            kind="replay",
            num_steps=round(row.num_steps),
            note=f"prompts {row.prompts}"
            + (f", 95 % interval of the mean {row.interval}" if row.interval else ""),
        )
        for row in table[table["threshold"] > 0].itertuples()
    )


def _run_warnings(run: Run) -> Iterator[str]:
    prompts = len(run.prompts)
    if run.manifest.get("model") == EMBEDDED_MODEL:
        yield "measured on the embedded tiny model: the figures say nothing about any other model"
    if run.excluded:
        reasons = ", ".join(
            f"{count} with {reason}" for reason, count in run.excluded.items()
        )
        yield f"{sum(run.excluded.values())} of {len(run.rows)} pairs excluded: {reasons}"
    wanted = len({row["prompt_id"] for row in run.manifest.get("prompts", ())})
    if wanted > prompts:
        yield f"{prompts} of {wanted} prompts recorded: the run is incomplete"
    if prompts == 1:
        yield "one prompt only: nothing can be held out, all figures are in-sample"
    elif prompts < ENOUGH_PROMPTS:
        yield f"{prompts} prompts only: held-out figures and intervals are rough"
    steps = run.frame["num_steps"].unique()
    if run.frame.groupby("expert")["step"].nunique().min() == 1:
        yield "one pair per trajectory only: a polynomial of x cannot be told from the schedule"
    elif len(steps) == 1:
        yield f"recorded at {steps[0]} steps only: thresholds do not carry over to other numbers of steps"


def _fit_warnings(fit: BranchFit) -> Iterator[str]:
    known = fit.figures
    yield from fit.doubts
    if fit.fit.domain and negative_ranges(fit.fit.polynomial(), fit.fit.domain):
        yield "negative on part of its domain: engines with other sign rules will decide differently"
    if known["r2"] is None:
        yield "the target is constant: there is nothing to predict"
    unseen = known["r2_held_out"]
    if unseen is None:
        return
    if unseen <= (known["r2_constant"] or 0.0):
        yield f"no better than a constant on held-out prompts (R² {unseen:.2f}): skip uniformly instead"
    elif unseen < POOR_R2:
        yield f"poor fit (held-out R² {unseen:.2f})"
    # What speaks for a fixed plan instead of a polynomial of x.
    own, of_step = known["rmse_held_out"] or 0.0, known["rmse_step_mean"] or 0.0
    if of_step < (1 - BETTER) * own:
        yield (
            f"the mean of each step predicts better than this polynomial (held-out RMSE {of_step:.2g} "
            f"against {own:.2g}): a fixed plan may do better"
        )
    within, low, high = (known[f"spearman_within_step{end}"] for end in ("", "_low", "_high"))
    if within is None:
        yield "x is the same for all prompts at each step: it adds nothing beyond the schedule"
    elif low is not None and low <= 0:
        yield (
            "x adds nothing measurable beyond the schedule "
            f"(rank correlation within steps {within:.2f}, 95 % interval {low:.2f} to {high:.2f})"
        )
    if fit.enough is None and fit.pairs["prompt_id"].nunique() >= ENOUGH_PROMPTS:
        yield "the held-out error still falls with the number of prompts: record more"


def _known(record: Any, values: Mapping[str, Any] | None) -> Any:
    """The record with those values of a manifest that it has a field for."""
    names = {field.name for field in fields(record)}
    return record(**{name: value for name, value in (values or {}).items() if name in names})


def protocol_of(values: Mapping[str, Any] | None) -> coeffs.Protocol:
    """The record of a manifest's protocol."""
    protocol = dict(values or {})
    protocol["call_arguments"] = {
        key: value
        if isinstance(value, str | int | float | None)
        else json.dumps(value, default=str)
        for key, value in (protocol.get("call_arguments") or {}).items()
    }
    return _known(coeffs.Protocol, protocol)
