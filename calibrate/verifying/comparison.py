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
    p_wilcoxon,
    share_interval,
)
from calibrate.trials.measures import MEASURES, Measure, capped, main_measure, measured
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM

SLACK = 0.5  # steps that a gate may lie outside the range of the baseline's budgets
SIGNIFICANT = 0.05
LOW_QUANTILE = 0.1
LOST_DB = 3.0  # twice the error power: a loss that is seen
UNIT = ["prompt_id", "seed"]
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
        wilcoxon: p of the signed-rank test, uncorrected.
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
    wilcoxon: float

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
        means = f"{self.value:.1f} against {self.baseline_value:.1f} dB, {self.difference:+.1f}"
        if not np.isfinite(self.low):
            return means
        return f"{means}, 95 % interval {self.low:+.1f} to {self.high:+.1f}"


def compare(results: pd.DataFrame, policy: str, baseline: str) -> list[Comparison]:
    """One comparison per budget of the policy; runs outside the baseline's range of steps are left out."""
    return _corrected(_compare(results, policy, baseline))


def judge(results: pd.DataFrame, policy: str) -> list[Comparison]:
    """The policy against every other one, as one family of tests; nothing where it did not run."""
    others = [name for name in results["policy"].unique() if name != policy]
    return _corrected([one for other in others for one in _compare(results, policy, other)])


def judge_plan(results: pd.DataFrame) -> list[Comparison]:
    """The plan against every other policy; nothing where no plan took part."""
    return judge(results, PLAN)


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for every baseline: at which budgets the policy is better, as good or worse, with figures."""
    baselines = dict.fromkeys(one.baseline for one in comparisons)
    return [_sentence([one for one in comparisons if one.baseline == name]) for name in baselines]


def headline(comparisons: Sequence[Comparison]) -> str:
    """The sentence that decides: against uniform skipping, or the first baseline there is."""
    if not comparisons:
        return "Nothing to compare with: no baseline ran at these computed steps."
    text = _sentence(deciding(comparisons))
    return f"{text[0].upper()}{text[1:]}."


def deciding(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with uniform skipping, or with the first baseline there is."""
    baselines = [one.baseline for one in comparisons]
    baseline = UNIFORM if UNIFORM in baselines else baselines[0]
    return [one for one in comparisons if one.baseline == baseline]


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and budget: computed steps, speed-up, every measure with its interval, the bad prompts.

    ``speedup`` is the mean over runs of uncached over cached seconds of the whole pipeline call; ``low`` the lowest
    tenth of the main measure; ``lost`` the share of prompts that lose more than 3 dB against plain fewer steps (or
    uniform skipping where those did not run) at equal steps; ``<measure>_of_mean`` the dB of the mean error.
    """
    main = MEASURES[main_measure(results)]
    rows = []
    for (policy, budget), group in results.groupby(["policy", "budget"], sort=False):
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
            "measure": main.name,
            "at_floor": bool(group.get("at_floor", pd.Series([False])).all()),
        }
        row |= _low_end(group, main)
        row |= _lost(results, str(policy), int(budget))
        for measure in measured(group):
            of_prompt = _by_prompt(group, measure)
            mean, low, high = mean_interval(of_prompt)
            name = measure.name
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            if measure.unit == "dB":
                row[f"{name}_of_mean"] = float(-10 * np.log10(np.mean(10 ** (-of_prompt / 10))))
        rows.append(row)
    return pd.DataFrame(rows)


def _compare(results: pd.DataFrame, policy: str, baseline: str) -> list[Comparison]:
    paired = _paired(results, policy, baseline)
    comparisons = []
    for budget, group in paired.groupby("budget"):
        means = group.groupby("prompt_id")[["difference", "value", "baseline_value"]].mean()
        differences = means["difference"].to_numpy()
        difference, low, high = mean_interval(differences)
        comparison = Comparison(
            policy=policy,
            baseline=baseline,
            budget=int(budget),
            num_steps=int(results["num_steps"].iloc[0]),
            computed_steps=float(group["computed_steps"].mean()),
            value=float(means["value"].mean()),
            baseline_value=float(means["baseline_value"].mean()),
            difference=difference,
            low=low,
            high=high,
            prompts=len(means),
            p=p_different(differences),
            p_equal=p_not_equivalent(differences),
            wilcoxon=p_wilcoxon(differences),
        )
        comparisons.append(comparison)
    return comparisons


def _paired(results: pd.DataFrame, policy: str, baseline: str) -> pd.DataFrame:
    """The policy's runs, each with the baseline's quality on the same prompt at equal computed steps."""
    results = results.assign(value=capped(results, main_measure(results)))
    ours, theirs = (results[results["policy"] == name] for name in (policy, baseline))
    curves = {
        unit: rows.groupby("computed_steps")["value"].mean() for unit, rows in theirs.groupby(UNIT)
    }
    rows = []
    for row in ours[[*UNIT, "budget", "computed_steps", "value"]].to_dict("records"):
        curve = curves.get((row["prompt_id"], row["seed"]))
        if curve is None:
            continue
        steps = row["computed_steps"]
        if curve.index[0] - SLACK <= steps <= curve.index[-1] + SLACK:
            there = float(np.interp(steps, curve.index, curve))
            rows.append({**row, "baseline_value": there, "difference": row["value"] - there})
    columns = [*UNIT, "budget", "computed_steps", "value", "baseline_value", "difference"]
    return pd.DataFrame(rows, columns=columns)


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    different = holm([one.p for one in comparisons])
    equal = holm([one.p_equal for one in comparisons])
    corrected = zip(comparisons, different.tolist(), equal.tolist(), strict=True)
    return [replace(one, p=p, p_equal=p_equal) for one, p, p_equal in corrected]


def _sentence(comparisons: list[Comparison]) -> str:
    """A policy against one baseline over all budgets, grouped by outcome, the most computed steps first."""
    first = comparisons[0]
    ordered = sorted(comparisons, key=lambda one: -one.computed_steps)
    parts = []
    for outcome, words in WORDS.items():
        if outcome == "unknown":
            words = f"too few prompts for a verdict ({first.prompts}; at least {ENOUGH_PROMPTS})"
        places = [
            f"{one.computed_steps:.3g} of {one.num_steps} steps ({one.figures})"
            for one in ordered
            if one.outcome == outcome
        ]
        if places:
            parts.append(f"{words} at {', '.join(places)}")
    policy, baseline = _named(first.policy), _named(first.baseline)
    return f"{policy} against {baseline}: {'; '.join(parts)}"


def _named(policy: str) -> str:
    """The policy within a sentence."""
    return f"the {policy}" if policy.startswith((PLAN, GATE)) else policy


def _by_prompt(group: pd.DataFrame, measure: Measure) -> np.ndarray:
    """Means over the seeds of each prompt."""
    return capped(group, measure.name).groupby(group["prompt_id"]).mean().dropna().to_numpy()


def _low_end(group: pd.DataFrame, main: Measure) -> dict[str, float | str]:
    """The lowest tenth and the worst of all runs; a broken sample is below any limit."""
    values = capped(group, main.name).where(~group["broken"].astype(bool), -np.inf).dropna()
    if values.empty:
        return {"low": float("nan"), "worst": float("nan"), "worst_prompt": ""}
    return {
        "low": float(np.quantile(values, LOW_QUANTILE, method="inverted_cdf")),
        "worst": float(values.min()),
        "worst_prompt": group.loc[values.idxmin(), "prompt"],
    }


def _lost(results: pd.DataFrame, policy: str, budget: int) -> dict[str, float]:
    """The share of prompts that lose more than ``LOST_DB`` against the plainest other policy, with its interval."""
    present = set(results["policy"]) - {policy}
    baseline = next((name for name in (FEWER_STEPS, UNIFORM) if name in present), None)
    share = (float("nan"),) * 3
    if baseline is not None:
        paired = _paired(results, policy, baseline)
        differences = paired[paired["budget"] == budget].groupby("prompt_id")["difference"].mean()
        if len(differences):
            share = share_interval(int((differences < -LOST_DB).sum()), len(differences))
    return dict(zip(("lost", "lost_low", "lost_high"), share, strict=True))
