"""What a verification says: summaries over prompts, and paired comparisons at equal work, budget by budget.

The unit is the prompt, with all its seeds. Policies are compared on the same prompts: per prompt the baseline's
quality is interpolated to the number of steps that the policy really computed there, so that nobody gains by computing
more. A sample with NaN or infinity counts as one in which nothing is left, and as below any limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from calibrate.fitting.statistics import (
    ENOUGH_PROMPTS,
    MARGIN_DB,
    holm,
    mean_interval,
    p_different,
    p_not_equivalent,
    share_interval,
)
from calibrate.trials.measures import capped, main_measure, measured
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM

SLACK = 0.5  # steps that a gate may lie outside the range of the baseline's budgets
SIGNIFICANT = 0.05
LOW_QUANTILE = 0.1
LOST_DB = 3.0  # twice the error power: a loss that is seen
WORDS = {
    "better": "better",
    "worse": "worse",
    "equal": f"as good (within {MARGIN_DB:g} dB)",
    "undecided": "not significantly different",
    "unknown": "too few prompts",
}


@dataclass(frozen=True)
class Comparison:
    """One policy against one baseline at one budget, at equal computed steps.

    Attributes:
        computed_steps: Mean of the policy's runs.
        value, baseline_value: Means of the main measure.
        difference: Mean over prompts of policy minus baseline, in dB; positive favours the policy.
        low, high: 95 % interval of it; NaN with fewer than three prompts.
        p: That there is no difference, corrected for the family of comparisons (Holm).
        p_equal: That the difference is 1 dB or more, corrected likewise.
    """

    policy: str
    baseline: str
    budget: int
    num_steps: int
    computed_steps: float
    value: float
    baseline_value: float
    difference: float
    low: float
    high: float
    prompts: int
    p: float
    p_equal: float

    @property
    def outcome(self) -> str:
        """One of ``WORDS``. A difference that is surely below 1 dB counts as none, significant or not."""
        if self.prompts < ENOUGH_PROMPTS:
            return "unknown"
        if self.p_equal < SIGNIFICANT:
            return "equal"
        if self.p < SIGNIFICANT:
            return "better" if self.difference > 0 else "worse"
        return "undecided"

    @property
    def verdict(self) -> str:
        """The outcome in words: the policy is ..."""
        return WORDS[self.outcome]

    @property
    def figures(self) -> str:
        """Both means, their difference and its interval."""
        means = (
            f"{self.value:.1f} against {self.baseline_value:.1f} dB, {self.difference:+.1f}"
        )
        if not np.isfinite(self.low):
            return means
        return f"{means}, 95 % interval {self.low:+.1f} to {self.high:+.1f}"


def judge(
    results: pd.DataFrame, policy: str, baselines: Sequence[str] | None = None
) -> list[Comparison]:
    """The policy against each baseline (by default every other policy) at each budget, as one family of tests.

    Runs outside a baseline's range of computed steps are left out; there is nothing where the policy did not run.
    """
    if baselines is None:
        baselines = [name for name in results["policy"].unique() if name != policy]
    comparisons = []
    for baseline in baselines:
        for budget, prompts in _paired(results, policy, baseline).groupby("budget"):
            differences = prompts["difference"].to_numpy()
            difference, low, high = mean_interval(differences)
            comparison = Comparison(
                policy=policy,
                baseline=baseline,
                budget=int(budget),
                num_steps=int(results["num_steps"].iloc[0]),
                **prompts.drop(columns="difference").mean().to_dict(),
                difference=difference,
                low=low,
                high=high,
                prompts=len(prompts),
                p=p_different(differences),
                p_equal=p_not_equivalent(differences),
            )
            comparisons.append(comparison)
    different = holm([one.p for one in comparisons]).tolist()
    equal = holm([one.p_equal for one in comparisons]).tolist()
    corrected = zip(comparisons, different, equal, strict=True)
    return [replace(one, p=p, p_equal=p_equal) for one, p, p_equal in corrected]


def judge_plan(results: pd.DataFrame) -> list[Comparison]:
    """The plan against every other policy; nothing where no plan took part."""
    return judge(results, PLAN)


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for every baseline: at which budgets the policy is better, as good or worse, with figures."""
    baselines = dict.fromkeys(one.baseline for one in comparisons)
    return [
        _sentence([one for one in comparisons if one.baseline == name]) for name in baselines
    ]


def headline(comparisons: Sequence[Comparison]) -> str:
    """The sentence that decides: against uniform skipping, or the first baseline there is."""
    if not comparisons:
        return "Nothing to compare with: no baseline ran at these computed steps."
    text = _sentence(deciding(comparisons))
    return f"{text[0].upper()}{text[1:]}."


def deciding(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with uniform skipping, or with the first baseline there is."""
    baselines = [one.baseline for one in comparisons]
    baseline = UNIFORM if UNIFORM in baselines else next(iter(baselines), None)
    return [one for one in comparisons if one.baseline == baseline]


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and budget: computed steps, speed-up, every measure with its interval, the bad prompts.

    ``speedup`` is the mean over runs of uncached over cached seconds of the whole pipeline call; ``low`` the lowest
    tenth of the main measure; ``lost`` the share of prompts that lose more than 3 dB against plain fewer steps (or
    uniform skipping where those did not run) at equal steps; ``<measure>_of_mean`` the dB of the mean error.
    """
    rows = []
    for policy, runs in results.groupby("policy", sort=False):
        others = [name for name in (FEWER_STEPS, UNIFORM) if name in set(results["policy"])]
        plainest = next((name for name in others if name != policy), "")
        paired = _paired(results, str(policy), plainest)
        for budget, group in runs.groupby("budget", sort=False):
            row = {
                "policy": policy,
                "budget": int(budget),
                "threshold": group["threshold"].iloc[0],
                "computed_steps": float(group["computed_steps"].mean()),
                "num_steps": int(group["num_steps"].iloc[0]),
                "prompts": int(group["prompt_id"].nunique()),
                "broken": int(group["broken"].sum()),
                "seconds": float(group["seconds"].mean()),
                "speedup": float((group["uncached_seconds"] / group["seconds"]).mean()),
                "measure": main_measure(results),
                "at_floor": "at_floor" in group and bool(group["at_floor"].all()),
            }
            row |= _low_end(group, row["measure"])
            row |= _lost(paired.query("budget == @budget")["difference"])
            rows.append(row | _measures(group))
    return pd.DataFrame(rows)


def _paired(results: pd.DataFrame, policy: str, baseline: str) -> pd.DataFrame:
    """By budget and prompt: the policy's quality, and the baseline's at equal computed steps."""
    results = results.assign(value=capped(results, main_measure(results)))
    ours, theirs = (results[results["policy"] == name] for name in (policy, baseline))
    unit = ["prompt_id", "seed"]
    curves = {
        key: rows.groupby("computed_steps")["value"].mean()
        for key, rows in theirs.groupby(unit)
    }

    def there(prompt: str, seed: int, steps: float) -> float:
        curve = curves.get((prompt, seed))
        if curve is None or not curve.index[0] - SLACK <= steps <= curve.index[-1] + SLACK:
            return float("nan")
        return float(np.interp(steps, curve.index, curve))

    runs = zip(*(ours[name] for name in (*unit, "computed_steps")), strict=True)
    values = np.array([there(*run) for run in runs], float)
    paired = ours.assign(baseline_value=values, difference=ours["value"] - values)
    columns = ["computed_steps", "value", "baseline_value", "difference"]
    return paired[~np.isnan(values)].groupby(["budget", "prompt_id"])[columns].mean()


def _sentence(comparisons: list[Comparison]) -> str:
    """A policy against one baseline over all budgets, grouped by outcome, the most computed steps first."""
    first = comparisons[0]
    compared = [one.prompts for one in comparisons if one.outcome == "unknown"]
    few = f"too few prompts for a verdict ({min(compared, default=0)}; at least {ENOUGH_PROMPTS})"
    words = {**WORDS, "unknown": few}
    parts: dict[str, list[str]] = {outcome: [] for outcome in words}
    for one in sorted(comparisons, key=lambda one: -one.computed_steps):
        place = f"{one.computed_steps:.3g} of {one.num_steps} steps ({one.figures})"
        parts[one.outcome].append(place)
    said = [f"{words[outcome]} at {', '.join(at)}" for outcome, at in parts.items() if at]
    return f"{_named(first.policy)} against {_named(first.baseline)}: {'; '.join(said)}"


def _named(policy: str) -> str:
    """The policy within a sentence."""
    return f"the {policy}" if policy.startswith((PLAN, GATE)) else policy


def _measures(group: pd.DataFrame) -> dict[str, float]:
    """Each measure's mean over prompts with its interval; of dB also the dB of the mean error."""
    figures: dict[str, float] = {}
    for measure in measured(group):
        name = measure.name
        of_prompt = capped(group, name).groupby(group["prompt_id"]).mean().dropna()
        keys = name, f"{name}_low", f"{name}_high"
        figures |= dict(zip(keys, mean_interval(of_prompt), strict=True))
        if measure.unit == "dB":
            errors = 10 ** (-of_prompt / 10)
            figures[f"{name}_of_mean"] = float(-10 * np.log10(errors.mean()))
    return figures


def _low_end(group: pd.DataFrame, measure: str) -> dict[str, float | str]:
    """The lowest tenth and the worst of all runs; a broken sample is below any limit."""
    values = capped(group, measure).mask(group["broken"].astype(bool), -np.inf).dropna()
    if values.empty:
        return {"low": float("nan"), "worst": float("nan"), "worst_prompt": ""}
    return {
        "low": float(np.quantile(values, LOW_QUANTILE, method="inverted_cdf")),
        "worst": float(values.min()),
        "worst_prompt": group.loc[values.idxmin(), "prompt"],
    }


def _lost(differences: pd.Series) -> dict[str, float]:
    """The share of prompts that lose more than ``LOST_DB``, with its interval; NaN where nothing was compared."""
    share = (float("nan"),) * 3
    if len(differences):
        share = share_interval(int((differences < -LOST_DB).sum()), len(differences))
    return dict(zip(("lost", "lost_low", "lost_high"), share, strict=True))
