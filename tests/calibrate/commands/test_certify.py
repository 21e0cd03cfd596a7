"""What ``certify`` and ``audit`` print, and their exit codes."""

import dataclasses

import pandas as pd
import pytest
from analysis_data import make_frame, make_run
from click.testing import CliRunner
from coeffs_samples import certificate, sample_entry

import coeffs
from calibrate.certifying import audit as auditing
from calibrate.certifying import certify as certifying
from calibrate.certifying.audit import Audited
from calibrate.certifying.certify import Certification
from calibrate.cli import cli

UNREACHED = (
    "lossless (PSNR >= 40 dB): no policy keeps it; the best that is reachable is PSNR 38.6 dB"
)


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run", make_frame(prompts=2))
    coeffs.save(sample_entry(certificates=(certificate(),)), folder / "entry.yaml")
    return folder


def called(monkeypatch, module, result):
    """Replace the verb by one that returns this, and keep what it was called with."""
    calls = []

    def verb(source, **options):
        calls.append(options)
        return result

    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], verb)
    return calls


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("unreached", "code"), [((), 0), ((UNREACHED,), 1)])
def test_certificates_are_shown_and_a_tier_that_is_not_reached_is_exit_code_1(
    run, monkeypatch, unreached, code
):
    done = Certification((certificate(),), unreached, {"plan": "no noise levels"}, run)
    calls = called(monkeypatch, certifying, done)
    result = invoke("certify", run, "--risk", "0.1")
    assert result.exit_code == code
    assert "high  gate at threshold 0.2, 14 of 28 steps  0 of 100     1.80x" in result.stdout
    assert "refused: plan: no noise levels" in result.stdout
    assert result.stderr.rstrip().endswith(f"Error: {UNREACHED}") == bool(unreached)
    assert [str(tier) for tier in calls[0]["tiers"]] == [
        "lossless (PSNR >= 40 dB)", "high (PSNR >= 25 dB)"
    ]  # fmt: skip
    assert calls[0]["risk"] == 0.1 and calls[0]["policies"] == [
        "plan",
        "gate",
        "fewer-steps",
    ]


def test_tiers_of_ones_own_stand_beside_the_limits_on_the_command_line(run, monkeypatch):
    calls = called(monkeypatch, certifying, Certification((), (), {}, run))
    options = [
        "--tier",
        "preview:psnr=22",
        "--psnr",
        "35",
        "--ssim",
        "0.95",
        "--quality",
        "print",
    ]
    assert invoke("certify", run, *options).exit_code == 0
    assert [str(tier) for tier in calls[0]["tiers"]] == [
        "preview (PSNR >= 22 dB)", "print (PSNR >= 35 dB and SSIM >= 0.95)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tier", "high"], "expected name:psnr=35,ssim=0.95"),
        (["--psnr", "30", "--quality", "exact"], "which is the tier without a cache"),
        (["--risk", "0"], "Invalid value for '--risk'"),
        (["--confidence", "1"], "Invalid value for '--confidence'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, said):
    result = invoke("certify", run, *arguments)
    assert (
        result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    )


def test_an_entry_cannot_be_certified_because_it_does_not_tell_its_prompts(run):
    result = invoke("certify", run / "entry.yaml", "--psnr", "30")
    assert result.exit_code == 2 and "no run, and only a run tells" in result.stderr


@pytest.mark.parametrize(
    ("missed", "p", "code", "verdict"),
    [
        (1, 0.6, 0, "yes, as far as so few prompts tell: 1 of 20 prompts missed it"),
        (2, 0.3, 1, "in doubt: 2 of 20 prompts missed it"),
        (4, 0.001, 1, "no: 4 of 20 prompts missed it"),
    ],
)
def test_an_audit_says_whether_the_promise_holds_and_exits_1_where_more_missed_than_promised(
    run, monkeypatch, missed, p, code, verdict
):
    found = Audited(certificate(), missed, 20, p, 0.05, False, pd.DataFrame())
    calls = called(monkeypatch, auditing, [found])
    result = invoke(
        "audit", run, "--tier", "high", "--dtype", "float16", "--num-prompts", "20"
    )
    assert result.exit_code == code and certificate().promise in result.stdout
    assert f"holds here: {verdict}" in result.stdout
    assert ("high: not shown to hold here" in result.stderr) == bool(code)
    assert calls[0]["tiers"] == ("high",) and calls[0]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("missed", "prompts", "p", "level", "holds"),
    [
        (29, 100, 0.5, 0.05, True),  # exactly the promised share, whatever floats make of it
        (30, 100, 0.4, 0.05, False),
        (1, 20, 0.64, 0.7, False),  # refuted at a low confidence
    ],
)
def test_an_audit_holds_at_the_promised_share_and_not_where_it_is_refuted(
    missed, prompts, p, level, holds
):
    promise = dataclasses.replace(certificate(), risk=0.29)
    assert Audited(promise, missed, prompts, p, level, False, pd.DataFrame()).holds == holds
