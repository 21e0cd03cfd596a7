"""One line of advice from a verification: what to use, at which speed, how good, how sure; and how to use it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from calibrate.fitting.statistics import ENOUGH_PROMPTS
from calibrate.trials.baselines import uniform
from calibrate.trials.measures import main_measure
from calibrate.trials.setting import FEWER_STEPS, FORECASTS, GATE, PLAN, plans_of
from calibrate.verifying.comparison import Comparison, judge, summarize
from coeffs import Entry, Plan
from coeffs.engines import export_entry
from coeffs.errors import CoeffsError

PROMPTS_TO_RUN = 10
# The operating point: about twofold speed, which TeaCache's authors and most engines recommend.
SHARE_COMPUTED = 0.5
# What one line of code deploys, the simplest first: on equal figures it is preferred.
DEPLOYABLE = (FEWER_STEPS, *FORECASTS, PLAN, GATE)
GATE_ENGINES = ("vllm-omni", "sglang", "tensorrt-llm", "lightx2v", "comfyui-teacache")
HOW_SURE = {
    "better": "Significantly better than",
    "worse": "Significantly better than",
    "equal": "As good as, within 1 dB,",
    "undecided": "Not significantly better than",
}


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
    table, measure = summarize(results), main_measure(results)
    known = table["policy"].isin(DEPLOYABLE) & (table["broken"] == 0)
    usable = table[known & (table["speedup"] > 1)]
    if usable.empty:
        use = "Use none of these policies: each is slower than no cache or breaks."
        return Advice(None, 0, {}, use, "")
    # The budget with most policies that is nearest to the operating point.
    wanted = SHARE_COMPUTED * usable["num_steps"].iloc[0]
    budget = int(min(usable["budget"].mode(), key=lambda budget: abs(budget - wanted)))
    rows = {
        row["policy"]: row for row in usable.to_dict("records") if row["budget"] == budget
    }
    base, *others = [policy for policy in DEPLOYABLE if policy in rows]
    compared = {
        policy: one
        for policy in others
        for one in judge(results, policy)
        if (one.baseline, one.budget) == (base, budget)
    }
    gains = {
        policy: rows[policy][measure] - rows[base][measure] for policy in (base, *others)
    }
    gains |= {policy: one.difference for policy, one in compared.items()}
    # Of equal ones the simplest.
    best, *rest = sorted(gains, key=lambda policy: -gains[policy])
    row = rows[best]
    unit = "dB" if measure == "psnr_db" else "dB SNR"
    worth = f"{row['speedup']:.2f}x, {row[measure]:.1f} {unit}, worst {row['worst']:.1f}"
    certainty = "It was compared with nothing else at these steps."
    if rest:
        cache, rival, sign = (rest[0], rest[0], -1) if best == base else (best, base, 1)
        certainty = _certainty(rows[rival], measure, compared.get(cache), sign)
    needed = 0 if row["prompts"] >= ENOUGH_PROMPTS else PROMPTS_TO_RUN
    return Advice(best, budget, row, f"Use {_name(row)}: {worth}.", certainty, needed)


def python_lines(advice: Advice, entry: Entry, path: str | Path) -> str:
    """How the advice is followed in Python, with the entry at ``path``; empty where its plan is gone from there."""
    apply = "from runtime import apply_tea_cache\n\n"
    if advice.policy == FEWER_STEPS:
        return f"pipe(prompt, num_inference_steps={advice.budget})"
    if advice.policy == GATE:
        threshold = advice.figures["threshold"]
        return f'{apply}apply_tea_cache(pipe, "{path}", threshold={threshold:.6g})'
    plan = _plan(advice, entry)
    if plan is None:
        return ""
    if advice.policy == PLAN:
        used = f"schedule=entry.plans[{(entry.plans or ()).index(plan)}]"
        return f'import coeffs\n{apply}entry = coeffs.load("{path}")\napply_tea_cache(pipe, entry, {used})'
    options = {"schedule": plan.schedule, **FORECASTS[advice.policy or ""]}
    stated = ", ".join(f'{name}="{value}"' for name, value in options.items())
    return f"{apply}apply_tea_cache(pipe, {stated})"


def export_line(advice: Advice, entry: Entry, path: str | Path) -> str:
    """The command that exports what is advised, for the first engine that takes it; empty where none does."""
    command = f"calibrate export {path} --to"
    plan = _plan(advice, entry)
    if plan is not None:
        line = f"{command} cache-dit-mask --schedule {plan.schedule}"
        if plan.forecast in (None, "reuse"):
            return line
        return f"# The engine forecasts differently, or reuses: other figures than above.\n{line}"
    if advice.policy == GATE:
        threshold = advice.figures["threshold"]
        for engine in GATE_ENGINES:
            with suppress(CoeffsError):
                export_entry(entry, engine, threshold=threshold)
                return f"{command} {engine} --threshold {threshold:g}"
    return ""


def _certainty(rival: dict, measure: str, compared: Comparison | None, sign: int) -> str:
    """How sure it is that the advice is better than the rival, which is a row of the summary.

    ``compared`` is a cache against the base; ``sign`` is 1 where the advice is the cache, -1 where it is the base.
    """
    name, prompts = f"{_name(rival)} ({rival[measure]:.1f} dB)", rival["prompts"]
    if prompts < ENOUGH_PROMPTS:
        return f"Too few prompts ({prompts}) to tell it from {name}: run {PROMPTS_TO_RUN} prompts."
    if compared is None:
        return f"Not compared with {name} at equal steps."
    low, high = sorted((sign * compared.low, sign * compared.high))
    interval = (
        f"{sign * compared.difference:+.1f} dB, 95 % interval {low:+.1f} to {high:+.1f}"
    )
    return f"{HOW_SURE[compared.outcome]} {name}: {interval}, {prompts} prompts."


def _name(row: dict) -> str:
    """A policy at its budget, within a sentence."""
    steps = f"{row['computed_steps']:.3g} of {row['num_steps']} steps"
    if row["policy"] == FEWER_STEPS:
        return f"{row['budget']} plain steps without a cache"
    if row["policy"] == GATE:
        return f"the fitted gate at threshold {row['threshold']:.4g} ({steps})"
    return f"{'the plan' if row['policy'] == PLAN else row['policy']} at {steps}"


def _plan(advice: Advice, entry: Entry) -> Plan | None:
    """The plan that was run: the entry's, or a uniform one; None for other policies, or where it is gone."""
    num_steps = advice.figures.get("num_steps", 0)
    if advice.policy in FORECASTS:
        schedule = uniform(num_steps, advice.budget)
        return Plan(schedule=schedule, **FORECASTS[advice.policy])
    own = plans_of(entry, num_steps) if advice.policy == PLAN else []
    return next((plan for plan in own if plan.computed_steps == advice.budget), None)
