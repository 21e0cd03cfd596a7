"""The command that fits: everything a recorded run says, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click import option

from calibrate.commands.announce import tell_next, tell_plan
from calibrate.commands.options import DEGREE, registry
from coeffs.entry.signals import SIGNALS

# --constrained, --free or neither: the method, and the flag that the entry's command repeats.
METHODS = {
    None: ("auto", ""),
    True: ("constrained", " --constrained"),
    False: ("polyfit", " --free"),
}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN [RUN2 ...]")
@option("--degree", type=DEGREE, default=4, help="Of the polynomial.")
@option(
    "--target",
    type=click.Choice(["output", "hidden", "residual"]),
    default="output",
    help="Whose change is predicted.",
)
@option(
    "--signal",
    type=click.Choice(list(SIGNALS)),
    default="modulated_input",
    help="From whose change.",
)
@option(
    "--constrained/--free",
    default=None,
    help="Recommend the fit that is never negative and never falls, or the plain one [default: the better one].",
)
@option(
    "--score",
    "strangers",
    multiple=True,
    metavar="ENTRY",
    help="Also score an entry, or numbers such as 1,2,3 (highest power first); repeat for several.",
)
@option(
    "--speedup",
    type=float,
    metavar="FACTOR",
    help="Also find the threshold for this expected speed-up.",
)
@registry
@option(
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draft entry [default: RUN/entry.yaml].",
)
def fit(runs: tuple[str, ...], **options: Any) -> None:
    """Fit recorded runs, replay thresholds, and write a draft entry. Runs of one protocol are fitted together.

    \b
    Example:
        calibrate fit runs/flux1-dev-1a2b3c4d --score alivilab/flux1-dev --speedup 1.8
    """
    fit_and_report(runs, **options)


def fit_and_report(
    runs: Sequence[str | Path],
    *,
    degree: int,
    target: str = "output",
    signal: str = "modulated_input",
    constrained: bool | None = None,
    strangers: Sequence[str] = (),
    speedup: float | None = None,
    registry: str | None = None,
    out: str | None = None,
) -> None:
    """Fit, print the tables, and write the draft entry."""
    from calibrate.fitting.choice import fit_branches
    from calibrate.fitting.draft import entry_of
    from calibrate.fitting.score import score
    from calibrate.reporting.tables import (
        candidate_table,
        fit_table,
        replay_table,
        score_table,
    )
    from calibrate.runs.entry_file import carried_over, update_entry
    from calibrate.runs.pairs import load_run

    others = [_candidate(name, registry) for name in strangers]
    more = {
        "with": ", ".join(map(str, runs[1:])),
        "cost": "under a minute, on the CPU alone",
    }
    tell_plan(f"fit: a polynomial from {signal} to {target}", runs[0], **more)
    method, flag = METHODS[constrained]
    run = load_run(runs)
    fits = fit_branches(run, degree, target, signal, method)
    command = f"calibrate fit RUN --degree {degree} --target {target} --signal {signal}{flag}"
    entry = entry_of(run, fits, target, signal, command)
    tables = [fit_table(entry, fits), candidate_table(run, degree)]
    if others:
        tables.append(score_table(score(others, run)))
    tables.append(replay_table(run, entry, fits, speedup))
    path = Path(out or Path(runs[0]) / "entry.yaml")
    said: list[str] = []
    written = update_entry(path, lambda old: carried_over(entry, old, said.append))

    click.echo("\n\n".join(tables) + "\n")
    for text in said:
        click.echo(f"{path.name}: {text}")
    for warning in written.warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"draft entry: {path}")
    tell_next(f"calibrate plan {runs[0]} --speedup 2", f"calibrate verify {runs[0]}")


def _candidate(name: str, registry: str | None) -> Any:
    """An entry by name or path, or a bare list of coefficients."""
    import coeffs

    try:
        return [float(part) for part in name.strip("[]").split(",")]
    except ValueError:
        return coeffs.load(name, registry)


COMMANDS = [fit]
