"""The commands that record: ``run`` (the whole job, the default) and ``record`` (its GPU part)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from calibrate.commands.announce import tell_next
from calibrate.commands.options import recording_options, registry

if TYPE_CHECKING:
    from calibrate.runs.folder import RunFolder


@click.command()
@recording_options
@click.option(
    "--degree",
    type=click.IntRange(1, 6),
    default=4,
    show_default=True,
    help="Of the fitted polynomial.",
)
@registry
def run(degree: int, registry: str | None, **options: Any) -> None:
    """Record, fit, replay and write a draft entry: the whole job.

    \b
    Example:
        calibrate --model LongCat-Image --num-prompts 20
    """
    recorded = record_to_folder(**options)
    if recorded is None:
        return
    from calibrate.commands.fit import fit_and_report

    fit_and_report(recorded.path, {"degree": degree, "registry": registry})
    raise_if_incomplete(recorded)


@click.command()
@recording_options
def record(**options: Any) -> None:
    """Record full uncached denoising into a run folder; the same command continues an interrupted one.

    \b
    Example:
        calibrate record --model FLUX.1-dev --num-prompts 20
        torchrun --nproc-per-node 8 -m calibrate record --model Wan2.1-T2V-14B
    """
    recorded = record_to_folder(**options)
    if recorded is not None:
        click.echo(
            f"{recorded.path}: {len(recorded.finished())} of {len(recorded.groups)} prompts recorded"
        )
        raise_if_incomplete(recorded)
        tell_next(f"calibrate fit {recorded.path}")


def record_to_folder(**options: Any) -> RunFolder | None:
    """Record with the command line's options; None on every rank but the first, which speaks for all."""
    from calibrate.recording.launch import rank
    from calibrate.recording.record import record as record_run

    recorded = record_run(**options)
    return recorded if rank() == 0 else None


def raise_if_incomplete(recorded: RunFolder) -> None:
    """End with exit code 3 when prompts are missing, naming them."""
    from calibrate.errors import Incomplete

    failures = recorded.failures()
    told = {(failure["kind"], failure.get("message")) for failure in failures.values()}
    if len(failures) == len(recorded.groups) and len(told) == 1:
        kind, message = told.pop()
        raise Incomplete(
            f"{recorded.path}: every prompt failed alike ({kind}: {message}): look at the call's settings rather than "
            "at the prompts"
        )
    if failures:
        named = "; ".join(
            f"{name} ({failure['kind']})" for name, failure in list(failures.items())[:5]
        )
        more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise Incomplete(
            f"{recorded.path}: {len(failures)} of {len(recorded.groups)} prompts failed: {named}{more}; "
            "see failures/, and run the same command again to retry them"
        )


COMMANDS = [run, record]
