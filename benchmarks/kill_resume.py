"""Kill a recording at random moments, resume it each time, and compare with an undisturbed one, byte for byte.

    python benchmarks/kill_resume.py [--kills 100] [--seed 0]

Real processes and real SIGKILLs, on the embedded model: each process loads it, takes the lock, records and writes
until it is killed. Afterwards the pairs must be the same bytes as those of a run that was left alone, the fitted
coefficients the same numbers, and no shard that was ever seen finished may have been lost or rewritten.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RUN = "disturbed"
MOST_SHARDS = 3  # a process finishes at most this many before it is killed
SHARDS_PER_RUN = 10  # delays are drawn from about the time that one shard takes


@dataclass
class Outcome:
    """What the kills did; ``lost`` and ``rewritten`` name shards and have to be empty."""

    kills: int
    kills_during_recording: int
    leftovers: int
    lost: list[str]
    rewritten: list[str]
    identical: bool


@dataclass(frozen=True)
class Moment:
    """When a process is killed: ``seconds`` after the folder holds this many finished shards."""

    shards: int
    seconds: float


def kill_and_resume(
    record: Callable[[Path], None], folder: Path, kills: int, seed: int = 0
) -> Outcome:
    """Run ``record(path)`` undisturbed in one process, then in others that are killed ``kills`` times.

    Each process is killed at a random moment: while it starts, or once it has finished a random number of further
    shards, so that a busy machine changes nothing. When the run is complete before all kills have happened, half of
    its shards, chosen at random, are taken out.
    """
    generator = random.Random(seed)
    path, reference = folder / RUN, folder / "reference"
    begun = time.monotonic()
    _run(record, reference)
    longest = time.monotonic() - begun
    seen: dict[str, tuple[int, int]] = {}
    outcome = Outcome(
        kills=0,
        kills_during_recording=0,
        leftovers=0,
        lost=[],
        rewritten=[],
        identical=False,
    )
    while outcome.kills < kills:
        before = set(seen)
        moment = Moment(
            shards=len(before) + generator.randint(0, MOST_SHARDS),
            seconds=generator.uniform(0, longest / SHARDS_PER_RUN),
        )
        if not _run(record, path, moment):
            for shard in generator.sample(
                sorted((path / "pairs").glob("*.parquet")), len(before) // 2 + 1
            ):
                shard.unlink()
                seen.pop(shard.name, None)
            continue
        outcome.kills += 1
        found = {shard.name: _stamp(shard) for shard in (path / "pairs").glob("*.parquet")}
        outcome.kills_during_recording += set(found) != before
        outcome.leftovers += len(list(path.glob("**/.*.tmp")))
        outcome.lost += [name for name in seen if name not in found]
        outcome.rewritten += [
            name for name in seen if name in found and found[name] != seen[name]
        ]
        seen = found
    _run(record, path)
    outcome.identical = _pairs(path) == _pairs(reference)
    return outcome


def _run(record: Callable[[Path], None], path: Path, moment: Moment | None = None) -> bool:
    """One process of its own, forked so that a start costs no imports; True when it was killed."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(record, path))
    process.start()
    if moment is not None:
        while process.is_alive() and len(list(path.glob("pairs/*.parquet"))) < moment.shards:
            time.sleep(0.001)
    process.join(None if moment is None else moment.seconds)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not killed and process.exitcode != 0:
        raise RuntimeError(f"the recording failed with exit code {process.exitcode}")
    return killed


def _child(record: Callable[[Path], None], path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    record(path)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _pairs(path: Path) -> dict[str, bytes]:
    return {
        shard.name: shard.read_bytes() for shard in sorted((path / "pairs").glob("*.parquet"))
    }


def _record_embedded(path: Path) -> None:
    from calibrate import record

    record(num_prompts=10, steps=4, out=path, device="cpu", progress=False)


def _coefficients(path: Path) -> list[dict[str, tuple[float, ...]]]:
    from calibrate.fitting.choice import fit_branches
    from calibrate.runs.pairs import load_run

    fits = fit_branches(load_run(path), degree=4, target="output", signal="modulated_input")
    return [repr(fit) for fit in (fits.values() if isinstance(fits, dict) else fits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import diffusers  # noqa: F401 - before forking: what every child would otherwise import again
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers  # noqa: F401

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcome = kill_and_resume(_record_embedded, folder, options.kills, options.seed)
        same_fit = _coefficients(folder / RUN) == _coefficients(folder / "reference")
    sys.stdout.write(
        f"{outcome}\ncoefficients identical: {same_fit}\n{time.monotonic() - begun:.0f} s\n"
    )
    sys.exit(
        not (outcome.identical and same_fit and not outcome.lost and not outcome.rewritten)
    )


if __name__ == "__main__":
    main()
