"""What planning found for each budget: its figures, in the entry, in ``plan.json`` and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

import coeffs
from calibrate.planning.candidates import BASELINES, UNIFORM, UNIFORM_FITTED, Candidate, score
from calibrate.runs.entry_file import PLAN_WARNING
from calibrate.runs.files import write_atomically
from calibrate.runs.gram_log import NoPlan
from calibrate.text import aligned
from calibrate.trials.measures import capped, main_measure
from calibrate.trials.setting import FEWER_STEPS, FEWER_STEPS_2, PLAN

NOISE_DB = 0.3  # differences of means below it are not told apart here
MAIN_MEASURES = ("psnr_db", "snr_db")
SOLVERS = (FEWER_STEPS, FEWER_STEPS_2)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Planned:
    """What planning found for one budget.

    Attributes:
        candidates: Everything that entered, baselines first.
        winner: The plan that was chosen; without runs the one with the least open-loop error.
        figures: Of the winner on judged prompts, and of its rivals beside it; empty without runs.
        chosen: Why the winner is it: its score on choosing prompts, and those of the next ones.
    """

    computed: int
    candidates: list[Candidate]
    winner: Candidate
    figures: Figures = field(default_factory=dict)
    chosen: str | None = None

    @property
    def plan(self) -> coeffs.Plan:
        """The winner's schedule and forecast."""
        assert self.winner.plan is not None
        return self.winner.plan

    @property
    def main(self) -> str:
        """The measure that its figures are compared by."""
        return next((name for name in MAIN_MEASURES if name in self.figures), MAIN_MEASURES[0])

    @property
    def fewer_steps(self) -> float | None:
        """Fidelity of fewer steps, by the better of its solvers."""
        keys = [f"{_key(name)}_{self.main}" for name in SOLVERS]
        known = [value for value in map(self.figures.get, keys) if value is not None]
        return max(known, default=None)


def fidelity(rows: pd.DataFrame, main: str) -> pd.DataFrame:
    """The main measure by prompt (rows) and policy (columns); a broken sample counts 0."""
    values = capped(rows, main).where(~rows["broken"].astype(bool), 0.0)
    keys = rows["prompt_id"].astype(str) + "-" + rows["seed"].astype(str)
    return rows.assign(value=values, key=keys).pivot_table("value", "key", "policy")


def judged_figures(rows: pd.DataFrame, floor: Mapping[str, Any]) -> Figures:
    """Means and worst prompts of the plan, its rivals' beside them, the paired gain over uniform reuse, the floor."""
    main = main_measure(rows)
    table = fidelity(rows, main)
    ours = table[PLAN].dropna()
    own = rows[rows["policy"] == PLAN]
    figures: Figures = {
        "prompts": len(ours),
        main: ours.mean(),
        f"worst_{main}": ours.min(),
        f"floor_{main}": floor.get(main),
        "speedup": float((own["uncached_seconds"] / own["seconds"]).mean()),
    }
    for measure in ("ssim", "latent_rel_l2"):
        if measure in own and own[measure].notna().any():
            figures[measure] = float(own[measure].mean())
    for name in (*BASELINES, *SOLVERS):
        if name in table:
            figures[f"{_key(name)}_{main}"] = table[name].mean()
            figures[f"{_key(name)}_worst_{main}"] = table[name].min()
    gain = _mean_with_interval((table[PLAN] - table[UNIFORM]).dropna().to_numpy())
    figures |= dict(zip(("gain_db", "gain_low_db", "gain_high_db"), gain, strict=True))
    return {
        name: None if value is None or not np.isfinite(value) else float(value)
        for name, value in figures.items()
    }


def _mean_with_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean and its 95 % interval over prompts; NaN bounds below three prompts."""
    if len(values) < 3:
        return float(np.mean(values)), float("nan"), float("nan")
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(np.mean(values)), float(low), float(high)


def planned_entry(
    entry: coeffs.Entry, sigmas: NDArray[np.float64], planned: Sequence[Planned]
) -> coeffs.Entry:
    """The entry with these plans in place of earlier ones for the same steps, and a word where fewer steps wins."""
    levels = tuple(float(sigma) for sigma in sigmas) if np.isfinite(sigmas).all() else None
    new = [
        replace(one.plan, sigmas=levels, figures=one.figures or None, chosen=one.chosen)
        for one in planned
    ]
    replaced = {(len(plan.schedule), plan.computed_steps) for plan in new}
    kept = [p for p in entry.plans or () if (len(p.schedule), p.computed_steps) not in replaced]
    plans = sorted(
        [*kept, *new], key=lambda plan: (len(plan.schedule), -(plan.computed_steps or 0))
    )
    warnings = [text for text in entry.warnings if not text.startswith(PLAN_WARNING)]
    verdict = fewer_steps_verdict(planned)
    if verdict:
        warnings.append(PLAN_WARNING + verdict)
    return replace(entry, plans=tuple(plans), warnings=tuple(warnings))


def fewer_steps_verdict(planned: Sequence[Planned]) -> str | None:
    """Where fewer steps is better than the plan, in words; ``None`` where it never is."""
    lost = []
    for one in planned:
        ours, other = one.figures.get(one.main), one.fewer_steps
        if ours is not None and other is not None and other > ours + NOISE_DB:
            lost.append(f"{one.computed} ({other:.1f} against {ours:.1f} dB)")
    if not lost:
        return None
    where = f"{', '.join(lost)} computed steps"
    if len(lost) == len(planned):
        return f"a cache is not worth it here: use fewer steps, which is better at {where}"
    return f"use fewer steps instead, without a cache, at {where}"


def keep(folder: Path, planned: Sequence[Planned], tried: pd.DataFrame) -> None:
    """``plan.json``: every budget with its candidates and what they gave; other budgets are kept."""
    file = folder / "plan.json"
    own = {(len(one.plan.schedule), one.computed) for one in planned}
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = [row for row in earlier if (row["steps"], row["computed"]) not in own]
    for one in planned:
        of_budget = tried[tried["budget"] == one.computed]
        table = fidelity(of_budget, main_measure(of_budget))
        scores = {name: score(table[name].dropna().to_numpy()) for name in table}
        rows.append({
            "steps": len(one.plan.schedule),
            "computed": one.computed,
            "winner": _described(one.winner),
            "chosen": one.chosen,
            "prompts": len(table),
            "figures": one.figures,
            "candidates": [
                _described(candidate) | {"score": scores.get(candidate.name)}
                for candidate in one.candidates
            ],
        })  # fmt: skip
    rows.sort(key=lambda row: (row["steps"], -row["computed"]))
    write_atomically(file, (json.dumps(rows, indent=2, default=float) + "\n").encode())


def uniform_fitted(folder: Path, num_steps: int, computed: int) -> coeffs.Plan:
    """The uniform schedule with the weights that planning fitted for it.

    Raises:
        NoPlan: This budget was not planned.
    """
    file = folder / "plan.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for row in rows:
        for kept in row["candidates"]:
            if kept["name"] == UNIFORM_FITTED and (row["steps"], row["computed"]) == (
                num_steps,
                computed,
            ):
                names = ("schedule", "forecast", "forecast_of", "weights")
                return coeffs.Plan(**{name: kept.get(name) for name in names})
    raise NoPlan(
        f"no weights of the uniform schedule at {computed} of {num_steps} steps; "
        f"run `calibrate plan {folder} --computed {computed}` first"
    )


def plan_table(planned: Sequence[Planned]) -> str:
    """The table of the command."""
    header = ["computed", "winner", "dB (worst)", "uniform, reuse", "uniform, linear guided"]
    header += ["fewer steps", "second-order solver", "noise floor", "speed-up", "schedule"]
    rivals = (
        "",
        "uniform_reuse_",
        "uniform_linear_guided_",
        *(f"{_key(name)}_" for name in SOLVERS),
    )
    rows = []
    for one in planned:
        cells = [_cell(one, prefix) for prefix in rivals]
        floor, speedup = one.figures.get(f"floor_{one.main}"), one.figures.get("speedup")
        cells.append("-" if floor is None else f"{floor:.1f}")
        cells.append("-" if speedup is None else f"{speedup:.2f}x")
        rows.append([str(one.computed), one.winner.name, *cells, one.plan.schedule])
    chosen = [f"{one.computed} computed: {one.chosen}" for one in planned if one.chosen]
    return "\n".join([aligned(header, rows), *chosen])


def _cell(one: Planned, prefix: str) -> str:
    value = one.figures.get(f"{prefix}{one.main}")
    worst = one.figures.get(f"{prefix}worst_{one.main}")
    return "-" if value is None or worst is None else f"{value:.1f} ({worst:.1f})"


def _described(candidate: Candidate) -> dict[str, Any]:
    described: dict[str, Any] = {"name": candidate.name, "open_loop_error": candidate.cost}
    described["recorded_db"] = candidate.recorded_db
    if candidate.plan is not None:
        described |= {
            "schedule": candidate.plan.schedule,
            "forecast": candidate.plan.forecast,
            "forecast_of": candidate.plan.forecast_of,
            "weights": candidate.plan.weights,
        }
    return described


def _key(name: str) -> str:
    """A policy's name within the name of a figure."""
    return name.replace(", ", "_").replace(" ", "_").replace("-", "_")
