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
from pathlib import Path

import click
import numpy as np
import pandas as pd

from benchmarks.common import RESULTS, surroundings


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="Of the result file.")
def main(run: str, name: str) -> None:
    found = figures(run)
    click.echo(markdown(found))
    path = RESULTS / f"planning-{name}.json"
    path.write_text(json.dumps({"surroundings": surroundings(), **found}, indent=1) + "\n")
    click.echo(f"\n{path}", err=True)


def figures(run: str) -> dict:
    """All figures of a run, by budget."""
    from calibrate.contest import PLAN
    from calibrate.verdict import main_measure, mean_interval
    from calibrate.verification import load_verification

    verification = load_verification(run)
    if verification is None:
        raise click.UsageError(f"{run}: not verified yet; run `calibrate verify {run}` first")
    results = verification.results
    measure = main_measure(results)
    results = results.assign(
        value=results[measure].fillna(100.0).clip(upper=100.0).where(~results["broken"].astype(bool), 0.0),
        prompt=results["prompt_id"].astype(str) + "-" + results["seed"].astype(str),
    )
    plans = {(row["steps"], row["computed"]): row for row in json.loads((Path(run) / "plan.json").read_text())}
    num_steps = int(results["num_steps"].iloc[0])
    budgets = []
    for budget, rows in sorted(results.groupby("budget"), reverse=True):
        table = rows.pivot_table("value", "prompt", "policy")
        computed = rows.groupby("policy")["computed_steps"].mean()
        planned = plans.get((num_steps, int(budget)))
        one = {
            "computed": int(budget),
            "winner": planned and planned["winner"]["name"],
            "schedule": planned and planned["winner"]["schedule"],
            "yardstick": planned and planned["yardstick"],
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
                policy: dict(zip(("mean", "low", "high"), _interval(table[PLAN] - values, mean_interval), strict=True))
                for policy, values in table.items()
                if policy != PLAN
            }
            one["worst_prompt_against_uniform"] = float(table[PLAN].min() - table["uniform skipping"].min())
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
    """The tables of a run: every policy at every budget, and the plan against its rivals."""
    policies = list(dict.fromkeys(policy for one in found["budgets"] for policy in one["policies"]))
    budgets = found["budgets"]
    lines = [f"| dB, mean (worst) | {' | '.join(str(one['computed']) for one in budgets)} |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    for policy in policies:
        lines.append(f"| {policy} | {' | '.join(_cell(one['policies'].get(policy), one) for one in budgets)} |")
    lines += ["", f"| plan minus | {' | '.join(str(one['computed']) for one in budgets)} |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    for policy in policies:
        cells = [one.get("plan_minus", {}).get(policy) for one in budgets]
        if any(cells):
            texts = [f"{c['mean']:+.1f} ({c['low']:+.1f} to {c['high']:+.1f})" if c else "-" for c in cells]
            lines.append(f"| {policy} | {' | '.join(texts)} |")
    lines += [
        "",
        "| computed | winner | uniform reuse | plan | population | hindsight | floor | % of oracle (strict) |",
    ]
    lines.append("|---" * 8 + "|")
    for one in budgets:
        yard = one["yardstick"]
        if yard:
            names = ("uniform", "plan", "population", "hindsight", "floor")
            keys = ["open_loop_" + n if n != "plan" else "open_loop_error" for n in names]
            values = " | ".join(f"{100 * yard[key]:.2f}" for key in keys)
            oracle = f"{yard['percent_of_oracle']:.0f} ({yard['percent_of_oracle_strict']:.0f})"
            lines.append(f"| {one['computed']} | {one['winner']} | {values} | {oracle} |")
    return "\n".join(lines)


def _cell(figures: dict | None, one: dict) -> str:
    if figures is None:
        return "-"
    text = f"{figures['mean']:.1f} ({figures['worst']:.1f})"
    off = abs(figures["computed_steps"] - one["computed"]) > 0.05
    return f"{text} at {figures['computed_steps']:.1f}" if off else text


if __name__ == "__main__":
    main()
