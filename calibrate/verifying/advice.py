"""One line of advice from a verification: what to use, at which speed, how good, how sure; and how to use it."""

from __future__ import annotations

from dataclasses import dataclass
from os import fspath
from pathlib import Path

import numpy as np
import pandas as pd

from calibrate.trials.baselines import uniform
from calibrate.trials.measures import main_measure
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM
from calibrate.verifying.comparison import ENOUGH_PROMPTS, Comparison, judge, summarize
from coeffs import Entry, Plan
from coeffs.engines import export_entry
from coeffs.errors import CoeffsError

PROMPTS_TO_RUN = 10
# The operating point: about twofold speed, which TeaCache's authors and most engines recommend.
SHARE_COMPUTED = 0.5
# Uniform schedules with a forecast, and how `apply_tea_cache` is told of it.
FORECASTS = {
    "uniform skipping, linear forecast": ', forecast="linear"',
    "uniform skipping, linear outputs": ', forecast="linear", forecast_of="output"',
    "uniform skipping, linear guided": ', forecast="linear", forecast_of="guided"',
}
# What one line of code deploys, the simplest first: on equal figures it is preferred.
DEPLOYABLE = (FEWER_STEPS, UNIFORM, *FORECASTS, PLAN, GATE)
GATE_ENGINES = ("vllm-omni", "sglang", "tensorrt-llm", "lightx2v", "comfyui-teacache")


@dataclass(frozen=True)
class Advice:
    """What to deploy.

    Attributes:
        policy: One of ``DEPLOYABLE``; None where nothing that was run is worth using.
        budget: Its budget of computed steps.
        figures: Its row of the summary.
        use: The sentence on what to use, and what that gives.
        certainty: The sentence on how sure that is.
        prompts_needed: How many prompts a verdict needs, where there were too few.
    """

    policy: str | None
    budget: int
    figures: dict
    use: str
    certainty: str
    prompts_needed: int = 0

    def __str__(self) -> str:
        return f"{self.use} {self.certainty}".strip()


def advise(results: pd.DataFrame) -> Advice:
    """The best policy at about half of the steps, judged prompt by prompt against fewer steps without a cache."""
    table = summarize(results)
    measure = main_measure(results)
    known = table["policy"].isin(DEPLOYABLE) & (table["broken"] == 0) & table[measure].notna()
    usable = table[known & (table["speedup"] > 1)]
    if usable.empty:
        return Advice(
            None, 0, {}, "Use none of these policies: each is slower than no cache or breaks.", ""
        )
    budget = _operating_point(usable)
    rows = {row["policy"]: row for row in usable[usable["budget"] == budget].to_dict("records")}
    present = [policy for policy in DEPLOYABLE if policy in rows]
    base = present[0]
    compared = {policy: _against(results, policy, base, budget) for policy in present}
    gains = {
        policy: rows[policy][measure] - rows[base][measure] if one is None else one.difference
        for policy, one in compared.items()
    }
    best = max(present, key=lambda policy: gains[policy])  # of equal ones the simplest
    others = [policy for policy in present if policy != best]
    rival = max(others, key=lambda policy: gains[policy], default=None) if best == base else base
    use = f"Use {_name(rows[best])}: {_worth(rows[best], measure)}."
    certainty = "It was compared with nothing else at these steps."
    if rival is not None:
        cache = best if rival == base else rival
        certainty = _certainty(rows[rival], compared[cache], rival == base, measure)
    enough = rows[best]["prompts"] >= ENOUGH_PROMPTS
    return Advice(best, budget, rows[best], use, certainty, 0 if enough else PROMPTS_TO_RUN)


def python_lines(advice: Advice, entry: Entry, path: str | Path) -> str:
    """How the advice is followed in Python, with the entry at ``path``; empty where its plan is gone from there."""
    apply = "from runtime import apply_tea_cache\n\n"
    if advice.policy is None:
        return ""
    if advice.policy == FEWER_STEPS:
        return f"pipe(prompt, num_inference_steps={advice.budget})"
    if advice.policy == GATE:
        threshold = f"{advice.figures['threshold']:.6g}"
        return f'{apply}apply_tea_cache(pipe, "{fspath(path)}", threshold={threshold})'
    if advice.policy == PLAN:
        index, plan = _plan(advice, entry)
        if plan is None:
            return ""
        loaded = f'entry = coeffs.load("{fspath(path)}")\n'
        used = f"apply_tea_cache(pipe, entry, schedule=entry.plans[{index}])"
        return f"import coeffs\n{apply}{loaded}{used}"
    forecast = FORECASTS.get(advice.policy, "")
    return f'{apply}apply_tea_cache(pipe, schedule="{_schedule(advice)}"{forecast})'


def export_line(advice: Advice, entry: Entry, path: str | Path) -> str:
    """The command that exports what is advised, for the first engine that takes it; empty where none does."""
    if advice.policy in (None, FEWER_STEPS):
        return ""
    if advice.policy != GATE:
        schedule, reuses = _schedule(advice), advice.policy == UNIFORM
        if advice.policy == PLAN:
            _, plan = _plan(advice, entry)
            if plan is None:
                return ""
            schedule, reuses = plan.schedule, plan.forecast in (None, "reuse")
        note = "" if reuses else "# The engine reuses instead of forecasting: less than above.\n"
        command = f"calibrate export {fspath(path)} --to cache-dit-mask --schedule {schedule}"
        return note + command
    threshold = float(f"{advice.figures['threshold']:.6g}")
    for engine in GATE_ENGINES:
        try:
            export_entry(entry, engine, threshold=threshold)
        except CoeffsError:
            continue
        return f"calibrate export {fspath(path)} --to {engine} --threshold {threshold:g}"
    return ""


def _operating_point(usable: pd.DataFrame) -> int:
    """The budget with most policies that is nearest to half of the steps."""
    half = SHARE_COMPUTED * usable["num_steps"].iloc[0]
    counts = usable.groupby("budget")["policy"].nunique()
    fullest = counts[counts == counts.max()].index.to_numpy()
    return int(fullest[np.argmin(np.abs(fullest - half))])


def _against(results: pd.DataFrame, policy: str, base: str, budget: int) -> Comparison | None:
    """The policy against the base, corrected for all that it is compared with; None where none is at these steps."""
    compared = judge(results, policy)
    return next((one for one in compared if (one.baseline, one.budget) == (base, budget)), None)


def _certainty(other: dict, compared: Comparison | None, ahead: bool, measure: str) -> str:
    """How sure the advice is; ``compared`` is the cache against the base, and the advice the former where ahead."""
    name = f"{_name(other)} ({other[measure]:.1f} dB)"
    prompts = other["prompts"]
    if prompts < ENOUGH_PROMPTS:
        return f"Too few prompts ({prompts}) to tell it from {name}: run {PROMPTS_TO_RUN} prompts."
    if compared is None:
        return f"Not compared with {name} at equal steps."
    sign = 1 if ahead else -1
    difference, *bounds = (
        sign * value for value in (compared.difference, compared.low, compared.high)
    )
    low, high = sorted(bounds)
    words = {"better": "Significantly better than", "worse": "Significantly better than"}
    words |= {"equal": "As good as, within 1 dB,", "undecided": "Not significantly better than"}
    interval = f"{difference:+.1f} dB, 95 % interval {low:+.1f} to {high:+.1f}, {prompts} prompts"
    return f"{words[compared.outcome]} {name}: {interval}."


def _name(row: dict) -> str:
    """A policy at its budget, within a sentence."""
    steps = f"{row['computed_steps']:.3g} of {row['num_steps']} steps"
    if row["policy"] == FEWER_STEPS:
        return f"{row['budget']} plain steps without a cache"
    if row["policy"] == GATE:
        return f"the fitted gate at threshold {row['threshold']:.4g} ({steps})"
    return f"{'the plan' if row['policy'] == PLAN else row['policy']} at {steps}"


def _worth(row: dict, measure: str) -> str:
    unit = "dB" if measure == "psnr_db" else "dB SNR"
    return f"{row['speedup']:.2f}x, {row[measure]:.1f} {unit}, worst {row['worst']:.1f}"


def _plan(advice: Advice, entry: Entry) -> tuple[int, Plan | None]:
    """The plan of the entry that was run, and its index."""
    size = advice.figures["num_steps"], advice.budget
    for index, plan in enumerate(entry.plans or ()):
        if (len(plan.schedule), plan.computed_steps) == size:
            return index, plan
    return -1, None


def _schedule(advice: Advice) -> str:
    """The uniform schedule of the advice's budget."""
    return uniform(advice.figures["num_steps"], advice.budget)
