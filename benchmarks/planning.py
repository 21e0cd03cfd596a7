"""What a verified run says about plans and their rivals, as the tables of docs/planning.md.

    calibrate record --model MODEL --steps 50 --dtype float32 --num-prompts 20 --prompts A --gram --out runs/x
    calibrate fit runs/x
    calibrate plan runs/x --computed 35,25,19,15,12,9,7 --prompts B --num-prompts 20
    calibrate verify runs/x --budgets 35,25,19,15,12,9,7 --prompts C --num-prompts 20
    python -m benchmarks.planning runs/x --name tiny-x

``--prompts`` A, B and C are different files: what is recorded, what plans are chosen by, and what all are judged by.
Every difference is paired by prompt; intervals are of the mean, 95 %.
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pandas as pd

from benchmarks.common import RESULTS, surroundings

ORDER = (
    "plan",
    "uniform skipping",
    "uniform skipping, linear forecast",
    "uniform skipping, linear outputs",
    "uniform skipping, quadratic outputs",
    "uniform skipping, fitted outputs",
    "MagCache's rule",
    "fitted gate",
    "fitted gate of the change, linear forecast",
    "fitted gate, linear forecast",
    "FirstBlockCache",
    "MagCache (diffusers)",
    "SeaCache",
    "fewer steps",
    "fewer steps, second-order solver",
)
NO_CACHE = ("plan", "fewer steps", "fewer steps, second-order solver")
NEAR = 1.5  # steps that a gate may be off its budget and still be compared there


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="Of the result file; without RUN it is shown again.")
def main(run: str | None, name: str) -> None:
    path = RESULTS / f"planning-{name}.json"
    if run is not None:
        path.write_text(
            json.dumps({"surroundings": surroundings(), **figures(run)}, indent=1) + "\n"
        )
        click.echo(f"{path}\n", err=True)
    click.echo(markdown(json.loads(path.read_text())))


def figures(run: str) -> dict:
    """All figures of a run, by budget."""
    from calibrate.planning.results import fidelity
    from calibrate.verifying.comparison import main_measure, mean_interval
    from calibrate.verifying.lineup import PLAN
    from calibrate.verifying.results import load_verification

    verification = load_verification(run)
    if verification is None:
        raise click.UsageError(f"{run}: not verified yet; run `calibrate verify {run}` first")
    results = verification.results
    measure = main_measure(results)
    plans = {
        (row["steps"], row["computed"]): row
        for row in json.loads((Path(run) / "plan.json").read_text())
    }
    num_steps = int(results["num_steps"].iloc[0])
    budgets = []
    for budget, rows in sorted(results.groupby("budget"), reverse=True):
        table = fidelity(rows, measure)
        computed = rows.groupby("policy")["computed_steps"].mean()
        planned = plans.get((num_steps, int(budget)))
        one = {
            "computed": int(budget),
            "winner": planned and planned["winner"]["name"],
            "schedule": planned and planned["winner"]["schedule"],
            "policies": {
                policy: {
                    "mean": float(values.mean()),
                    "worst": float(values.min()),
                    "computed_steps": float(computed[policy]),
                    "prompts": int(values.notna().sum()),
                }
                for policy, values in table.items()
            },
        }
        if PLAN in table:
            one["plan_minus"] = {
                policy: dict(
                    zip(
                        ("mean", "low", "high"),
                        _interval(table[PLAN] - values, mean_interval),
                        strict=True,
                    )
                )
                for policy, values in table.items()
                if policy != PLAN
            }
            one["worst_prompt_against_uniform"] = float(
                table[PLAN].min() - table["uniform skipping"].min()
            )
        budgets.append(one)
    return {
        "model": verification.facts["model"],
        "class": verification.facts["transformer_class"],
        "steps": num_steps,
        "measure": measure,
        "refused": verification.facts["refused"],
        "budgets": budgets,
    }


def _interval(difference: pd.Series, mean_interval) -> tuple[float, float, float]:
    return mean_interval(difference.dropna().to_numpy(np.float64))


def markdown(found: dict) -> str:
    """One table: every policy at every budget, and the plan against its rivals."""
    budgets = found["budgets"]

    def row(name: str, cell: Callable[[dict], str]) -> str:
        return f"| {name} | {' | '.join(map(cell, budgets))} |"

    present = {policy for one in budgets for policy in one["policies"]}
    lines = [
        row(f"computed of {found['steps']}", lambda one: str(one["computed"])),
        "|---" * (len(budgets) + 1) + "|",
    ]
    for policy in (name for name in ORDER if name in present):
        shown = f"**{policy}**" if policy == "plan" else policy
        lines.append(
            row(shown, lambda one, p=policy: _cell(one["policies"].get(p), one["computed"]))
        )
    if "plan" in present:
        for rival in ("uniform skipping", "fewer steps"):
            lines.append(
                row(f"plan minus {rival}", lambda one, r=rival: _difference(one["plan_minus"][r]))
            )
        lines.append(
            row(
                "plan minus the best other cache",
                lambda one: _difference(one["plan_minus"][_best(one)]),
            )
        )
        lines.append(row("which is", lambda one: _best(one).removeprefix("uniform skipping, ")))
        lines.append(
            row("the plan's forecast", lambda one: one["winner"].removeprefix("planned, "))
        )
    return "\n".join(lines)


def _best(one: dict) -> str:
    """The best other cache at a budget, of those that compute about as many steps."""
    near = {
        policy: figures["mean"]
        for policy, figures in one["policies"].items()
        if policy not in NO_CACHE and abs(figures["computed_steps"] - one["computed"]) <= NEAR
    }
    return max(near, key=near.get)


def _difference(figures: dict) -> str:
    return "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**figures)


def _cell(figures: dict | None, computed: int) -> str:
    if figures is None:
        return "-"
    text = f"{figures['mean']:.1f} ({figures['worst']:.1f})"
    return (
        f"{text} at {figures['computed_steps']:.1f}"
        if abs(figures["computed_steps"] - computed) > 0.05
        else text
    )


if __name__ == "__main__":
    main()
