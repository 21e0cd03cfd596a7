"""What a verification says: summaries over prompts, and paired comparisons at equal work, budget by budget.

The unit is the prompt, with all its seeds. Policies are compared on the same prompts: per prompt the baseline's
quality is interpolated to the number of steps that the policy really computed there, so that nobody gains by computing
more. A sample with NaN or infinity counts as one in which nothing is left, and as below any limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fitting.statistics import (
    ENOUGH_PROMPTS,
    MARGIN_DB,
    NAN,
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


def judge(results: pd.DataFrame, policy: str) -> list[Comparison]:
    """The policy against every other one at each budget, as one family of tests.

    Runs outside a baseline's range of computed steps are left out; there is nothing where the policy did not run.
    """
    rows: list[dict[str, Any]] = []
    for baseline in results["policy"].unique():
        if baseline == policy:
            continue
        for budget, prompts in _paired(results, policy, baseline).groupby("budget"):
            differences = prompts.pop("difference").to_numpy()
            difference, low, high = mean_interval(differences)
            rows.append({
                "policy": policy, "baseline": baseline, "budget": int(budget),
                "num_steps": int(results["num_steps"].iloc[0]), **prompts.mean().to_dict(),
                "difference": difference, "low": low, "high": high, "prompts": len(prompts),
                "p": p_different(differences), "p_equal": p_not_equivalent(differences),
            })  # fmt: skip
    for name in ("p", "p_equal"):
        corrected = holm([row[name] for row in rows]).tolist()
        rows = [{**row, name: p} for row, p in zip(rows, corrected, strict=True)]
    return [Comparison(**row) for row in rows]


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
    unit, measures = ["policy", "budget"], measured(results)
    main = main_measure(results)
    results = results.assign(
        **{measure.name: capped(results, measure.name) for measure in measures},
        speedup=results["uncached_seconds"] / results["seconds"],
        at_floor=results.get("at_floor", False),
    )
    # A broken sample is below any limit.
    results["quality"] = results[main].mask(results["broken"].astype(bool), -np.inf)
    # Rows without it, of a damaged table, say nothing.
    results = results[results["quality"].notna()]
    runs = results.groupby(unit, sort=False)
    table = runs.agg(
        threshold=("threshold", "first"),
        computed_steps=("computed_steps", "mean"),
        num_steps=("num_steps", "first"),
        prompts=("prompt_id", "nunique"),
        broken=("broken", "sum"),
        speedup=("speedup", "mean"),
        at_floor=("at_floor", "all"),
        low=("quality", partial(np.quantile, q=LOW_QUANTILE, method="inverted_cdf")),
        worst=("quality", "min"),
    )
    table["worst_prompt"] = runs["quality"].idxmin().map(results["prompt"])
    table["measure"] = main
    shares, unknown = _lost(results), (NAN, NAN, NAN)
    table[["lost", "lost_low", "lost_high"]] = [
        shares.get(key, unknown) for key in table.index
    ]
    by_prompt = results.groupby([*unit, "prompt_id"])
    for measure in measures:
        name, means = measure.name, by_prompt[measure.name].mean().dropna()
        intervals = [mean_interval(means.get(key, ())) for key in table.index]
        table[[name, f"{name}_low", f"{name}_high"]] = intervals
        if measure.unit == "dB":
            errors = (10 ** (-means / 10)).groupby(level=unit).mean()
            table[f"{name}_of_mean"] = 10 * np.log10(1 / errors)
    return table.reset_index()


def _lost(results: pd.DataFrame) -> dict[tuple[str, int], tuple[float, float, float]]:
    """By policy and budget: the share of prompts that lose more than ``LOST_DB``, with its interval."""
    shares, policies = {}, results["policy"].unique()
    plain = [name for name in (FEWER_STEPS, UNIFORM) if name in policies]
    for policy in policies:
        baseline = next((name for name in plain if name != policy), "")
        differences = _paired(results, policy, baseline)["difference"]
        for budget, lost in (differences < -LOST_DB).groupby("budget"):
            shares[policy, budget] = share_interval(int(lost.sum()), len(lost))
    return shares


def _paired(results: pd.DataFrame, policy: str, baseline: str) -> pd.DataFrame:
    """By budget and prompt: the policy's quality, and the baseline's at equal computed steps."""
    results = results.assign(value=capped(results, main_measure(results)))
    ours, theirs = (results[results["policy"] == name] for name in (policy, baseline))
    curves = theirs.groupby(["prompt_id", "seed", "computed_steps"])["value"].mean()

    def there(run: Any) -> float:
        curve = curves.get((run.prompt_id, run.seed))
        steps = run.computed_steps
        if curve is None or not curve.index[0] - SLACK <= steps <= curve.index[-1] + SLACK:
            return float("nan")
        return float(np.interp(steps, curve.index, curve))

    ours = ours.assign(baseline_value=np.array([*map(there, ours.itertuples())], float))
    ours["difference"] = ours["value"] - ours["baseline_value"]
    columns = ["computed_steps", "value", "baseline_value", "difference"]
    return (
        ours.dropna(subset="baseline_value").groupby(["budget", "prompt_id"])[columns].mean()
    )


def _sentence(comparisons: list[Comparison]) -> str:
    """A policy against one baseline over all budgets, grouped by outcome, the most computed steps first."""
    first, said = comparisons[0], []
    comparisons = sorted(comparisons, key=lambda one: -one.computed_steps)
    for outcome, words in WORDS.items():
        same = [one for one in comparisons if one.outcome == outcome]
        if same and outcome == "unknown":
            fewest = min(one.prompts for one in same)
            words += f" for a verdict ({fewest}; at least {ENOUGH_PROMPTS})"
        places = [
            f"{one.computed_steps:.3g} of {one.num_steps} steps ({one.figures})"
            for one in same
        ]
        if same:
            said.append(f"{words} at {', '.join(places)}")
    return f"{_named(first.policy)} against {_named(first.baseline)}: {'; '.join(said)}"


def _named(policy: str) -> str:
    """The policy within a sentence."""
    return f"the {policy}" if policy.startswith((PLAN, GATE)) else policy
