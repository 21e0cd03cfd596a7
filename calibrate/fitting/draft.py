"""The draft entry: everything that a log says about a model, with the doubts in words.

Deterministic: the same pairs and manifest give the same bytes, but for ``source.created`` and ``source.command``.
"""

import dataclasses
import re
from datetime import UTC, datetime
from typing import Any

import numpy as np

import coeffs
from calibrate.errors import InvalidOption
from calibrate.fitting.choice import BETTER, BranchFit, fit_branches, recommended_branch
from calibrate.fitting.forecast_error import with_forecast_errors
from calibrate.fitting.intervals import computed_intervals
from calibrate.fitting.least_squares import FitResult, has_shape
from calibrate.fitting.replay import Search, polynomials, replay, summarise, threshold_grid
from calibrate.runs.pairs import FORECAST_ERROR, Run, load_run

EMBEDDED_MODEL = "tiny-longcat-image"
POOR_R2 = 0.5
FEW_PROMPTS = 8


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
    forecast: str | None = None,
    forecast_of: str | None = None,
    command: str | None = None,
) -> coeffs.Entry:
    """Fit a run and say how good it is, as a registry entry (version 0, a draft).

    Args:
        degree: 1 to 6.
        target: ``output`` (the paper's), ``hidden`` or ``residual``.
        signal: ``modulated_input`` or ``time_embedding``.
        method: Which fit is recommended: ``auto`` decides on held-out pairs, ``polyfit`` or ``constrained`` force one.
            The other one is kept as an alternative.
        forecast: ``linear`` or ``quadratic``: skipped steps are forecast, and the target is the forecast's error.
        forecast_of: ``output`` (default) or ``residual``, beside ``forecast``.
        command: The command line to store as the entry's origin.

    Raises:
        CalibrateError: For a run or options that cannot be fitted.
    """
    run, target = forecasting(run, target, forecast, forecast_of)
    fits = fit_branches(run, degree, target, signal, method)
    return entry_of(run, fits, target, signal, forecast, forecast_of, command)


def forecasting(
    run: Run, target: str, forecast: str | None, forecast_of: str | None
) -> tuple[Run, str]:
    """The run and the name of the target that a gate with this forecast is fitted on."""
    if forecast is None:
        if forecast_of is not None:
            raise InvalidOption(
                f"--forecast-of {forecast_of} says of what; give --forecast linear beside it"
            )
        return run, target
    if target != "output":
        raise InvalidOption(
            f"--target {target}: with --forecast the target is the forecast's error; leave it out"
        )
    return with_forecast_errors(run, forecast, forecast_of or "output"), FORECAST_ERROR


def entry_of(
    run: Run,
    fits: list[BranchFit],
    target: str,
    signal: str,
    forecast: str | None = None,
    forecast_of: str | None = None,
    command: str | None = None,
) -> coeffs.Entry:
    """The entry of fits made by :func:`fit_branches`."""
    manifest = run.manifest
    warnings, experts = _run_warnings(run), {}
    for expert in run.experts:
        own = {one.branch: one for one in fits if one.expert == expert}
        recommended, loss = recommended_branch(own)
        # The runtime uses the branches' own fits: the pooled one's doubts matter where it is handed out.
        used = [
            one for branch, one in own.items() if branch in (recommended, *run.branches(expert))
        ]
        warnings += [warning for one in used for warning in _fit_warnings(one)]
        warnings += [f"{expert}: {loss}"] if loss else []
        experts[expert] = coeffs.Expert(
            recommended=recommended,
            branches={branch: _entry_fit(one) for branch, one in own.items()},
            mag_ratios=_mag_ratios(run, expert),
        )
    classes = manifest.get("transformer_classes") or {}
    entry = coeffs.Entry(
        model=slug(str(manifest.get("model") or "unnamed")),
        status="measured",
        title=None,
        transformer_class=classes.get("transformer") or next(iter(classes.values()), None),
        pipeline_class=manifest.get("pipeline_class"),
        checkpoint=_record(coeffs.Checkpoint, manifest.get("checkpoint")),
        signal=signal,
        target=target,
        forecast=forecast,
        forecast_of=(forecast_of or "output") if forecast else None,
        sign_rule="clamp",
        protocol=_protocol(manifest.get("protocol")),
        experts=experts,
        warnings=tuple(dict.fromkeys(warnings)),
        source=_source(run, command),
    )
    return dataclasses.replace(entry, thresholds=tuple(_thresholds(run, entry, fits, signal)))


def slug(model: str) -> str:
    """A model's name as the registry spells it: lower case, at most one slash."""
    parts = [
        re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("._-")[:64]
        for part in re.split(r"[/\\]", model)
    ]
    return "/".join([part.strip("._-") for part in parts if part][-2:]) or "unnamed"


def _entry_fit(one: BranchFit) -> coeffs.Fit:
    counts = coeffs.Counts(
        prompts=one.pairs["prompt_id"].nunique(),
        trajectories=len(one.pairs[["prompt_id", "seed", "branch"]].drop_duplicates()),
        pairs=len(one.pairs),
        excluded_non_finite=one.excluded,
    )
    intervals = {"coefficients": one.resampled.coefficient_intervals()} if one.resampled else None
    alternatives = (coeffs.Candidate(**_candidate(one, one.other)),) if one.other else ()
    return coeffs.Fit(
        **_candidate(one, one.chosen),
        counts=counts,
        intervals=intervals,
        why=one.why,
        alternatives=alternatives,
    )


def _candidate(one: BranchFit, result: FitResult) -> dict[str, Any]:
    return {
        "coefficients_high_to_low": result.coefficients_high_to_low,
        "degree": result.degree,
        "method": result.method,
        "domain": result.domain,
        "figures": one.figures[result.method],
    }


def _mag_ratios(run: Run, expert: str) -> dict[str, tuple[float, ...]] | None:
    """MagCache's curve per branch: mean magnitude ratio, index = step, 1 at step 0. None for mixed schedules."""
    rows = run.frame[run.frame["expert"] == expert]
    if rows["num_steps"].nunique() != 1:
        return None
    means = rows.groupby(["branch", "step"])["mag_ratio"].mean()
    found = {}
    for branch in run.branches(expert):
        curve = means[branch]
        if np.isfinite(curve).all() and list(curve.index) == list(range(1, len(curve) + 1)):
            found[branch] = (1.0, *map(float, curve))
    return found or None


def _thresholds(
    run: Run, entry: coeffs.Entry, fits: list[BranchFit], signal: str
) -> list[coeffs.Threshold]:
    """Replayed thresholds with their interval: no timing in it, so that the same pairs give the same entry."""
    of_branch = polynomials(entry, run)
    search = Search(run, of_branch, signal=signal)
    grid = [threshold for threshold in threshold_grid(search) if threshold > 0]
    if not grid:
        return []
    table = summarise(replay(run, of_branch, grid, signal=signal)).set_index("threshold")
    intervals = computed_intervals(
        search, {(one.expert, one.branch): one.resampled for one in fits}, grid
    )
    rows = []
    for threshold, row in table.iterrows():
        note = f"prompts {row['computed_low']:.4g} to {row['computed_high']:.4g}"
        if intervals is not None:
            low, high = intervals[threshold]
            note += f", 95 % interval of the mean {low:.1f} to {high:.1f}"
        rows.append(coeffs.Threshold(
            threshold=float(threshold), computed_steps=float(row["computed_steps"]), kind="replay",
            num_steps=round(row["num_steps"]), note=note,
        ))  # fmt: skip
    return rows


def _run_warnings(run: Run) -> list[str]:
    found, prompts = [], len(run.prompts)
    if run.manifest.get("model") == EMBEDDED_MODEL:
        found.append(
            "measured on the embedded tiny model: the figures say nothing about any other model"
        )
    if run.excluded:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in run.excluded.items())
        found.append(f"{sum(run.excluded.values())} of {len(run.rows)} pairs excluded: {reasons}")
    wanted = {row.get("prompt_id") for row in run.manifest.get("prompts") or []}
    if len(wanted) > prompts:
        found.append(f"{prompts} of {len(wanted)} prompts recorded: the run is incomplete")
    if prompts == 1:
        found.append("one prompt only: nothing can be held out, all figures are in-sample")
    elif prompts < FEW_PROMPTS:
        found.append(f"{prompts} prompts only: held-out figures and intervals are rough")
    steps = sorted(run.frame["num_steps"].unique())
    if run.frame.groupby("expert")["step"].nunique().min() == 1:
        found.append(
            "one pair per trajectory only: a polynomial of x cannot be told from the schedule"
        )
    elif len(steps) == 1:
        found.append(
            f"recorded at {steps[0]} steps only: thresholds do not carry over to other numbers of steps"
        )
    return found


def _fit_warnings(one: BranchFit) -> list[str]:
    name, found, known = f"{one.expert}/{one.branch}", list(one.chosen.warnings), one.chosen_figures
    non_negative, _ = has_shape(one.chosen)
    if not non_negative:
        found.append(
            "negative on part of its domain: engines with other sign rules will decide differently"
        )
    if known["r2"] is None:
        found.append("the target is constant: there is nothing to predict")
    if (unseen := known["r2_held_out"]) is not None:
        if unseen <= (known["r2_constant"] or 0.0):
            found.append(
                f"no better than a constant on held-out prompts (R² {unseen:.2f}): skip uniformly instead"
            )
        elif unseen < POOR_R2:
            found.append(f"poor fit (held-out R² {unseen:.2f})")
        found += _schedule_warnings(known)
        if one.enough is None and one.pairs["prompt_id"].nunique() >= FEW_PROMPTS:
            found.append("the held-out error still falls with the number of prompts: record more")
    return [f"{name}: {text}" for text in found]


def _record(record: type, values: dict | None) -> Any:
    known = {spec.name for spec in dataclasses.fields(record)}
    return record(
        **{
            key: value
            for key, value in (values or {}).items()
            if key in known and value is not None
        }
    )


def _protocol(values: dict | None) -> coeffs.Protocol:
    values = dict(values or {})
    arguments = values.pop("call_arguments", None) or {}
    scalars = {
        key: value if isinstance(value, str | int | float | bool | None) else str(value)
        for key, value in arguments.items()
    }
    return _record(coeffs.Protocol, values | {"call_arguments": scalars})


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


def _schedule_warnings(known: dict[str, float | None]) -> list[str]:
    """What speaks for a fixed plan instead of a polynomial of x; the figures are held-out ones."""
    found = []
    if known["rmse_step_mean"] < (1 - BETTER) * known["rmse_held_out"]:
        found.append(
            f"the mean of each step predicts better than this polynomial (held-out RMSE {known['rmse_step_mean']:.2g} "
            f"against {known['rmse_held_out']:.2g}): a fixed plan may do better"
        )
    within, low, high = (known[f"spearman_within_step{end}"] for end in ("", "_low", "_high"))
    if low is not None and low <= 0:
        found.append(
            "x adds nothing measurable beyond the schedule (rank correlation within steps "
            f"{within:.2f}, 95 % interval {low:.2f} to {high:.2f})"
        )
    elif within is None:
        found.append(
            "x is the same for all prompts at each step: it adds nothing beyond the schedule"
        )
    return found
