"""The command that fits: everything a recorded run says, on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from calibrate.commands.announce import tell_next, tell_plan
from calibrate.commands.options import registry
from coeffs.entry.signals import SIGNALS

FIT_OPTIONS: dict[str, Any] = {"degree": 4, "target": "output", "signal": "modulated_input"}
# --constrained, --free or neither: the method, and the flag that the entry's command repeats.
METHODS: dict[bool | None, tuple[str, list[str]]] = {
    None: ("auto", []),
    True: ("constrained", ["--constrained"]),
    False: ("polyfit", ["--free"]),
}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN [RUN2 ...]")
@click.option(
    "--degree", type=click.IntRange(1, 6), default=4, show_default=True, help="Of the polynomial."
)
@click.option(
    "--target",
    type=click.Choice(["output", "hidden", "residual"]),
    default="output",
    show_default=True,
    help="Whose change is predicted.",
)
@click.option(
    "--signal",
    type=click.Choice(list(SIGNALS)),
    default="modulated_input",
    show_default=True,
    help="From whose change.",
)
@click.option(
    "--constrained/--free",
    "constrained",
    default=None,
    help="Recommend the fit that is never negative and never falls, or the plain one [default: the better one].",
)
@click.option(
    "--score",
    "strangers",
    multiple=True,
    metavar="ENTRY",
    help="Also score an entry, or numbers such as 1,2,3 (highest power first); repeat for several.",
)
@click.option(
    "--speedup",
    type=float,
    metavar="FACTOR",
    help="Also find the threshold for this expected speed-up.",
)
@registry
@click.option(
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
    fit_and_report(runs, options)


def fit_and_report(runs: str | Path | Sequence[str | Path], options: Mapping[str, Any]) -> Path:
    """Fit, print the tables, and write the draft entry, whose path is returned.

    ``options`` are those of ``calibrate fit``; what is missing takes its default.
    """
    import coeffs
    from calibrate.fitting.choice import fit_branches
    from calibrate.fitting.draft import entry_of
    from calibrate.fitting.score import score
    from calibrate.reporting.tables import candidate_table, fit_table, replay_table, score_table
    from calibrate.runs.entry_file import carried_over, update_entry
    from calibrate.runs.pairs import load_run

    chosen = {name: options.get(name, default) for name, default in FIT_OPTIONS.items()}
    method, flag = METHODS[options.get("constrained")]
    others = [_candidate(name, options.get("registry")) for name in options.get("strangers", ())]
    first, *further = [runs] if isinstance(runs, str | Path) else runs
    more = {
        "with": ", ".join(map(str, further)),
        "cost": "under a minute, on the CPU alone",
    }
    tell_plan(f"fit: a polynomial from {chosen['signal']} to {chosen['target']}", first, **more)
    run = load_run(runs)
    fits = fit_branches(run, **chosen, method=method)
    given = [f"--{name} {value}" for name, value in chosen.items()]
    command = " ".join(["calibrate fit RUN", *given, *flag])
    entry = entry_of(run, fits, chosen["target"], chosen["signal"], command)
    tables = [fit_table(entry, fits), candidate_table(run, chosen["degree"])]
    if others:
        tables.append(score_table(score(others, run)))
    tables.append(replay_table(run, entry, fits, options.get("speedup")))
    said: list[str] = []

    def refit(old: coeffs.Entry | None) -> coeffs.Entry:
        kept, words = carried_over(entry, old)
        said.extend(words)
        return kept

    path = Path(options.get("out") or Path(run.path or ".") / "entry.yaml")
    written = update_entry(path, refit)

    click.echo("\n\n".join(tables) + "\n")
    for text in said:
        click.echo(f"{path.name}: {text}")
    for warning in written.warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"draft entry: {path}")
    tell_next(f"calibrate plan {first} --speedup 2", f"calibrate verify {first}")
    return path


def _candidate(name: str, registry: str | None) -> Any:
    """An entry by name or path, or a bare list of coefficients."""
    import coeffs

    try:
        return [float(part) for part in name.strip("[]").split(",")]
    except ValueError:
        return coeffs.load(name, registry)


COMMANDS = [fit]
