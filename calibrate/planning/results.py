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

import coeffs
from calibrate.planning.candidates import (
    BASELINES,
    UNIFORM,
    Candidate,
    score,
)
from calibrate.runs.entry_file import PLAN_WARNING
from calibrate.runs.files import write_atomically
from calibrate.text import aligned, number
from calibrate.trials.measures import capped, main_measure
from calibrate.trials.setting import FEWER_STEPS, FEWER_STEPS_2, PLAN

NOISE_DB = 0.3  # differences of means below it are not told apart here
SOLVERS = (FEWER_STEPS, FEWER_STEPS_2)
SHOWN = (UNIFORM, "uniform, linear guided", *SOLVERS)  # rivals in the table of the command
FORECAST = ("schedule", "forecast", "forecast_of", "weights")

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Planned:
    """What planning found for one budget.

    Attributes:
        candidates: Everything that entered, baselines first.
        winner: The plan that was chosen; without runs the one with the least open-loop error.
        figures: Of the winner on judged prompts, and of its rivals beside it; empty without runs.
        scores: Name -> what a candidate scored on the choosing prompts, of those that were run.
    """

    computed: int
    candidates: list[Candidate]
    winner: Candidate
    figures: Figures = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """Why the winner is it, in words: its score, and those of the next ones."""
        if not self.scores:
            return None
        best = sorted(self.scores, key=lambda name: -self.scores[name])
        ranked = [name for name in best if name != self.winner.name][:3]
        named = [f"{name} {self.scores[name]:.1f}" for name in (self.winner.name, *ranked)]
        return f"scores on choosing prompts, dB: {', '.join(named)}"

    @property
    def plan(self) -> coeffs.Plan:
        """The winner's schedule and forecast."""
        assert self.winner.plan is not None
        return self.winner.plan

    def db(self, policy: str, which: str = "") -> float | None:
        """A policy's mean fidelity, or the ``worst_`` one, in the measure that the figures are compared by."""
        measure = "snr_db" if "snr_db" in self.figures else "psnr_db"
        return self.figures.get(f"{_prefix(policy)}{which}{measure}")


def fidelity(rows: pd.DataFrame, main: str) -> pd.DataFrame:
    """The main measure by prompt (rows) and policy (columns); a broken sample counts 0."""
    values = capped(rows, main).where(~rows["broken"].astype(bool), 0.0)
    keys = rows["prompt_id"].astype(str) + "-" + rows["seed"].astype(str)
    return rows.assign(value=values, key=keys).pivot_table("value", "key", "policy")


def scores_of(rows: pd.DataFrame) -> dict[str, float]:
    """Policy -> its score in runs of one budget."""
    table = fidelity(rows, main_measure(rows))
    return {name: score(table[name].dropna().to_numpy()) for name in table}


def judged_figures(rows: pd.DataFrame, floor: Mapping[str, Any]) -> Figures:
    """Means and worst prompts of the plan, its rivals' beside them, and the floor."""
    main = main_measure(rows)
    table = fidelity(rows, main)
    own = rows[rows["policy"] == PLAN]
    figures = {
        "prompts": table[PLAN].count(),
        "speedup": (own["uncached_seconds"] / own["seconds"]).mean(),
        f"floor_{main}": floor.get(main),
        **own.reindex(columns=["ssim", "latent_rel_l2"]).mean().dropna(),
    }
    for name in table.columns.intersection([PLAN, *BASELINES, *SOLVERS]):
        figures[f"{_prefix(name)}{main}"] = table[name].mean()
        figures[f"{_prefix(name)}worst_{main}"] = table[name].min()
    return pd.Series(figures, dtype=float).replace(np.inf, np.nan).dropna().to_dict()


def planned_entry(
    entry: coeffs.Entry, sigmas: NDArray[np.float64], planned: Sequence[Planned]
) -> coeffs.Entry:
    """The entry with these plans in place of earlier ones for the same steps, and a word where fewer steps wins."""
    levels = tuple(sigmas.tolist()) if np.isfinite(sigmas).all() else None
    plans = {_size(plan): plan for plan in entry.plans or ()}
    for own in planned:
        plan = replace(
            own.plan, sigmas=levels, figures=own.figures or None, chosen=own.chosen
        )
        plans[_size(plan)] = plan
    warnings = [text for text in entry.warnings if not text.startswith(PLAN_WARNING)]
    verdict = fewer_steps_verdict(planned)
    if verdict:
        warnings.append(PLAN_WARNING + verdict)
    return replace(
        entry, plans=tuple(plans[size] for size in sorted(plans)), warnings=tuple(warnings)
    )


def _size(plan: coeffs.Plan) -> tuple[int, int]:
    """All steps and, so that many come first, minus the computed ones."""
    return len(plan.schedule), -plan.schedule.count("C")


def fewer_steps_verdict(planned: Sequence[Planned]) -> str | None:
    """Where fewer steps is better than the plan, in words; ``None`` where it never is."""
    lost = []
    for own in planned:
        ours, rivals = own.db(PLAN), [own.db(name) for name in SOLVERS]
        other = max((value for value in rivals if value is not None), default=None)
        if ours is not None and other is not None and other > ours + NOISE_DB:
            lost.append(f"{own.computed} ({other:.1f} against {ours:.1f} dB)")
    if not lost:
        return None
    where = f"{', '.join(lost)} computed steps"
    if len(lost) == len(planned):
        return f"a cache is not worth it here: use fewer steps, which is better at {where}"
    return f"use fewer steps instead, without a cache, at {where}"


def keep(folder: Path, planned: Sequence[Planned], anchors: int | None) -> None:
    """``plan.json``: every budget with its candidates and what they gave; other budgets are kept.

    Weights of candidates that did not win are those of a few prompts.
    """
    rows = {(row["steps"], -row["computed"]): row for row in _kept(folder)}
    for own in planned:
        rows[_size(own.plan)] = {
            "steps": len(own.plan.schedule),
            "computed": own.computed,
            "anchors": anchors,
            "winner": _described(own.winner),
            "chosen": own.chosen,
            "figures": own.figures,
            "candidates": [
                {**_described(c), "score": own.scores.get(c.name)} for c in own.candidates
            ],
        }
    text = json.dumps([rows[size] for size in sorted(rows)], indent=2)
    write_atomically(folder / "plan.json", f"{text}\n".encode())


def anchors_of(folder: Path) -> int | None:
    """Most predictions that the forecasts of any plan of this run use; None where that was not bounded."""
    bounds = [row["anchors"] for row in _kept(folder) if row.get("anchors")]
    return min(bounds, default=None)


def _kept(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``plan.json``, where there is one."""
    file = folder / "plan.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _described(candidate: Candidate) -> dict[str, Any]:
    plan = {name: getattr(candidate.plan, name) for name in FORECAST if candidate.plan}
    return {
        "name": candidate.name,
        "open_loop_error": candidate.cost,
        "recorded_db": candidate.recorded_db,
        **plan,
    }


def plan_table(planned: Sequence[Planned]) -> str:
    """The table of the command."""
    columns = ["computed", "winner", "dB (worst)", *SHOWN]
    rows = [
        [
            *(str(own.computed), own.winner.name),
            *(_cell(own, name) for name in (PLAN, *SHOWN)),
            number(own.db(PLAN, "floor_"), 1),
            f"{own.figures['speedup']:.2f}x" if "speedup" in own.figures else "-",
            own.plan.schedule,
        ]
        for own in planned
    ]
    chosen = [f"{own.computed} computed: {own.chosen}" for own in planned if own.chosen]
    table = aligned([*columns, "noise floor", "speed-up", "schedule"], rows)
    return "\n".join([table, *chosen])


def _cell(own: Planned, policy: str) -> str:
    mean, worst = own.db(policy), own.db(policy, "worst_")
    return "-" if mean is None or worst is None else f"{mean:.1f} ({worst:.1f})"


def _prefix(policy: str) -> str:
    """What a policy's figures begin with; the plan's are its own."""
    name = policy.replace(", ", "_").replace(" ", "_").replace("-", "_")
    return "" if policy == PLAN else f"{name}_"
