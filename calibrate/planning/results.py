"""What planning found for each budget: its figures, in the entry, in ``plan.json`` and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

import coeffs
from calibrate.planning.candidates import BASELINES, UNIFORM, Candidate
from calibrate.runs.entry_file import PLAN_WARNING
from calibrate.runs.folder import write_atomically
from calibrate.runs.gram_log import GramLog
from calibrate.text import aligned
from calibrate.trials.measures import capped, main_measure
from calibrate.trials.setting import FEWER_STEPS, PLAN
from calibrate.verifying.comparison import mean_interval


@dataclass(frozen=True)
class Planned:
    """What planning found for one budget.

    Attributes:
        candidates: Everything that entered, baselines first.
        winner: The candidate that was chosen; without runs the one with the least open-loop error.
        figures: Of the winner on judged prompts, and of the baselines beside it; empty without runs.
    """

    computed: int
    candidates: list[Candidate]
    winner: Candidate
    figures: dict[str, float | None] = field(default_factory=dict)


def fidelity(rows: pd.DataFrame, main: str) -> pd.DataFrame:
    """The main measure by prompt (rows) and policy (columns); a broken sample counts 0."""
    values = capped(rows, main).where(~rows["broken"].astype(bool), 0.0)
    keys = rows["prompt_id"].astype(str) + "-" + rows["seed"].astype(str)
    return rows.assign(value=values, key=keys).pivot_table("value", "key", "policy")


def score(values: pd.Series) -> float:
    """What candidates are chosen by: halfway between the mean and the worst prompt."""
    return float((values.mean() + values.min()) / 2)


def judged_figures(rows: pd.DataFrame) -> dict[str, float | None]:
    """Means and worst prompts of the plan, the baselines' beside them, and the paired gain over uniform reuse."""
    main = main_measure(rows)
    table = fidelity(rows, main)
    ours = table[PLAN].dropna()
    own = rows[rows["policy"] == PLAN]
    figures: dict[str, float | None] = {
        "prompts": len(ours),
        main: ours.mean(),
        f"worst_{main}": ours.min(),
        "speedup": float((own["uncached_seconds"] / own["seconds"]).mean()),
    }
    for measure in ("ssim", "latent_rel_l2"):
        if measure in own and own[measure].notna().any():
            figures[measure] = float(own[measure].mean())
    for name in (*BASELINES, FEWER_STEPS):
        if name in table:
            key = name.replace(", ", "_").replace(" ", "_")
            figures[f"{key}_{main}"] = table[name].mean()
            figures[f"{key}_worst_{main}"] = table[name].min()
    gain = mean_interval((table[PLAN] - table[UNIFORM]).dropna().to_numpy())
    figures |= dict(zip(("gain_db", "gain_low_db", "gain_high_db"), gain, strict=True))
    return {
        name: None if value is None or not np.isfinite(value) else float(value)
        for name, value in figures.items()
    }


def planned_entry(
    entry: coeffs.Entry, logs: Sequence[GramLog], planned: Sequence[Planned]
) -> coeffs.Entry:
    """The entry with these plans in place of earlier ones for the same steps, and a word where fewer steps wins."""
    new = [p.winner.as_plan(logs, p.figures) for p in planned]
    replaced = {(len(plan.schedule), plan.computed_steps) for plan in new}
    kept = [p for p in entry.plans or () if (len(p.schedule), p.computed_steps) not in replaced]
    plans = sorted([*kept, *new], key=lambda plan: (len(plan.schedule), -plan.computed_steps))
    warnings = [text for text in entry.warnings if not text.startswith(PLAN_WARNING)]
    verdict = fewer_steps_verdict(planned)
    return replace(
        entry,
        plans=tuple(plans),
        warnings=(*warnings, *([PLAN_WARNING + verdict] if verdict else [])),
    )


def fewer_steps_verdict(planned: Sequence[Planned]) -> str | None:
    """Where fewer steps is better than the plan, in words; ``None`` where it never is."""
    lost = []
    for one in planned:
        main = next((name for name in ("psnr_db", "snr_db") if name in one.figures), None)
        ours, other = one.figures.get(main), one.figures.get(f"fewer_steps_{main}")
        if ours is not None and other is not None and other > ours:
            lost.append(f"{one.computed} ({other:.1f} against {ours:.1f} dB)")
    return (
        f"fewer steps without a cache is better at {', '.join(lost)} computed steps"
        if lost
        else None
    )


def keep(folder: Path, planned: Sequence[Planned], tried: pd.DataFrame) -> None:
    """``plan.json``: every budget with its candidates and what they gave; other budgets are kept."""
    file, own = folder / "plan.json", {(len(one.winner.schedule), one.computed) for one in planned}
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = [row for row in earlier if (row["steps"], row["computed"]) not in own]
    for one in planned:
        of = tried[tried["budget"] == one.computed]
        table = fidelity(of, main_measure(of))
        rows.append({
            "steps": len(one.winner.schedule),
            "computed": one.computed,
            "winner": asdict(one.winner),
            "figures": one.figures,
            "candidates": [
                {name: getattr(c, name) for name in ("name", "schedule", "signed", "additive")}
                | {"score": score(table[c.name].dropna()), "prompts": int(table[c.name].count())}
                for c in one.candidates
                if c.name in table
            ],
        })  # fmt: skip
    rows.sort(key=lambda row: (row["steps"], -row["computed"]))
    write_atomically(file, (json.dumps(rows, indent=2, default=float) + "\n").encode())


def plan_table(planned: Sequence[Planned]) -> str:
    """The table of the command."""
    rows = []
    for one in planned:
        figures, winner = one.figures, one.winner
        main = next((name for name in ("psnr_db", "snr_db") if name in figures), "psnr_db")

        def cell(prefix: str, figures: dict = figures, main: str = main) -> str:
            value, worst = figures.get(f"{prefix}{main}"), figures.get(f"{prefix}worst_{main}")
            return "-" if value is None else f"{value:.1f} ({worst:.1f})"

        rows.append([
            str(one.computed), winner.name, cell(""), cell("uniform_reuse_"), cell("uniform_linear_"),
            cell("fewer_steps_"), "-" if not figures else f"{figures['speedup']:.2f}x",
            f"{100 * winner.signed:.2f} %", winner.schedule,
        ])  # fmt: skip
    header = [
        "computed",
        "winner",
        "dB (worst)",
        "uniform, reuse",
        "uniform, linear",
        "fewer steps",
        "speed-up",
    ]
    return aligned([*header, "signed error", "schedule"], rows)
