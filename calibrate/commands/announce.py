"""What a command says on stderr: before it starts what it will do, at the end what to run next."""

import os

import click

from calibrate.text import block, duration


def tell(text: str) -> None:
    """Progress goes to stderr, so that stdout has the results alone."""
    click.echo(text, err=True)


def tell_plan(title: str, folder: str | os.PathLike, **more: str) -> None:
    """The run, and what a command will do with it. Refuses what is no run."""
    from calibrate.model.call import call_text
    from calibrate.runs.folder import RunFolder
    from calibrate.runs.pairs import seconds_per_prompt

    run = RunFolder.open(folder)
    seconds = seconds_per_prompt(run)
    facts = {
        "model": str(run.manifest.get("model", "")),
        "call": call_text(run.manifest.get("protocol") or {}),
        "recorded": f"{len(run.finished())} of {len(run.groups)} prompts",
        "time": f"about {duration(seconds)} for one uncached generation" if seconds else "",
        **more,
        "folder": str(run.path),
    }
    tell(block(title, facts))


def tell_next(*commands: str) -> None:
    """What to run next."""
    tell("\n".join(["next:", *(f"  {command}" for command in commands)]))


def leave_to_rank_0(command: str) -> bool:
    """Whether this process is one of several and not the first: it has nothing to do then, and says so."""
    from calibrate.recording.launch import rank

    if rank() == 0:
        return False
    tell(f"rank {rank()}: `calibrate {command}` works in one process; rank 0 does it all")
    return True
