"""What the benchmarks share: cases timed in turn within one run, ratios, and results with their surroundings."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

RESULTS = Path(__file__).parent / "results"


def alternate(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every case, ``rounds`` times, one after the other in turn, the order reversed every other round.

    Machines are noisy and drift: only ratios within a round are compared, never times of different minutes.
    """
    for _ in range(warmups):
        for run in cases.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            synchronize()
            begun = time.perf_counter()
            cases[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - begun)
            click.echo(
                f"round {turn + 1}/{rounds} {name}: {seconds[name][-1]:.3f} s", err=True
            )
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> dict[str, float]:
    """Median over rounds of the ratio of two cases, with the lowest and highest."""
    ratios = [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Most memory that torch held on the GPU while ``run`` ran; ``None`` without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text; floats with three digits."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [
        max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))
    ]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _text(cell: Any) -> str:
    return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def write(name: str, figures: Mapping[str, Any]) -> Path:
    """Results as JSON under ``results/``, with hardware, versions and commit."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps({"surroundings": surroundings(), **figures}, indent=1) + "\n")
    return path


def surroundings() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit_of(Path(__file__).parent),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def commit_of(folder: Path) -> str | None:
    """The commit that a clone is at, whoever owns it and wherever the caller stands; None outside of one."""
    # A hook of another repository sets these.
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE")
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    # git refuses a clone of another user, as in containers, unless told that it is meant.
    command = ["git", "-c", "safe.directory=*", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError:  # no git here
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
