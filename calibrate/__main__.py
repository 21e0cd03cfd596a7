"""The programs ``calibrate`` and ``teacal``, and what ``python -m calibrate`` and ``torchrun -m calibrate`` start."""

import os
import signal
import sys
from typing import Any

from teacal import PACKAGES, end_if_in_the_way

_PROCESS = os.getpid()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_READ = (
    "--model",
    "--image",
    "--registry",
    "--prompts",
)  # options of folders that are only read


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
        said = f"\nError: {_folder()}interrupted; what is finished is kept, run the same command again to continue\n"
        os.write(2, said.encode())
        processes = sys.modules.get("multiprocessing.process")
        for child in processes.active_children() if processes else ():
            child.terminate()
    os._exit(3)


def _folder() -> str:
    """The folder that the command works on: the one it holds the lock of, else the one on the command line.

    Read from the words themselves, because a signal can come before they are parsed.
    """
    locks = sys.modules.get("calibrate.runs.lock")
    if locks and locks.held:
        return f"{next(iter(locks.held))}: "
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    after = dict(zip(words, ["", *words], strict=False))
    named = [word for word, option in after.items() if option == "--out"]
    folders = (word for word in words if after[word] not in _READ and os.path.isdir(word))
    return next((f"{word}: " for word in (*named, *folders)), "")


if __name__ == "__main__":
    main()
