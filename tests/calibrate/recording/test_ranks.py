"""Several processes on one run folder: each group is recorded once, by whoever gets it; nothing waits for the dead."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pandas  # noqa: F401 - what the forked ranks need is imported once, here
import pyarrow.parquet  # noqa: F401
import pytest
import record_rank
import torch  # noqa: F401

pytestmark = pytest.mark.slow

GROUPS = 16


def rank_of(folder, rank, world, port, options):
    environment = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.stderr = open(folder / f"{rank}.{port}.err", "w", buffering=1)  # noqa: SIM115 - until the process ends
    record_rank.record_rank(folder, **options)


def start(folder, world, port=29511, ranks=None, **options):
    """Real processes with the environment that torchrun gives its workers."""
    options = {"groups": GROUPS} | options
    context = forked.context()
    processes = [
        context.Process(target=rank_of, args=(folder, rank, world, port, options))
        for rank in ranks or range(world)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def said(folder, rank):
    return json.loads((folder / f"{rank}.json").read_text())


def pairs(folder):
    return {
        shard.name: shard.read_bytes()
        for shard in (folder / "run" / "pairs").glob("*.parquet")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process records."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(folder, 1)) == [0]
    return pairs(folder)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_groups_and_give_the_same_bytes(tmp_path, alone, world):
    assert finish(start(tmp_path, world)) == [0] * world
    assert pairs(tmp_path) == alone and len(alone) == GROUPS - 1
    recorded = [
        prompt for rank in range(world) for prompt in said(tmp_path, rank)["recorded"]
    ]
    assert len(recorded) == len(set(recorded)) == GROUPS, (
        "a group was recorded twice, or not at all"
    )
    assert (
        len(said(tmp_path, 0)["missing"]) == 1
    )  # the bad prompt, which no other rank tried again


def test_lost_rank_costs_only_what_it_was_at(tmp_path, alone):
    assert finish(start(tmp_path, 2, loses=1)) == [0, 9]
    assert pairs(tmp_path) == alone


def test_rank_0_that_is_lost_leaves_what_is_missing_to_a_restart(tmp_path, alone):
    assert finish(start(tmp_path, 2, loses=0)) == [9, 0]
    assert len(pairs(tmp_path)) >= GROUPS - 2
    assert finish(start(tmp_path, 2)) == [0, 0]
    assert pairs(tmp_path) == alone


def test_another_job_is_refused_while_ranks_are_at_work(tmp_path):
    ranks = start(tmp_path, 2, seconds=0.3)
    while not (tmp_path / "run" / "run.yaml").exists():
        time.sleep(0.01)
    assert finish(start(tmp_path, 2, port=29512, ranks=[1])) == [1]
    assert "is recording into this run" in (tmp_path / "1.29512.err").read_text()
    assert finish(ranks) == [0, 0]


def test_ranks_of_one_model_run_the_same_prompts_and_one_of_them_writes(tmp_path, alone):
    """Under context parallelism a rank with a prompt of its own would hang in the first collective."""
    assert finish(start(tmp_path, 2, together=True)) == [0, 0]
    assert pairs(tmp_path) == alone
    first, second = (said(tmp_path, rank)["recorded"] for rank in range(2))
    assert first == second and len(first) == GROUPS


def test_torchrun_starts_it(tmp_path, alone):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launcher, str(Path(record_rank.__file__)), str(tmp_path), str(GROUPS)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pairs(tmp_path) == alone
