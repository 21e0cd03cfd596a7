"""The commands of the registry: list, show, diff, check, export, import, publish. Shells over ``coeffs``."""

import click

ENGINES = click.Choice(
    [
        "vllm-omni",
        "vllm-omni-magcache",
        "sglang",
        "sglang-cache-dit",
        "tensorrt-llm",
        "lightx2v",
        "lightx2v-magcache",
        "comfyui-teacache",
        "mlx-teacache",
        "diffusers-magcache",
        "cache-dit-mask",
        "xfuser",
        "angelslim",
        "json",
    ]
)
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
    from coeffs import describe as tables
    from coeffs import store

    readable, broken = store.readable(registry)
    found = tables.matching(readable, model=model, engine=engine, status=status)
    click.echo(
        {"table": tables.as_table, "json": tables.as_json, "csv": tables.as_csv}[form](found)
    )
    for error in broken:
        click.echo(f"not readable: {error}", err=True)
    if form == "table":
        click.echo(f"{len(found)} of {len(readable)} entries", err=True)


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
    import coeffs
    from coeffs import describe as tables

    found = coeffs.load(entry, registry)
    click.echo(coeffs.dump(found).rstrip("\n") if as_yaml else tables.described(found))


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
    import coeffs
    from coeffs import describe as tables

    click.echo(tables.difference(coeffs.load(first, registry), coeffs.load(second, registry)))


@click.command()
@click.argument("entries", nargs=-1, metavar="[ENTRY ...]")
@registry_option
def check(entries: tuple[str, ...], registry: str | None) -> None:
    """Check entries for release; without arguments, every file of every registry against CHECKSUMS and the schema.

    \b
    Example:
        calibrate check runs/my-model
    """
    import coeffs
    from coeffs import release, store
    from coeffs.errors import CheckFailed

    fatal = 0
    for name in entries:
        found = release.entry_problems(coeffs.load(name, registry))
        fatal += sum(problem.fatal for problem in found)
        click.echo("\n".join([f"{name}: {problem}" for problem in found] or [f"{name}: sound"]))
    if not entries:
        problems = release.problems(registry)
        fatal = len(problems)
        click.echo(
            "\n".join(problems) or f"{len(store.released(registry))} entries, all as released"
        )
    if fatal:
        raise CheckFailed(f"{fatal} problem{'s' if fatal > 1 else ''}, see above")


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
):
    """Write an entry in the form that an engine takes, or refuse what the engine cannot express.

    \b
    Example:
        calibrate export alivilab/wan2.1-t2v-1.3b --to sglang --threshold 0.08
    """
    import coeffs
    from coeffs.engines import export_entry

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
    type=click.Choice(["modulated_input", "time_embedding", "other"]),
    help="Fitted on which signal.",
)
@click.option("--copied-from", metavar="NAME", help="The numbers are another model's: whose.")
@out_option
@registry_option
def import_form(
    file, engine: str, like: str | None, out: str | None, registry: str | None, **facts: str | None
) -> None:
    """Read an engine's form into a draft entry.

    \b
    Example:
        calibrate import cache_config.yaml --from tensorrt-llm --model flux2-dev --signal modulated_input
    """
    import coeffs
    from coeffs.engines import import_entry

    given = {name: value for name, value in facts.items() if value is not None}
    given |= {"status": "copied"} if "copied_from" in given else {}
    base = coeffs.load(like, registry) if like else None
    _put(coeffs.dump(import_entry(file.read(), engine, like=base, **given)), out)


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True))
@click.option("--dry-run", is_flag=True, help="Only check.")
@registry_option
def publish(run: str, dry_run: bool, registry: str | None) -> None:
    """Release a run's draft entry as the next version of its model, once its checks pass.

    Goes to --registry, or to your own registry folder.

    \b
    Example:
        calibrate publish runs/my-model
    """
    from pathlib import Path

    import coeffs
    from coeffs import release
    from coeffs.errors import CheckFailed

    entry = coeffs.load(Path(run))
    found = release.entry_problems(entry)
    for problem in found:
        click.echo(str(problem), err=True)
    if any(problem.fatal for problem in found):
        raise CheckFailed(f"{run}: not fit for release, see above")
    click.echo("fit for release" if dry_run else f"released: {coeffs.publish(entry, registry)}")


def _put(text: str, out: str | None) -> None:
    if out is None:
        click.echo(text, nl=False)
    else:
        with open(out, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)


COMMANDS = [list_entries, show, diff, check, export, import_form, publish]
