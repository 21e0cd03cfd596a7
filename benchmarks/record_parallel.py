"""Time of recording the embedded model with one process and with two, under torchrun, in alternation.

    python benchmarks/record_parallel.py [--rounds 3] [--num-prompts 12] [--steps 28]

One thread per process. Prints seconds of recording alone (starting Python and loading the model is the same for every
rank and not counted) and of the whole command, their ratio, and whether the pairs are the same bytes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def record(path: Path, ranks: int, options: list[str]) -> tuple[float, float]:
    """(seconds from the first claim to the last shard, seconds of the whole command)."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, *launcher, "-m", "calibrate", "record", "--device", "cpu", "--out", str(path), *options],
        cwd=REPOSITORY, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    whole = time.monotonic() - begun
    written = [shard.stat().st_mtime for shard in (path / "pairs").glob("*.parquet")]
    return max(written) - (path / "run.yaml").stat().st_mtime, whole


def pairs(path: Path) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in (path / "pairs").glob("*.parquet")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=28)
    chosen = parser.parse_args()
    options = ["--num-prompts", str(chosen.num_prompts), "--steps", str(chosen.steps)]
    ratios, whole_ratios, same = [], [], True
    with tempfile.TemporaryDirectory() as name:
        for number in range(chosen.rounds):
            one, two = Path(name) / f"{number}-one", Path(name) / f"{number}-two"
            (alone, alone_whole), (shared, shared_whole) = (
                record(one, 1, options),
                record(two, 2, options),
            )
            ratios.append(shared / alone)
            whole_ratios.append(shared_whole / alone_whole)
            same &= pairs(one) == pairs(two)
            sys.stdout.write(
                f"recording {alone:.1f} s with 1 process, {shared:.1f} s with 2 (ratio {shared / alone:.2f}); "
                f"whole command {alone_whole:.1f} s and {shared_whole:.1f} s\n"
            )
    sys.stdout.write(
        f"median ratio {statistics.median(ratios):.2f} (whole command {statistics.median(whole_ratios):.2f}); "
    )
    sys.stdout.write(f"same bytes: {same}\n")


if __name__ == "__main__":
    main()
