"""Programs in a fork of the test's process, which has loaded already what a process of its own loads for 5 s."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch


def context() -> Any:
    """Of forks; where the process has used a GPU, which a fork of it cannot, of processes of their own."""
    return multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")


def start(module: str, words: Sequence[str], err: Path) -> BaseProcess:
    """``python -m module words``, with stderr in a file and without stdout."""
    process = context().Process(target=_run, args=(module, words, err), daemon=True)
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
