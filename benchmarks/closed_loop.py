"""Plans against their rivals on prompts that were used for nothing else: the table of docs/planning.md.

    calibrate record --model MODEL --steps 50 --dtype float32 --num-prompts 20 --prompts A --out runs/x
    calibrate fit runs/x
    python -m benchmarks.closed_loop runs/x --choosing-prompts B --prompts C --computed 25,19,15,12,9,7,5

A, B and C are different files: what is recorded, what plans are chosen by, and what all are judged by. It plans what
the run lacks, runs everything that it lacks, and continues where it was stopped. ``--beside`` shows the plans of
another entry of the same model, ``--curve`` how many recorded prompts a fit needs. Differences are paired by prompt;
intervals are of the mean, 95 %.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import click
import pandas as pd
from scipy import stats

import coeffs
from benchmarks.common import RESULTS, surroundings

BESIDE = "plan of the other entry"
CURVE = (3, 5, 10, 20)  # recorded prompts that a fit sees
RIVALS = (
    *(
        "plan",
        "uniform",
        "uniform-linear",
        "uniform-linear-output",
        "uniform-linear-guided",
    ),
    *("uniform-fitted", "fewer-steps", "fewer-steps-2"),
)


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--name", default="closed_loop", show_default=True, help="Of the result file.")
@click.option("--computed", default="25,19,15,12,9,7,5", show_default=True)
@click.option("--model", help="Weights, where the run's are not known by name.")
@click.option("--choosing-prompts", help="What plans are chosen by.")
@click.option("--prompts", help="What all are judged by.")
@click.option("--num-prompts", type=int, default=24, show_default=True)
@click.option(
    "--seed", type=int, default=90000, show_default=True, help="Of the first judged one."
)
@click.option(
    "--policies",
    default="",
    help="Further ones: sea-cache,mag-cache,first-block-cache,magcache.",
)
@click.option("--beside", type=click.Path(exists=True, dir_okay=False), help="Another entry.")
@click.option("--short", is_flag=True, help="Print the table of docs/planning.md.")
@click.option(
    "--curve", type=int, help="Computed steps at which fits on fewer prompts are shown."
)
def main(run: str | None, name: str, short: bool, **options: Any) -> None:
    path = RESULTS / f"{name}.json"
    if run is not None:
        figures = measured(run, **options)
        path.write_text(
            json.dumps({"surroundings": surroundings(), **figures}, indent=1) + "\n"
        )
        click.echo(f"{path}\n", err=True)
    click.echo(markdown(json.loads(path.read_text()), short))


def measured(
    run: str,
    computed: str,
    model: str | None,
    choosing_prompts: str | None,
    prompts: str | None,
    num_prompts: int,
    seed: int,
    policies: str,
    beside: str | None,
    curve: int | None,
) -> dict[str, Any]:
    """Plan, run and compare."""
    from calibrate.planning.plan import plan
    from calibrate.runs.purposes import held_out_prompts
    from calibrate.trials.baselines import uniform
    from calibrate.trials.bench import Bench
    from calibrate.trials.case import open_case
    from calibrate.trials.measures import main_measure
    from calibrate.trials.setting import plan_setting
    from calibrate.verifying.lineup import entered
    from calibrate.verifying.tuning import Lineup

    budgets = [int(part) for part in computed.split(",")]
    known = {p.computed_steps for p in coeffs.load(Path(run) / "entry.yaml").plans or ()}
    missing = [budget for budget in budgets if budget not in known]
    if missing:
        plan(
            run,
            computed=missing,
            model=model,
            prompts=choosing_prompts,
            num_prompts=2,
            say=say,
        )
    case = open_case(run, model=model, registry=None, out=None, dtype=None, device="auto")
    judged = held_out_prompts(case.purposes, case.offered(prompts, seed, ()), num_prompts)
    bench = Bench(case, judged)
    lineup = Lineup(
        entry=case.entry,
        run=case.run,
        num_steps=case.num_steps,
        budgets=budgets,
        bench=bench,
        say=say,
    )
    settings, refused = entered(lineup, [*RIVALS, *filter(None, policies.split(","))])
    for budget in budgets:
        guided = coeffs.Plan(schedule=uniform(case.num_steps, budget), forecast_of="guided")
        settings.append(plan_setting("uniform skipping, reuse guided", guided))
    if beside is not None:
        plans = coeffs.load(beside).plans or ()
        settings += [plan_setting(BESIDE, p) for p in plans if p.computed_steps in budgets]
    if curve is not None:
        settings += fits_on_fewer_prompts(case, curve)
    rows, refused = bench.results(settings, refused)
    return {
        "model": case.entry.model,
        "steps": case.num_steps,
        "dtype": case.identity["dtype"],
        "prompts": len(judged.prompts),
        "floor": bench.floor(),
        "refused": refused,
        "budgets": [of_budget(rows, budget, main_measure(rows)) for budget in budgets],
    }


def fits_on_fewer_prompts(case: Any, computed: int) -> list[Any]:
    """The plan's own schedule, its weights fitted on the first few recorded prompts."""
    from calibrate.planning.closed_loop import Fits
    from calibrate.trials.setting import plan_setting

    own = next(p for p in case.entry.plans if p.computed_steps == computed)
    fits = Fits.of(case, True, say)
    return [
        plan_setting(
            f"plan's schedule, fitted on {count} prompts",
            fits.fit(own.schedule, count).plan(own.schedule),
        )
        for count in CURVE
        if count <= fits.prompts
    ]


def of_budget(rows: pd.DataFrame, budget: int, measure: str) -> dict[str, Any]:
    """Mean, worst prompt, and the plan's paired gain, policy by policy."""
    from calibrate.planning.results import fidelity
    from calibrate.trials.setting import PLAN

    own = rows[rows["budget"] == budget]
    table = fidelity(own, measure)
    computed = own.groupby("policy")["computed_steps"].mean()
    policies = {}
    for policy, values in table.items():
        policies[policy] = {
            "mean": float(values.mean()),
            "worst": float(values.min()),
            "prompts": values.round(3).tolist(),
            "computed_steps": float(computed[policy]),
            "plan_minus": _interval((table[PLAN] - values).dropna())
            if PLAN in table
            else None,
        }
    return {"computed": budget, "policies": policies}


def _interval(difference: pd.Series) -> list[float]:
    """The mean and its 95 % interval, which fewer than three prompts and equal differences do not have."""
    mean = float(difference.mean())
    if len(difference) < 3 or difference.nunique() == 1:
        return [mean]
    low, high = stats.t.interval(0.95, len(difference) - 1, mean, stats.sem(difference))
    return [mean, float(low), float(high)]


def markdown(result: dict[str, Any], short: bool) -> str:
    """Every policy at every budget and the plan's gain over each, or the short table of docs/planning.md."""
    budgets = result["budgets"]
    floor = "identical" if result["floor"]["identical"] else result["floor"]["worst_psnr_db"]
    title = (
        f"{result['model']}, {result['dtype']}, {result['prompts']} prompts, "
        f"two uncached runs: {floor}"
    )
    head = _row(f"computed of {result['steps']}", [str(one["computed"]) for one in budgets])
    rule = "|---" * (len(budgets) + 1) + "|"
    if short:
        return "\n".join([title, "", head, rule, *_short(budgets)])
    policies = list(dict.fromkeys(policy for one in budgets for policy in one["policies"]))
    cells = {name: [one["policies"].get(name) for one in budgets] for name in policies}
    figures = [_row(name, [_cell(cell) for cell in row]) for name, row in cells.items()]
    gains = [
        _row(f"plan minus {name}", [_gain(cell) for cell in row])
        for name, row in cells.items()
        if name != "plan"
    ]
    return "\n".join([title, "", head, rule, *figures, "", head, rule, *gains])


def _short(budgets: Sequence[dict[str, Any]]) -> list[str]:
    """The plan, the other entry's, and of all rivals the best mean and the best worst prompt."""
    plans, others, rivals, safest = [], [], [], []
    for budget in budgets:
        policies = dict(budget["policies"])
        plans.append(policies.pop("plan", None))
        others.append(policies.pop(BESIDE, None))
        candidates = {k: v for k, v in policies.items() if not k.startswith("plan's")}
        rivals.append(max(candidates.items(), key=lambda item: item[1]["mean"]))
        safest.append(max(candidates.items(), key=lambda item: item[1]["worst"]))
    named = list(dict.fromkeys(name for name, _ in rivals + safest))

    def lettered(best: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        return [f"{_cell(cell)} {ascii_lowercase[named.index(name)]}" for name, cell in best]

    legend = ", ".join(
        f"{letter} {name}" for letter, name in zip(ascii_lowercase, named, strict=False)
    )
    return [
        _row("**plan**", [f"**{_cell(cell)}**" for cell in plans]),
        _row("the planner before", [_cell(cell) for cell in others]),
        _row("best mean of a rival", lettered(rivals)),
        _row("best worst prompt of one", lettered(safest)),
        _row("plan minus the planner before", [_gain(cell) for cell in others]),
        _row("plan minus the rival of best mean", [_gain(cell) for _, cell in rivals]),
        "",
        f"Rivals: {legend}.",
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(figures: dict[str, Any] | None) -> str:
    return "-" if figures is None else "{mean:.1f} ({worst:.1f})".format(**figures)


def _gain(figures: dict[str, Any] | None) -> str:
    if figures is None or figures["plan_minus"] is None:
        return "-"
    mean, *bounds = figures["plan_minus"]
    return f"{mean:+.1f}" + (" ({:+.1f} to {:+.1f})".format(*bounds) if bounds else "")


def say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
