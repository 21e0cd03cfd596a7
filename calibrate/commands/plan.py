"""The command that plans: ``plan`` finds the schedule and forecast of a budget from a run, and proves them."""

from typing import Any

import click


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    try:
        return (
            None
            if value is None
            else [int(part) for part in value.replace(" ", ",").split(",") if part]
        )
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: expected whole numbers separated by commas, such as 12,15,19"
        ) from None


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(file_okay=False))
@click.option("--computed", callback=_numbers, metavar="N,N,...", help="Numbers of computed steps.")
@click.option("--speedup", type=float, help="Of the denoiser, instead of --computed.")
@click.option(
    "--steps",
    type=click.IntRange(min=3),
    help="Plan for fewer steps than recorded, from the same log.",
)
@click.option(
    "--no-runs",
    is_flag=True,
    help="Only from the log; nothing is run, nothing goes into the entry.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Planned ones to run.",
)
@click.option(
    "--choosing",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Prompts to choose by.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Others to judge by.",
)
@click.option("--model", metavar="NAME|FOLDER", help="Weights to run [default: the run's].")
@click.option("--prompts", metavar="FILE|SET", help="Held-out prompts; recorded ones are left out.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the first prompt.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True),
    help="Image to edit, or a folder.",
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="[default: as recorded]"
)
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda",
    show_default=True,
    help="Where the model runs.",
)
def plan(run: str, no_runs: bool, **options: Any) -> None:
    """Find the best schedule and forecast for a number of computed steps, and prove them on real runs.

    Writes the plans into the run's entry.yaml. Interrupted, the same command continues.

    \b
    Example:
        calibrate plan runs/flux1-dev-1a2b3c4d --computed 12,15,19,25
        calibrate plan runs/flux1-dev-1a2b3c4d --speedup 2.0 --no-runs
    """
    from calibrate.planning.plan import plan as make_plans
    from calibrate.planning.results import fewer_steps_verdict, plan_table

    planned = make_plans(
        run, runs=not no_runs, say=lambda text: click.echo(text, err=True), **options
    )
    verdict = fewer_steps_verdict(planned)
    if verdict:
        click.echo(f"{verdict}\n")
    click.echo(plan_table(planned))
    if not no_runs:
        click.echo(f"plans: {run}/entry.yaml")


COMMANDS = [plan]
