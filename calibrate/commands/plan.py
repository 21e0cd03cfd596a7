"""The command that plans: ``plan`` finds the schedule and forecast of a budget from a run, and proves them."""

from typing import Any

import click
from click import option

from calibrate.commands.announce import leave_to_rank_0, tell, tell_next, tell_plan
from calibrate.commands.options import FOLDER, POSITIVE, WHOLE_NUMBERS, rerunning_options


@click.command()
@click.argument("run", metavar="RUN", type=FOLDER)
@option(
    "--computed", type=WHOLE_NUMBERS, metavar="N,N,...", help="Numbers of computed steps."
)
@option("--speedup", type=float, help="Of the denoiser, instead of --computed.")
@option(
    "--steps",
    type=click.IntRange(min=3),
    help="Plan for this many steps instead of the recorded number.",
)
@option(
    "--no-runs",
    is_flag=True,
    help="Only from the log; nothing is run, nothing goes into the entry.",
)
@option(
    "--candidates",
    type=POSITIVE,
    help="Planned schedules to fit, beside the uniform one [default: all up to a quarter of the steps, 3 at half].",
)
@option(
    "--anchors",
    type=POSITIVE,
    help="Most predictions that a skipped step is made of, where memory counts [default: all].",
)
@option("--choosing", type=POSITIVE, default=12, help="Prompts to choose by.")
@option("--num-prompts", type=POSITIVE, default=8, help="Others to judge by.")
@rerunning_options
def plan(run: str, no_runs: bool, **options: Any) -> None:
    """Find the best schedule for a number of computed steps, fit its forecasts, and prove them on real runs.

    The recorded prompts are run under each schedule, which fits its weights on the way.

    Writes the plans into the run's entry.yaml. Interrupted, the same command continues.

    \b
    Example:
        calibrate plan runs/flux1-dev-1a2b3c4d --computed 12,15,19,25
        calibrate plan runs/flux1-dev-1a2b3c4d --speedup 2.0 --no-runs
    """
    if leave_to_rank_0("plan"):
        return
    from calibrate.planning.plan import plan as make_plans
    from calibrate.planning.results import fewer_steps_verdict, plan_table

    prompts = (
        f"{options['choosing']} to choose by, {options['num_prompts']} others to judge by"
    )
    tell_plan(
        "plan: which steps to compute, and how to forecast the others",
        run,
        prompts="no run of the model" if no_runs else prompts,
    )
    planned = make_plans(run, runs=not no_runs, say=tell, **options)
    verdict = fewer_steps_verdict(planned)
    if verdict:
        click.echo(f"{verdict}\n")
    click.echo(plan_table(planned))
    if not no_runs:
        click.echo(f"plans: {run}/entry.yaml")
    tell_next(f"calibrate verify {run}")


COMMANDS = [plan]
