"""One model through record, fit, plan and verify, and the tables of every policy at every budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd

import coeffs
from calibrate import fit, plan, record, verify
from calibrate.fitting.statistics import mean_interval
from calibrate.trials.measures import MEASURES, main_measure
from calibrate.trials.setting import FEWER_STEPS

# Steps that a gate may compute more or fewer than the budget and still be compared there.
NEAR = 1.5


@dataclass(frozen=True)
class Study:
    """How much of a model is run; no prompt has two purposes.

    Attributes:
        recorded, choosing, planned, judged: Prompts to fit by, to choose plans by, to judge plans by, to verify by.
    """

    steps: int
    budgets: tuple[int, ...]
    recorded: int
    choosing: int
    planned: int
    judged: int

    @property
    def num_prompts(self) -> int:
        return self.recorded + self.choosing + self.planned + self.judged


def carry_out(
    study: Study,
    folder: Path,
    model: str,
    prompts: Sequence[str],
    call: dict[str, Any],
    policies: Sequence[str],
) -> dict[str, Any]:
    """Record, fit, plan and verify in ``folder``, or go on there; the figures of every policy, budget and prompt.

    Args:
        call: How :func:`calibrate.record` is to run the model.
    """
    planning = study.choosing + study.planned
    record(
        model,
        prompts=prompts[: study.recorded],
        steps=study.steps,
        out=folder,
        gram=True,
        **call,
    )
    # A run remembers how it was called, but not the device, a folder, or the functions of a model of one's own.
    again = {name: call[name] for name in ("device", "generate", "modules") if name in call}
    if "generate" not in call:
        again["model"] = model
    if not (folder / "entry.yaml").exists():
        coeffs.save(fit(folder), folder / "entry.yaml")
    if not coeffs.load(folder / "entry.yaml").plans:
        plan(
            folder,
            computed=study.budgets,
            prompts=prompts[study.recorded : study.recorded + planning],
            choosing=study.choosing,
            num_prompts=study.planned,
            say=_say,
            **again,
        )
    verification = verify(
        folder,
        prompts=prompts[study.recorded + planning : study.num_prompts],
        num_prompts=study.judged,
        budgets=study.budgets,
        policies=policies,
        say=_say,
        **again,
    )
    results = verification.results
    measure = main_measure(results)
    columns = ["policy", "budget", "prompt_id", "computed_steps", measure]
    plans = coeffs.load(folder / "entry.yaml").plans or ()
    return {
        "measure": measure,
        "steps": study.steps,
        "prompts": {
            "recorded": study.recorded,
            "planned by": planning,
            "judged": study.judged,
        },
        "refused": verification.facts["refused"],
        "schedules": {plan.schedule.count("C"): plan.schedule for plan in plans},
        "rows": results[columns].round(4).to_dict("records"),
    }


def _say(text: str) -> None:
    click.echo(text, err=True)


def tables(title: str, figures: dict[str, Any]) -> str:
    """Mean and worst prompt of every policy at every budget; below, the paired difference from fewer steps."""
    rows = pd.DataFrame(figures["rows"])
    policies = [*rows["policy"].unique()]
    rivals = [policy for policy in policies if policy != FEWER_STEPS]
    # Schedules that come as they are, such as cache-dit's masks, have budgets that nothing else has.
    budgets = sorted(rows["budget"].unique(), reverse=True)
    shared = [budget for budget in budgets if len(_at(rows, FEWER_STEPS, budget))]
    title = f"{title}, {figures['prompts']['judged']} prompts"
    label = MEASURES[figures["measure"]].label
    paired = f"minus {FEWER_STEPS}, dB, paired by prompt, with the 95 % interval of the mean"
    return "\n".join([
        f"{title}: {label} in dB, mean (worst prompt)", "",
        *_table(figures["steps"], policies, budgets, level_at(figures)), "",
        f"{title}: {paired}", "",
        *_table(figures["steps"], rivals, shared, difference_at(figures)),
    ])  # fmt: skip


Cell = Callable[[str, int], str]


def _table(
    steps: int, policies: Sequence[str], budgets: Sequence[int], cell: Cell
) -> Iterator[str]:
    yield f"| computed of {steps} | {' | '.join(map(str, budgets))} |"
    yield "|---" * (len(budgets) + 1) + "|"
    for policy in policies:
        yield f"| {policy} | {' | '.join(cell(policy, budget) for budget in budgets)} |"


def level_at(figures: dict[str, Any]) -> Cell:
    """Mean of a policy at a budget, the worst prompt, and its steps where they are not the budget's."""
    rows, measure = _rows_and_measure(figures)

    def cell(policy: str, budget: int) -> str:
        chosen = _at(rows, policy, budget)
        if chosen.empty:
            return ""
        steps = chosen["computed_steps"].mean()
        text = f"{chosen[measure].mean():.1f} ({chosen[measure].min():.1f})"
        return text if abs(steps - budget) < 0.05 else f"{text} at {steps:.1f}"

    return cell


def difference_at(figures: dict[str, Any]) -> Cell:
    """What a policy is better than fewer steps by, paired by prompt; empty where it is far from the budget."""
    rows, measure = _rows_and_measure(figures)

    def cell(policy: str, budget: int) -> str:
        ours, theirs = (_at(rows, name, budget) for name in (policy, FEWER_STEPS))
        if policy == FEWER_STEPS or ours.empty or theirs.empty:
            return ""
        if abs(ours["computed_steps"].mean() - budget) > NEAR:
            return ""
        paired = ours.set_index("prompt_id")[measure] - theirs.set_index("prompt_id")[measure]
        mean, low, high = mean_interval(paired.to_numpy())
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

    return cell


def _rows_and_measure(figures: dict[str, Any]) -> tuple[pd.DataFrame, str]:
    return pd.DataFrame(figures["rows"]), figures["measure"]


def _at(rows: pd.DataFrame, policy: str, budget: int) -> pd.DataFrame:
    return rows[(rows["policy"] == policy) & (rows["budget"] == budget)]
