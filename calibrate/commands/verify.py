"""The commands that judge and show: ``verify`` (real cached runs against uncached ones) and ``report``."""

import textwrap
from typing import Any

import click
from click import option

from calibrate.commands.announce import tell, tell_next, tell_plan
from calibrate.commands.options import (
    FOLDER,
    NUMBERS,
    POSITIVE,
    WHOLE_NUMBERS,
    OneOf,
    registry,
    rerunning_options,
)
from calibrate.text import block


@click.command()
@click.argument("source", metavar="RUN|ENTRY")
@option("--num-prompts", type=POSITIVE, default=10, help="The first N of them.")
@option(
    "--budgets",
    type=WHOLE_NUMBERS,
    metavar="N,N,...",
    help="Computed steps to compare at [default: five].",
)
@option(
    "--thresholds",
    type=NUMBERS,
    metavar="T,T,...",
    help="Thresholds of the fitted gate instead.",
)
@option(
    "--policies",
    metavar="P,P,...",
    help="Keys of --list-policies, or all [default: gate, plan, uniform, fewer-steps].",
)
@option(
    "--list-policies",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, wanted: list_policies(context) if wanted else None,
    help="Show what can be compared, and exit.",
)
@option(
    "--through",
    multiple=True,
    type=OneOf(["cache-dit", "diffusers-magcache"]),
    help="Run the plans by this engine's own code from their export; repeat.",
)
@option("--lpips", is_flag=True, help="Add LPIPS to the measures; needs teacal[lpips].")
@option("--out", type=FOLDER, metavar="FOLDER", help="Where an entry's verification goes.")
@registry
@rerunning_options
def verify(source: str, policies: str | None, **options: Any) -> None:
    """Compare real cached runs with uncached ones on held-out prompts, and with baselines at equal computed steps.

    Writes the verified thresholds into the run's entry.yaml. Interrupted, the same command continues.

    \b
    Example:
        calibrate verify runs/flux1-dev-1a2b3c4d --num-prompts 10 --policies gate,uniform,fewer-steps
    """
    import coeffs
    from calibrate.recording.launch import rank
    from calibrate.runs.lock import folder_of
    from calibrate.trials.setting import PLAN
    from calibrate.verifying.advice import advise, export_line, python_lines
    from calibrate.verifying.comparison import judge, sentences
    from calibrate.verifying.tables import verdict_table
    from calibrate.verifying.verify import verify as run_verification

    title = "verify: cached runs against uncached ones"
    of = folder_of(source, options["registry"], options["out"])
    if (of / "run.yaml").exists():
        tell_plan(title, of, prompts=f"{options['num_prompts']} that were not recorded")
    else:
        tell(block(title, {"entry": source, "folder": str(of)}))
    chosen = policies.split(",") if policies else None
    done = run_verification(
        source, policies=chosen, say=tell, progress=rank() == 0, **options
    )
    if done is None:
        tell(f"rank {rank()}: its share of the prompts is done; rank 0 concludes")
        return
    advice, folder = advise(done.results), done.folder.parent
    entry = coeffs.load(folder / "entry.yaml")
    usage = python_lines(advice, entry, folder), export_line(advice, entry, folder)
    indented = [textwrap.indent(lines, "    ") for lines in usage if lines]
    click.echo("\n\n".join([str(advice), *indented, verdict_table(done.summary)]))
    for name, count in done.facts["broken"].items():
        click.echo(
            f"broken: {name}: {count} samples with NaN or infinity, which count as 0 dB"
        )
    for name, reason in done.facts["refused"].items():
        click.echo(f"refused: {name}: {reason}")
    if done.facts["tuning"]:
        click.echo(f"tuning: {done.facts['tuning']}")
    of_plan = judge(done.results, PLAN)
    # Where there is a plan, plan and gate are compared once.
    of_gate = [row for row in done.comparisons if not of_plan or row.baseline != PLAN]
    for sentence in sentences(of_plan) + sentences(of_gate):
        click.echo(sentence)
    click.echo(f"\nverified thresholds: {folder / 'entry.yaml'}")
    tell_next(f"calibrate report {folder}", f"calibrate publish {folder}")


@click.command()
@click.argument("run", metavar="RUN", type=FOLDER)
def report(run: str) -> None:
    """Write plots (PNG and SVG) and a self-contained report.html into RUN/report.

    \b
    Example:
        calibrate report runs/flux1-dev-1a2b3c4d
    """
    from calibrate.reporting.report import report

    tell_plan("report: figures, plots and samples in one page", run)
    click.echo(f"report: {report(run)}")
    tell_next(f"calibrate publish {run}")


COMMANDS = [verify, report]


def list_policies(context: click.Context) -> None:
    """Print the key of every policy and what it is."""
    from calibrate.verifying.lineup import POLICIES

    named = {
        key: policy.label if policy.default else f"{policy.label}, not among all"
        for key, policy in POLICIES.items()
    }
    click.echo(block("policies", named))
    context.exit()
