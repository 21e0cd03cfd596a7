"""The programs ``calibrate`` and ``teacal``, and what ``python -m calibrate`` and ``torchrun -m calibrate`` start."""

import os
import signal
import sys
from typing import Any

from teacal import PACKAGES, end_if_in_the_way

_PROCESS = os.getpid()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Entry point of the program: first it sees to it that signals end it cleanly, then it imports the rest."""
    for number in _SIGNALS:
        signal.signal(number, _end)
    end_if_in_the_way(*PACKAGES)
    from calibrate.cli import main as run

    try:
        run()
    finally:
        # All is done but Python's own clearing up, which takes a second after torch and resets handlers.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: Any) -> None:
    """End at once, with one line and exit code 3.

    Nothing has to be put in order: every file is written whole or not at all, and locks go with the process. An
    exception instead could be swallowed by a library that is being imported, or shown as its traceback.
    """
    if os.getpid() == _PROCESS:
        where = _folder()
        told = f"{where}: interrupted" if where else "interrupted"
        line = (
            f"\nError: {told}; what is finished is kept, run the same command again to continue\n"
        )
        os.write(2, line.encode())
        processes = sys.modules.get("multiprocessing.process")
        for child in processes.active_children() if processes else ():
            child.terminate()
    os._exit(3)


def _folder() -> str:
    """The folder that the command works on: the one it holds the lock of, else the one it was given."""
    locks = sys.modules.get("calibrate.runs.lock")
    if locks and locks.held:
        return str(next(iter(locks.held)))
    click = sys.modules.get("click")
    context = click.get_current_context(silent=True) if click else None
    given = context.params if context else {}
    for name in ("out", "run", "runs", "source", "entry"):
        value = given.get(name)
        if value:
            return value if isinstance(value, str) else ", ".join(value)
    return ""


if __name__ == "__main__":
    main()
