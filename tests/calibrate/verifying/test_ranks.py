"""The ranks of one launch share the prompts of a verification; rank 0 concludes as one process would."""

import importlib
import json
import os
import shutil
import time
import types
from collections.abc import Iterator
from pathlib import Path

import forked
import pandas as pd
import pytest
from tiny_pipeline import TinyPipeline

import coeffs
from calibrate import fit, record
from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt
from calibrate.trials.bench import Bench
from calibrate.verifying.results import load_verification
from calibrate.verifying.verify import verify

pytestmark = pytest.mark.slow

TIMES = ["seconds", "uncached_seconds"]
PROMPTS = [f"a thing number {number}" for number in range(7)]
OPTIONS = dict(prompts=PROMPTS[:4], budgets=[3], policies=["gate", "uniform", "fewer-steps"])


def rank_of(run: Path, rank: int, ranks: int) -> None:
    """One rank; it goes on from its first prompt when all have one."""
    environment = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": 29555}
    os.environ.update({name: str(value) for name, value in environment.items()})
    pipe, claimed = TinyPipeline(), Bench._claimed

    def waited_for(bench: Bench) -> Iterator[Prompt]:
        for prompt in claimed(bench):
            (run.parent / f"ready-{rank}").touch()
            while len(list(run.parent.glob("ready-*"))) < ranks:
                time.sleep(0.01)
            yield prompt

    Bench._claimed = waited_for
    found = verify(run, model=pipe, progress=False, **OPTIONS)
    (run.parent / f"said-{rank}").write_text("concluded" if found else "left")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one" / "run"
    record(TinyPipeline(), prompts=PROMPTS[4:], steps=6, out=folder, progress=False)
    coeffs.save(fit(folder), folder / "entry.yaml")
    return folder


def verified(run: Path, ranks: int) -> list[str]:
    """What each rank said at the end. Forked: a process of its own would load everything for 5 s first."""
    context = forked.context()
    started = [
        context.Process(target=rank_of, args=(run, rank, ranks), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * ranks
    return [(run.parent / f"said-{rank}").read_text() for rank in range(ranks)]


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
