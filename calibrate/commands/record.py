"""The commands that record: ``run`` (the whole job, the default) and ``record`` (its GPU part)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from calibrate.commands.announce import tell_next
from calibrate.commands.options import DEGREE, recording_options, registry

if TYPE_CHECKING:
    from calibrate.runs.folder import RunFolder

NAMED_FAILURES = 5  # prompts that the last line names; failures/ has all


@click.command()
@recording_options
@click.option("--degree", type=DEGREE, default=4, help="Of the fitted polynomial.")
@registry
def run(degree: int, registry: str | None, **options: Any) -> None:
    """Record, fit, replay and write a draft entry: the whole job.

    \b
    Example:
        calibrate --model LongCat-Image --num-prompts 20
    """
    from calibrate.commands.fit import fit_and_report

    recorded = _record(options)
    if recorded:
        fit_and_report([recorded.path], degree=degree, registry=registry)
        _refuse_incomplete(recorded)


@click.command()
@recording_options
def record(**options: Any) -> None:
    """Record full uncached denoising into a run folder; the same command continues an interrupted one.

    \b
    Example:
        calibrate record --model FLUX.1-dev --num-prompts 20
        torchrun --nproc-per-node 8 -m calibrate record --model Wan2.1-T2V-14B
    """
    recorded = _record(options)
    if recorded:
        click.echo(
            f"{recorded.path}: {len(recorded.finished())} of {len(recorded.groups)} prompts recorded"
        )
        _refuse_incomplete(recorded)
        tell_next(f"calibrate fit {recorded.path}")


def _record(options: dict[str, Any]) -> RunFolder | None:
    """The recorded run; None on every rank but the first, which speaks for all."""
    from calibrate.recording.launch import rank
    from calibrate.recording.record import record as record_run

    recorded = record_run(**options)
    return recorded if rank() == 0 else None


def _refuse_incomplete(recorded: RunFolder) -> None:
    """End with exit code 3 when prompts are missing, naming them."""
    from calibrate.errors import Incomplete

    failures = recorded.failures()
    if not failures:
        return
    named = [f"{name} ({failure['kind']})" for name, failure in failures.items()]
    more = len(named) - NAMED_FAILURES
    text = "; ".join(named[:NAMED_FAILURES]) + (f" and {more} more" if more > 0 else "")
    raise Incomplete(
        f"{recorded.path}: {len(named)} of {len(recorded.groups)} prompts failed: {text}; see failures/ for the "
        "reasons, and run the same command again to retry them"
    )


COMMANDS = [run, record]
