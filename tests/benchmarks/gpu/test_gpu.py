"""The one command for all figures, at toy size on the CPU."""

import json
import time
from dataclasses import replace

import forked
import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import planning, store
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cases import Case, all_cases
from benchmarks.workloads import MODELS, load_workload, names

pytestmark = pytest.mark.slow


def run(*options: str) -> str:
    result = CliRunner().invoke(main, ["--toy", "--rounds", "1", *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("case", all_cases(toy=True), ids=lambda case: case.name)
def test_every_case_runs_and_writes_its_row(case, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "FOLDER", tmp_path)
    path = tmp_path / "rows.json"
    text = run("--only", case.name, "--out", path)
    row = json.loads(path.read_text())["rows"][case.name]
    assert "failed" not in row
    assert {"processor", "commit", "torch"} <= set(row["surroundings"])
    assert row["figures"] and f"## {case.kind.capitalize()}" in text
    if case.kind == "planning":
        assert "plan" in {cell["policy"] for cell in row["figures"]["rows"]}
        monkeypatch.setattr(planning, "KINDS", {case.model: untrainable(case.model)})
        again = planning.measure(planning.Subject(case.model, toy=True), 1)
        assert json.loads(json.dumps(again)) == row["figures"]


def untrainable(name: str) -> planning.Kind:
    def train(*_: object) -> None:
        pytest.fail("trained again")

    return replace(planning.KINDS[name], train=train)


def test_a_killed_run_keeps_its_rows_and_goes_on(tmp_path):
    path = tmp_path / "rows.json"
    process = forked.start(
        "benchmarks.gpu", ["--toy", "--rounds", "1", "--out", str(path)], tmp_path / "err"
    )
    deadline = time.monotonic() + 120
    while not path.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = json.loads(path.read_text())["rows"]
    first, second = (case.name for case in all_cases(toy=True)[:2])
    assert first in kept
    run("--only", first.partition("/")[0] + "/longcat", "--out", path)
    run("--only", second, "--out", path)
    rows = json.loads(path.read_text())["rows"]
    assert rows[first] == kept[first], "a finished row is not measured again"
    assert second in rows


def test_a_failure_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    def refuse(workload, rounds):
        raise MemoryError("too little\nmemory")

    path = tmp_path / "rows.json"
    cases = [
        Case("measures", "flux1-dev", refuse),
        Case("verify", "flux1-dev", lambda *_: {"x": 1}),
    ]
    monkeypatch.setattr("benchmarks.gpu.__main__.all_cases", lambda toy: cases)
    text = run("--only", "measures", "--out", path)
    assert "- measures/flux1-dev: MemoryError: too little memory" in text
    assert not store.Store(path).is_done("measures/flux1-dev")
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.all_cases",
        lambda toy: [
            Case("measures", "flux1-dev", lambda *_: {"milliseconds": {"PSNR": 1.0}})
        ],
    )
    assert "| PSNR | 1.0 |" in run("--out", path)
    assert store.Store(path).is_done("measures/flux1-dev")


def test_no_case_begins_when_time_is_up(tmp_path):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["--toy", "--minutes", "0", "--out", str(path)])
    assert f"goes on with {len(all_cases(toy=True))} cases" in result.stderr
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the models are trained")
def test_models_are_not_trained_at_full_size_on_a_cpu(tmp_path):
    result = CliRunner().invoke(
        main, ["--minutes", "0", "--out", str(tmp_path / "rows.json")]
    )
    assert "planning/ is left out: its models take hours to train on a CPU" in result.stderr
    assert "planning" not in {case.kind for case in all_cases(toy=False)}


def test_configurations_are_of_published_sizes():
    """Parameters in billions, counted without memory for them, as the models' cards give them."""
    import diffusers

    billions = {
        "longcat-image": 6.3,
        "wan2.1-1.3b": 1.4,
        "flux1-dev": 11.9,
        "qwen-image": 20.4,
    }
    assert (
        set(billions)
        == set(names(toy=True))
        == {p.stem for p in MODELS.iterdir()} - {"flux1-scaled"}
    )
    for name, expected in billions.items():
        workload = load_workload(name, toy=False)
        with torch.device("meta"):
            model = getattr(diffusers, workload.transformer_class)(**workload.config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e9 == pytest.approx(expected, abs=0.05)
