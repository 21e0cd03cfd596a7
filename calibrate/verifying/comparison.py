"""What a verification found: summaries with intervals over prompts, paired comparisons at equal work, and the words.

The unit is the prompt, with all its seeds. Policies are compared on the same prompts: per prompt the baseline's
quality is interpolated to the number of steps that the policy really computed there, so that nobody gains by computing
more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from calibrate.fitting.intervals import draw_prompts, student_interval
from calibrate.text import aligned
from calibrate.trials.measures import MEASURES, capped, main_measure, measured
from calibrate.trials.setting import GATE, PLAN, UNIFORM

RESAMPLES = 2000
# Below, intervals over prompts are so wide that hardly any difference between policies shows.
ENOUGH_PROMPTS = 8
SLACK = 0.5  # steps that a gate may lie outside the range of the baseline's budgets
UNIT = ["prompt_id", "seed"]


@dataclass(frozen=True)
class Comparison:
    """One policy against one baseline at equal computed steps.

    Attributes:
        difference: Mean over budgets and prompts of policy minus baseline, in dB; positive favours the policy.
        low, high: 95 % interval of it over prompts; NaN with fewer than three prompts.
        by_budget: Columns budget, computed_steps, difference, low, high, and the means of both: value, baseline_value.
        prompts: How many prompts entered.
    """

    policy: str
    baseline: str
    difference: float
    low: float
    high: float
    prompts: int
    by_budget: pd.DataFrame

    @property
    def outcome(self) -> str:
        """``better``, ``worse``, ``undecided`` (the interval holds 0) or ``unknown`` (too few prompts)."""
        if self.prompts < ENOUGH_PROMPTS or not np.isfinite(self.low):
            return "unknown"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        other = _named(self.baseline)
        if self.outcome == "unknown":
            return (
                f"the {self.policy} differs from {other} by {self.difference:+.1f} dB; "
                f"too few prompts ({self.prompts}) for a verdict"
            )
        words = {
            "better": "is significantly better than",
            "worse": "is significantly worse than",
            "undecided": "is not significantly different from",
        }[self.outcome]
        bounds = f"95 % interval {self.low:+.1f} to {self.high:+.1f}, {self.prompts} prompts"
        return f"the {self.policy} {words} {other} ({self.difference:+.1f} dB, {bounds})"


def _named(policy: str) -> str:
    """The policy within a sentence."""
    return f"the {policy}" if policy.startswith((PLAN, GATE)) else policy


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over prompts with its 95 % interval, by bootstrap over prompts; NaN bounds below three prompts."""
    values = np.asarray(values, float)
    if not len(values):
        return (float("nan"),) * 3
    mean = float(values.mean())
    if len(values) < 3:
        return mean, float("nan"), float("nan")
    resampled = draw_prompts(len(values), RESAMPLES) @ values / len(values)
    low, high = student_interval(mean, resampled, len(values))
    return mean, float(low), float(high)


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and budget: computed steps, speed-up, every measure with its interval, the worst prompt.

    ``speedup`` is the mean over runs of uncached over cached seconds of the whole pipeline call; ``broken`` counts
    samples with NaN or infinity, which no mean holds.
    """
    main, rows = main_measure(results), []
    for (policy, budget), everything in results.groupby(["policy", "budget"], sort=False):
        group = everything[~everything["broken"]]
        row = {
            "policy": policy,
            "budget": int(budget),
            "threshold": everything["threshold"].iloc[0],
            "computed_steps": float(everything["computed_steps"].mean()),
            "num_steps": int(everything["num_steps"].iloc[0]),
            "prompts": int(group["prompt_id"].nunique()),
            "broken": len(everything) - len(group),
            "seconds": float(everything["seconds"].mean()),
            "speedup": float((everything["uncached_seconds"] / everything["seconds"]).mean()),
            "measure": main,
        }
        if len(group):
            values = capped(group, main)
            row |= {
                "worst": float(values.min()),
                "worst_prompt": group.loc[values.idxmin(), "prompt"],
            }
            for name in (measure.name for measure in measured(group)):
                of_prompt = capped(group, name).groupby(group["prompt_id"]).mean()
                mean, low, high = mean_interval(of_prompt.to_numpy())
                row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def compare(results: pd.DataFrame, policy: str, baseline: str) -> Comparison:
    """Paired comparison at the policy's own computed steps; runs outside the baseline's range are left out."""
    results = results[~results["broken"]]
    results = results.assign(value=capped(results, main_measure(results)))
    ours, theirs = (results[results["policy"] == name] for name in (policy, baseline))
    curves = {
        unit: rows.groupby("computed_steps")["value"].mean() for unit, rows in theirs.groupby(UNIT)
    }
    rows = []
    for row in ours.itertuples():
        curve = curves.get((row.prompt_id, row.seed))
        if (
            curve is None
            or not curve.index[0] - SLACK <= row.computed_steps <= curve.index[-1] + SLACK
        ):
            continue
        baseline_value = float(np.interp(row.computed_steps, curve.index, curve))
        rows.append(
            (row.prompt_id, row.seed, row.budget, row.computed_steps, row.value, baseline_value)
        )
    table = pd.DataFrame(
        rows, columns=[*UNIT, "budget", "computed_steps", "value", "baseline_value"]
    )
    table = table.assign(difference=table["value"] - table["baseline_value"])
    by_budget = []
    for budget, group in table.groupby("budget"):
        means = group.groupby("prompt_id")[["difference", "value", "baseline_value"]].mean()
        interval = mean_interval(means["difference"].to_numpy())
        both = float(means["value"].mean()), float(means["baseline_value"].mean())
        by_budget.append((int(budget), float(group["computed_steps"].mean()), *interval, *both))
    overall = mean_interval(table.groupby("prompt_id")["difference"].mean().to_numpy())
    columns = ["budget", "computed_steps", "difference", "low", "high", "value", "baseline_value"]
    return Comparison(
        policy,
        baseline,
        *overall,
        table["prompt_id"].nunique(),
        pd.DataFrame(by_budget, columns=columns),
    )


def judge(results: pd.DataFrame, policy: str) -> list[Comparison]:
    """The policy against every other one of which results exist, in their order."""
    others = [name for name in results["policy"].unique() if name != policy]
    found = [compare(results, policy, other) for other in others]
    return [comparison for comparison in found if comparison.prompts]


def deciding(comparisons: list[Comparison]) -> Comparison:
    """The comparison that decides: with uniform skipping, or the first there is."""
    return next((c for c in comparisons if c.baseline == UNIFORM), comparisons[0])


def headline(comparisons: list[Comparison]) -> str:
    """The finding in words: the deciding comparison, and the policy that is better still."""
    if not comparisons:
        return "Nothing to compare with: no baseline ran at the gate's computed steps."
    first, best = (
        deciding(comparisons),
        min(comparisons, key=lambda comparison: comparison.difference),
    )
    text = str(first)
    if best is not first and best.outcome == "worse":
        gain = f"{-best.difference:+.1f} dB over the {best.policy}"
        text += f"; {_named(best.baseline)} is the best policy found ({gain})"
    return text[0].upper() + text[1:] + "."


def judge_plan(results: pd.DataFrame) -> list[Comparison]:
    """The plan against every other policy; nothing where no plan took part."""
    return judge(results, PLAN) if PLAN in set(results["policy"]) else []


def verdict_table(summary: pd.DataFrame) -> str:
    """The summary as plain text: one row per policy and budget, intervals beside the main measure."""
    main = summary["measure"].iloc[0]
    others = [measure for measure in measured(summary) if measure.name != main]
    columns = ["policy", "threshold", "computed", "speed-up", main, "95 % interval", "worst"]
    rows = []
    for row in summary.to_dict("records"):
        low, high = _text(row.get(f"{main}_low"), ".1f"), _text(row.get(f"{main}_high"), ".1f")
        cells = [
            row["policy"],
            _text(row["threshold"], ".4g"),
            f"{row['computed_steps']:.1f} of {row['num_steps']}",
            f"{row['speedup']:.2f}",
            _text(row.get(main), f".{MEASURES[main].digits}f"),
            "-" if low == "-" else f"{low} to {high}",
            _text(row.get("worst"), f".{MEASURES[main].digits}f"),
        ]
        rows.append([*cells, *(_text(row[m.name], f".{m.digits}f") for m in others)])
    return aligned([*columns, *(measure.label for measure in others)], rows)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else format(value, form)
