"""A run's entry: refitting keeps what is still true, and nobody's update undoes another's."""

import dataclasses
import threading

import pytest
from analysis_data import make_frame, make_run
from click.testing import CliRunner
from coeffs_samples import certificate

import coeffs
from calibrate.cli import cli
from calibrate.runs.entry_file import (
    PLAN_WARNING,
    VERIFIED_WARNING,
    carried_over,
    update_entry,
)
from coeffs.errors import CoeffsError

PLANS = (coeffs.Plan(schedule="CS" * 10), coeffs.Plan(schedule="CSSS" * 5))
WORDS = (PLAN_WARNING + "fewer steps is better", VERIFIED_WARNING + "uniform is better")


@pytest.fixture
def run(tmp_path):
    """A fitted run with two plans, two verified thresholds and their warnings."""
    folder = make_run(tmp_path / "run", make_frame(prompts=4))
    assert CliRunner().invoke(cli, ["fit", str(folder)]).exit_code == 0
    update_entry(folder / "entry.yaml", verified)
    return folder


def verified(entry):
    replayed = [row for row in entry.thresholds if row.kind == "replay"]
    rows = [dataclasses.replace(row, kind="verified", speedup=1.5) for row in replayed[:2]]
    warnings = (*entry.warnings, *WORDS)
    return dataclasses.replace(
        entry, plans=PLANS, thresholds=(*replayed, *rows), warnings=warnings, max_skips=5
    )


def fit(folder, *options):
    result = CliRunner().invoke(cli, ["fit", str(folder), *options])
    assert result.exit_code == 0, result.output
    return coeffs.load(folder / "entry.yaml"), result.stdout


def kinds(entry):
    return sorted(row.kind for row in entry.thresholds if row.kind != "replay")


def test_a_fit_that_gives_the_same_coefficients_keeps_all_that_was_measured(run):
    before = coeffs.load(run / "entry.yaml")
    entry, said = fit(run, "--score", "1,2,3")
    assert entry.plans == PLANS and entry.max_skips == 5
    assert kinds(entry) == ["verified", "verified"] and entry.thresholds == before.thresholds
    assert set(WORDS) <= set(entry.warnings) and len(set(entry.warnings)) == len(
        entry.warnings
    )
    assert "kept 2 plans" in said
    assert "kept 2 verified thresholds: the coefficients are the same" in said
    assert fit(run)[0].thresholds == before.thresholds


def test_another_fit_keeps_the_plans_and_says_what_it_drops_and_why(run):
    entry, said = fit(run, "--degree", "2")
    assert entry.plans == PLANS and kinds(entry) == []
    assert WORDS[0] in entry.warnings and WORDS[1] not in entry.warnings
    assert "dropped 2 verified thresholds: they belong to other coefficients" in said


def test_an_entry_of_another_model_gives_nothing(run):
    old = coeffs.load(run / "entry.yaml")
    other = dataclasses.replace(old, model="another")
    new = dataclasses.replace(old, plans=None, thresholds=(), warnings=())
    said = []
    assert carried_over(new, None, said.append) == new and said == []
    assert carried_over(new, other, said.append) == new
    (text,) = said
    assert "another model" in text


def test_updates_of_many_writers_are_all_kept(run):
    path = run / "entry.yaml"

    def add(name):
        update_entry(path, lambda e: dataclasses.replace(e, warnings=(*e.warnings, name)))

    names = [f"writer {number}" for number in range(8)]
    writers = [threading.Thread(target=add, args=[name]) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(names) <= set(coeffs.load(path).warnings)


def test_a_file_that_is_no_entry_is_named_and_left_alone(run):
    (run / "entry.yaml").write_text("half an entry: [")
    result = CliRunner().invoke(cli, ["fit", str(run)])
    assert result.exit_code == 2 and "entry.yaml" in result.output
    assert (run / "entry.yaml").read_text() == "half an entry: ["
    with pytest.raises(CoeffsError, match="nothing was changed"):
        entry = coeffs.load("alivilab/flux1-dev")
        update_entry("/proc/nowhere/entry.yaml", lambda old: entry)


def test_a_fit_keeps_the_certificates_of_what_it_does_not_change(run):
    of_gate = certificate()
    of_plan = certificate(policy="plan", threshold=None, plan=PLANS[0])
    update_entry(
        run / "entry.yaml",
        lambda entry: dataclasses.replace(entry, certificates=(of_gate, of_plan)),
    )
    entry, said = fit(run)
    assert entry.certificates == (of_gate, of_plan) and "kept 2 of 2 certificates" in said
    entry, said = fit(run, "--degree", "2")
    assert entry.certificates == (of_plan,) and "kept 1 of 2 certificates" in said
