"""The commands that judge and show: ``verify`` (real cached runs against uncached ones) and ``report``."""

import signal
from typing import Any

import click


class _Numbers(click.ParamType):
    """Comma-separated numbers."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        try:
            return [self._kind(part) for part in value.split(",")]
        except ValueError:
            example = "14,10,8" if self._kind is int else "0.1,0.2"
            self.fail(f"{value!r}: expected numbers separated by commas, such as {example}")


@click.command()
@click.argument("source", metavar="RUN|ENTRY")
@click.option(
    "--model",
    metavar="NAME|FOLDER",
    help="Weights to run [default: those of the run or the entry].",
)
@click.option(
    "--prompts",
    metavar="FILE|SET",
    help="Held-out prompts; recorded ones are left out [default: the model's].",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="The first N of them.",
)
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
    help="Image to edit, or a folder; repeat.",
)
@click.option(
    "--budgets",
    type=_Numbers(int),
    metavar="N,N,...",
    help="Computed steps to compare at [default: five].",
)
@click.option(
    "--thresholds",
    type=_Numbers(float),
    metavar="T,T,...",
    help="Thresholds of the fitted gate instead.",
)
@click.option(
    "--policies",
    metavar="P,P,...",
    help="Of gate, apart, plan, uniform, uniform-linear, uniform-linear-output, uniform-fitted, "
    "fewer-steps, fewer-steps-2, magcache, published, "
    "first-block-cache, mag-cache, sea-cache [default: all].",
)
@click.option(
    "--lpips",
    is_flag=True,
    help="Add LPIPS to the measures; needs teacal[lpips].",
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
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Where an entry's verification goes.",
)
@click.option(
    "--registry",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Registry to look entries up in.",
)
def verify(source: str, policies: str | None, **options: Any) -> None:
    """Compare real cached runs with uncached ones on held-out prompts, and with baselines at equal computed steps.

    Writes the verified thresholds into the run's entry.yaml. Interrupted, the same command continues.

    \b
    Example:
        calibrate verify runs/flux1-dev-1a2b3c4d --num-prompts 10 --policies gate,uniform,fewer-steps
    """
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a scheduler's notice ends it as cleanly as Ctrl-C
    from calibrate.verifying.comparison import first_lines, judge_plan, verdict_table
    from calibrate.verifying.lineup import GATE
    from calibrate.verifying.verify import verify as run_verification

    found = run_verification(
        source,
        policies=policies.split(",") if policies else None,
        say=lambda text: click.echo(text, err=True),
        **options,
    )
    for line in first_lines(found.results, found.headline):
        click.echo(line)
    click.echo(f"\n{verdict_table(found.summary)}")
    for name, count in found.facts["broken"].items():
        click.echo(f"broken: {name}: {count} samples with NaN or infinity, in no mean")
    for name, reason in found.facts["refused"].items():
        click.echo(f"refused: {name}: {reason}")
    click.echo("")
    for comparison in found.comparisons:
        click.echo(f"{comparison}")
    for comparison in judge_plan(found.results):
        if (
            comparison.baseline != GATE
        ):  # said above, at the gate's own steps: one question has one answer
            click.echo(f"{comparison}")
    click.echo(f"\nverified thresholds: {found.folder.parent / 'entry.yaml'}")


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(file_okay=False))
def report(run: str) -> None:
    """Write plots (PNG and SVG) and a self-contained report.html into RUN/report.

    \b
    Example:
        calibrate report runs/flux1-dev-1a2b3c4d
    """
    from calibrate.reporting.report import report

    click.echo(f"report: {report(run)}")


COMMANDS = [verify, report]
