"""The commands of the registry: list, show, diff, check, export, import, publish."""

from pathlib import Path
from typing import Any, TextIO

import click
from click import argument, option

import coeffs
from calibrate.commands.options import OneOf, registry
from calibrate.text import terminal_width
from coeffs import describe, difference, store
from coeffs import release as releases
from coeffs.engines import ENGINES as ENGINE_NAMES
from coeffs.engines import export_entry, import_entry
from coeffs.engines.releases import takers
from coeffs.entry.fields import stated
from coeffs.entry.signals import SIGNALS
from coeffs.errors import (
    CheckFailed,
    CoeffsError,
    EngineError,
    PublishError,
    WriteError,
)

NARROWEST = 60  # columns in which the tables can be read


ENGINES = OneOf(list(ENGINE_NAMES))
STATUSES = click.Choice(["measured", "published", "copied"])
out_option = option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write there, not to stdout.",
)


@click.command("list")
@option(
    "--model",
    metavar="TEXT",
    help="Only where name, title, checkpoint or class contains TEXT.",
)
@option("--engine", metavar="NAME", help="Only sets published by this engine.")
@option("--status", type=STATUSES, help="Only this status.")
@option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table")
@registry
def list_entries(registry: str | None, form: str, **wanted: Any) -> None:
    """List the entries of all registries.

    \b
    Example:
        calibrate list --model longcat
    """
    readable, errors = store.readable(registry)
    if wanted["engine"]:
        publishers = {entry.engine for entry in readable if entry.engine}
        OneOf(sorted(publishers)).convert(wanted["engine"], None, None)
    entries = describe.matching(readable, **wanted)
    if form == "json":
        click.echo(describe.as_json(entries))
    elif form == "csv":
        click.echo(describe.as_csv(entries))
    else:
        click.echo(describe.as_table(entries, terminal_width(NARROWEST)))
        click.echo(f"{len(entries)} of {len(readable)} entries", err=True)
    for error in errors:
        click.echo(f"not readable: {error}", err=True)


@click.command()
@argument("entry")
@option("--yaml", "as_yaml", is_flag=True, help="The entry file as it is stored.")
@registry
def show(entry: str, as_yaml: bool, registry: str | None) -> None:
    """Show one entry: a name, name@v2, a file or a run folder.

    \b
    Example:
        calibrate show vllm-omni/longcat-image
    """
    loaded = coeffs.load(entry, registry)
    if as_yaml:
        click.echo(coeffs.dump(loaded), nl=False)
    else:
        click.echo(describe.described(loaded, terminal_width(NARROWEST)))


@click.command()
@argument("first", metavar="A")
@argument("second", metavar="B")
@registry
def diff(first: str, second: str, registry: str | None) -> None:
    """Compare two entries: settings, coefficients, domains, and the curves where both may be used.

    \b
    Example:
        calibrate diff vllm-omni/longcat-image sglang/longcat-image-pr36767
    """
    entries = coeffs.load(first, registry), coeffs.load(second, registry)
    click.echo(difference.difference(*entries, terminal_width(NARROWEST)))


@click.command()
@argument("entries", nargs=-1, metavar="[ENTRY ...]")
@registry
def check(entries: tuple[str, ...], registry: str | None) -> None:
    """Check entries for release; without arguments, every file of every registry against CHECKSUMS and the schema.

    \b
    Example:
        calibrate check runs/my-model
    """
    fatal = 0
    for name in entries:
        problems = releases.entry_problems(coeffs.load(name, registry))
        refused = sum(problem.fatal for problem in problems)
        for line in problems if refused else ["sound", *problems]:
            click.echo(f"{name}: {line}")
        fatal += refused
    if not entries:
        damaged = releases.problems(registry)
        fatal = len(damaged)
        count = len(store.released(registry))
        click.echo("\n".join(damaged) or f"{count} entries, all as released")
    if fatal:
        raise CheckFailed(f"{fatal} problem{'s' if fatal > 1 else ''}, see above")


@click.command()
@argument("entry")
@option("--to", "engine", type=ENGINES, required=True, help="The engine that will read it.")
@option(
    "--threshold",
    type=float,
    help="Travels with the coefficients; needed unless the entry has exactly one.",
)
@option(
    "--schedule",
    metavar="CCSC...",
    help="A plan for engines of plans: C computes, S skips.",
)
@option("--release", metavar="VERSION", help="The engine's version; refused if not known.")
@option(
    "--force", is_flag=True, help="Write what the engine misreads, with a warning inside."
)
@out_option
@registry
def export(entry: str, out: str | None, registry: str | None, **form: Any) -> None:
    """Write an entry in the form that an engine takes, or refuse what the engine cannot express.

    \b
    Example:
        calibrate export alivilab/wan2.1-t2v-1.3b --to sglang --threshold 0.08
    """
    for choice in ("threshold", "schedule", "release", "force"):
        forms = takers(choice)
        # Not by equality: a threshold of 0 is given.
        given = form[choice] is not None and form[choice] is not False
        if given and form["engine"] not in forms:
            raise EngineError(
                f"--{choice}: {form['engine']} has no place for it, only {', '.join(forms)}; leave it out"
            )
    _put(export_entry(coeffs.load(entry, registry), **form), out)


@click.command("import")
@argument("file", type=click.File("r", encoding="utf-8"))
@option("--from", "engine", type=ENGINES, required=True, help="The engine whose form it is.")
@option(
    "--like",
    metavar="ENTRY",
    help="Keep the facts of this entry; the form replaces its numbers.",
)
@option("--model", metavar="NAME", help="Name of the new entry.")
@option("--transformer-class", metavar="CLASS", help="Class of the denoiser.")
@option("--signal", type=click.Choice([*SIGNALS, "other"]), help="Fitted on which signal.")
@option("--copied-from", metavar="NAME", help="The numbers are another model's: whose.")
@out_option
@registry
def import_form(
    file: TextIO,
    engine: str,
    like: str | None,
    out: str | None,
    registry: str | None,
    **facts: Any,
) -> None:
    """Read an engine's form into a draft entry.

    \b
    Example:
        calibrate import cache_config.yaml --from tensorrt-llm --model flux2-dev --signal modulated_input
    """
    given = stated(facts)
    if "copied_from" in given:
        given["status"] = "copied"
    base = coeffs.load(like, registry) if like else None
    _put(coeffs.dump(import_entry(file.read(), engine, like=base, **given)), out)


@click.command()
@argument("run", metavar="RUN", type=click.Path(exists=True))
@option("--dry-run", is_flag=True, help="Only check.")
@option(
    "--force", is_flag=True, help="Release an entry that is complete but of little worth."
)
@registry
def publish(run: str, dry_run: bool, force: bool, registry: str | None) -> None:
    """Release a run's draft entry as the next version of its model, once its checks pass.

    Goes to --registry, or to your own registry folder. Exit code 1 whenever a readable entry was not released.

    \b
    Example:
        calibrate publish runs/my-model
    """
    entry = coeffs.load(Path(run))
    problems = releases.entry_problems(entry)
    for problem in problems:
        click.echo(problem, err=True)
    if any(problem.fatal and not (force and problem.forcible) for problem in problems):
        raise CheckFailed(f"{run}: not fit for release, see above")
    if dry_run:
        click.echo("fit for release")
        return
    try:
        path = coeffs.publish(entry, registry)
    except WriteError as error:
        raise PublishError(str(error)) from None
    click.echo(f"released: {path}")
    try:
        meant = coeffs.load(entry.model).label
    except CoeffsError:
        meant = "nothing"
    if meant != f"{entry.model}@{path.stem}":
        folder = registry or store.user_registry()
        click.echo(
            f"{entry.model} alone means {meant} here: put {folder} first in {store.ENVIRONMENT}",
            err=True,
        )


def _put(text: str, out: str | None) -> None:
    if out is None:
        click.echo(text, nl=False)
    else:
        store.write(text, Path(out))


COMMANDS = [list_entries, show, diff, check, export, import_form, publish]
