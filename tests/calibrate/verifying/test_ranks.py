"""The ranks of one launch share the prompts of a verification; rank 0 concludes as one process would."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

import calibrate
import coeffs
from calibrate import fit, record
from calibrate.errors import InvalidOption
from calibrate.verifying.results import load_verification

pytestmark = pytest.mark.slow

TIMES = ["seconds", "uncached_seconds"]
# Ranks begin when all have loaded what they need, so that each finds prompts to claim.
RANK = """
import sys, time
from pathlib import Path

from calibrate.verifying.verify import verify

run, ranks = Path(sys.argv[1]), int(sys.argv[2])
Path(sys.argv[3]).touch()
while len(list(run.parent.glob("ready-*"))) < ranks:
    time.sleep(0.01)
options = dict(num_prompts=4, budgets=[3], policies=["gate", "uniform", "fewer-steps"])
found = verify(run, progress=False, device="cpu", **options)
print("concluded" if found else "left")
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one" / "run"
    record(num_prompts=3, steps=6, device="cpu", out=folder, progress=False)
    coeffs.save(fit(folder), folder / "entry.yaml")
    return folder


def verified(run: Path, ranks: int) -> list[str]:
    """What each rank said at the end."""
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_PORT": "29555"}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                str(run),
                str(ranks),
                str(run.parent / f"ready-{rank}"),
            ],
            cwd=Path(calibrate.__file__).parents[1],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return said


def keys(file: Path) -> list[str]:
    return [json.loads(line)["key"] for line in file.read_text().splitlines() if line]


def test_two_ranks_give_the_rows_of_one_process(recorded, tmp_path):
    two = tmp_path / "two" / "run"
    shutil.copytree(recorded, two)
    assert verified(recorded, 1) == ["concluded"]
    assert verified(two, 2) == ["concluded", "left"]
    alone, together = load_verification(recorded), load_verification(two)
    rows, shared = (found.results.drop(columns=TIMES) for found in (alone, together))
    pd.testing.assert_frame_equal(shared, rows)
    assert [one.difference for one in together.comparisons] == [
        one.difference for one in alone.comparisons
    ]
    # Both ran prompts, and none was run twice.
    first, second = (
        keys(two / "verify" / name) for name in ("results.jsonl", "results-1.jsonl")
    )
    assert first and second
    assert sorted(first + second) == sorted(keys(recorded / "verify" / "results.jsonl"))


def test_ranks_that_hold_one_model_together_do_not_share_prompts(tmp_path, monkeypatch):
    """One that took a prompt of its own would wait in the first collective for ever."""
    module = importlib.import_module("calibrate.verifying.verify")
    case = types.SimpleNamespace(
        session=types.SimpleNamespace(modules={"transformer": object()})
    )
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "lockstep_group", lambda _: "a group")
    with pytest.raises(InvalidOption, match="verify in one process"):
        module._check_ranks(case)
    monkeypatch.setattr(module, "lockstep_group", lambda _: None)
    module._check_ranks(case)
