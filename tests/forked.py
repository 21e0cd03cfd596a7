"""Programs in a fork of the test's process, which has loaded already what a process of its own loads for 5 s."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


def start(module: str, words: Sequence[str], err: Path) -> BaseProcess:
    """``python -m module words``, with stderr in a file and without stdout."""
    # A fork cannot use a GPU that the process before it has used.
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    process = multiprocessing.get_context(method).Process(
        target=_run, args=(module, words, err), daemon=True
    )
    process.start()
    return process


def _run(module: str, words: Sequence[str], err: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *words]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.stderr = open(err, "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
