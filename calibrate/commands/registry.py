"""The commands of the registry: list, show, diff, check, export, import, publish."""

import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

import click

import coeffs
from coeffs import describe, difference, store
from coeffs import release as releases
from coeffs.engines import ENGINES as ENGINE_NAMES
from coeffs.engines import export_entry, import_entry
from coeffs.entry.signals import SIGNALS
from coeffs.errors import CheckFailed, CoeffsError, did_you_mean


class _Engine(click.Choice[str]):
    """A choice that says which engine was probably meant."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        hint = did_you_mean(str(value), self.choices)
        if value not in self.choices and hint:
            self.fail(f"{value!r} is no engine: {hint}", param, ctx)
        return super().convert(value, param, ctx)


ENGINES = _Engine(list(ENGINE_NAMES))
STATUSES = click.Choice(["measured", "published", "copied"])
registry_option = click.option(
    "--registry",
    metavar="FOLDER",
    type=click.Path(file_okay=False),
    help="Registry folder that is asked first.",
)
out_option = click.option(
    "--out", metavar="FILE", type=click.Path(dir_okay=False), help="Write there, not to stdout."
)


@click.command("list")
@click.option(
    "--model", metavar="TEXT", help="Only where name, title, checkpoint or class contains TEXT."
)
@click.option("--engine", metavar="NAME", help="Only sets published by this engine.")
@click.option("--status", type=STATUSES, help="Only this status.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)
@registry_option
def list_entries(
    model: str | None, engine: str | None, status: str | None, form: str, registry: str | None
) -> None:
    """List the entries of all registries.

    \b
    Example:
        calibrate list --model longcat
    """
    readable, errors = store.readable(registry)
    if engine is not None:
        _check_engine(engine, readable)
    entries = describe.matching(readable, model=model, engine=engine, status=status)
    if form == "json":
        click.echo(describe.as_json(entries))
    elif form == "csv":
        click.echo(describe.as_csv(entries))
    else:
        click.echo(describe.as_table(entries, _width()))
    for error in errors:
        click.echo(f"not readable: {error}", err=True)
    if form == "table":
        click.echo(f"{len(entries)} of {len(readable)} entries", err=True)


def _check_engine(engine: str, entries: list[coeffs.Entry]) -> None:
    known = sorted({entry.engine for entry in entries if entry.engine})
    if engine not in known:
        hint = did_you_mean(engine, known) or f"expected one of {', '.join(known)}"
        raise click.BadParameter(f"no entry was published by {engine!r}: {hint}")


@click.command()
@click.argument("entry")
@click.option("--yaml", "as_yaml", is_flag=True, help="The entry file as it is stored.")
@registry_option
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
        click.echo(describe.described(loaded, _width()))


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@registry_option
def diff(first: str, second: str, registry: str | None) -> None:
    """Compare two entries: settings, coefficients, domains, and the curves where both may be used.

    \b
    Example:
        calibrate diff vllm-omni/longcat-image sglang/longcat-image-pr36767
    """
    entries = coeffs.load(first, registry), coeffs.load(second, registry)
    click.echo(difference.difference(*entries, _width()))


@click.command()
@click.argument("entries", nargs=-1, metavar="[ENTRY ...]")
@registry_option
def check(entries: tuple[str, ...], registry: str | None) -> None:
    """Check entries for release; without arguments, every file of every registry against CHECKSUMS and the schema.

    \b
    Example:
        calibrate check runs/my-model
    """
    fatal = 0
    for name in entries:
        lines, problems = _problems(coeffs.load(name, registry))
        fatal += len(problems)
        lines = lines if problems else ["sound", *lines]
        click.echo("\n".join(f"{name}: {line}" for line in lines))
    if not entries:
        found = releases.problems(registry)
        fatal = len(found)
        sound = f"{len(store.released(registry))} entries, all as released"
        click.echo("\n".join(found) or sound)
    if fatal:
        raise CheckFailed(f"{fatal} problem{'s' if fatal > 1 else ''}, see above")


def _problems(entry: coeffs.Entry) -> tuple[list[str], list[releases.Problem]]:
    """Lines to print, the entry's own warnings among them, and the problems that are fatal."""
    problems = releases.entry_problems(entry)
    known = {problem.text for problem in problems}
    lines = list(map(str, problems))
    lines += [f"warning: {text}" for text in entry.warnings if text not in known]
    return lines, [problem for problem in problems if problem.fatal]


@click.command()
@click.argument("entry")
@click.option("--to", "engine", type=ENGINES, required=True, help="The engine that will read it.")
@click.option(
    "--threshold",
    type=float,
    help="Travels with the coefficients; needed unless the entry has exactly one.",
)
@click.option(
    "--schedule", metavar="CCSC...", help="A plan for engines of plans: C computes, S skips."
)
@click.option("--release", metavar="VERSION", help="The engine's version; refused if not known.")
@click.option(
    "--force", is_flag=True, help="Write what the engine misreads, with a warning inside."
)
@out_option
@registry_option
def export(
    entry: str,
    engine: str,
    threshold: float | None,
    schedule: str | None,
    release: str | None,
    force: bool,
    out: str | None,
    registry: str | None,
) -> None:
    """Write an entry in the form that an engine takes, or refuse what the engine cannot express.

    \b
    Example:
        calibrate export alivilab/wan2.1-t2v-1.3b --to sglang --threshold 0.08
    """
    text = export_entry(
        coeffs.load(entry, registry),
        engine,
        threshold=threshold,
        schedule=schedule,
        release=release,
        force=force,
    )
    _put(text, out)


@click.command("import")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--from", "engine", type=ENGINES, required=True, help="The engine whose form it is.")
@click.option(
    "--like", metavar="ENTRY", help="Keep the facts of this entry; the form replaces its numbers."
)
@click.option("--model", metavar="NAME", help="Name of the new entry.")
@click.option("--transformer-class", metavar="CLASS", help="Class of the denoiser.")
@click.option(
    "--signal",
    type=click.Choice([*SIGNALS, "other"]),
    help="Fitted on which signal.",
)
@click.option("--copied-from", metavar="NAME", help="The numbers are another model's: whose.")
@out_option
@registry_option
def import_form(
    file: TextIO,
    engine: str,
    like: str | None,
    out: str | None,
    registry: str | None,
    **facts: str | None,
) -> None:
    """Read an engine's form into a draft entry.

    \b
    Example:
        calibrate import cache_config.yaml --from tensorrt-llm --model flux2-dev --signal modulated_input
    """
    given = {name: value for name, value in facts.items() if value is not None}
    given |= {"status": "copied"} if "copied_from" in given else {}
    base = coeffs.load(like, registry) if like else None
    _put(coeffs.dump(import_entry(file.read(), engine, like=base, **given)), out)


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True))
@click.option("--dry-run", is_flag=True, help="Only check.")
@click.option(
    "--force", is_flag=True, help="Release an entry that is complete but of little worth."
)
@registry_option
def publish(run: str, dry_run: bool, force: bool, registry: str | None) -> None:
    """Release a run's draft entry as the next version of its model, once its checks pass.

    Goes to --registry, or to your own registry folder.

    \b
    Example:
        calibrate publish runs/my-model
    """
    entry = coeffs.load(Path(run))
    lines, problems = _problems(entry)
    for line in lines:
        click.echo(line, err=True)
    if any(not (force and problem.forcible) for problem in problems):
        raise CheckFailed(f"{run}: not fit for release, see above")
    if dry_run:
        click.echo("fit for release")
        return
    path = coeffs.publish(entry, registry)
    click.echo(f"released: {path}")
    hidden = _hidden_by(entry.model, path)
    if hidden:
        click.echo(hidden, err=True)


def _hidden_by(model: str, path: Path) -> str | None:
    """How to ask for a new release that the bare name does not mean; None where it does."""
    label = f"{model}@{path.stem}"
    try:
        meant = coeffs.load(model).label
    except CoeffsError:
        meant = "nothing"
    if meant == label:
        return None
    folder = path.parents[len(Path(model).parts)]
    return f"{model} alone means {meant} here: put {folder} first in {store.ENVIRONMENT}"


def _put(text: str, out: str | None) -> None:
    if out is None:
        click.echo(text, nl=False)
    else:
        store.write(text, Path(out))


def _width() -> int:
    """Columns of the terminal, or of the variable COLUMNS; 100 where the output goes elsewhere."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return describe.WIDTH
    return max(60, shutil.get_terminal_size((describe.WIDTH, 24)).columns)


COMMANDS = [list_entries, show, diff, check, export, import_form, publish]
