"""``calibrate fit``: tables on stdout, the entry on disk, one line for what is wrong."""

import pytest
from analysis_data import make_frame, make_run
from click.testing import CliRunner

import coeffs
from calibrate.commands.fit import COMMANDS, fit_and_report
from calibrate.errors import CalibrateError
from coeffs.errors import CoeffsError

FLUX = "498.65,-283.78,55.86,-3.82,0.264"


def invoke(*arguments):
    return CliRunner().invoke(COMMANDS[0], [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", make_frame(prompts=6, steps=30))


def test_tables_warnings_and_the_path_of_the_entry(run):
    result = invoke(run)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (
        lines[0]
        == "Fit of some-model@v0: modulated_input -> output, 6 prompts (* recommended)"
    )
    assert [line.split()[0] for line in lines[1:5]] == [
        "branch",
        "cond",
        "uncond",
        "pooled",
    ]
    assert (
        "Held-out R² by signal and target" in result.stdout
        and "Prompts needed: cond " in result.stdout
    )
    assert (
        "threshold  computed steps  95 % interval  single prompts  expected speed-up"
        in result.stdout
    )
    assert "the stack is 80 % of a call" in result.stdout
    assert "warning: 6 prompts only" in result.stdout
    assert lines[-1] == f"draft entry: {run / 'entry.yaml'}"
    assert max(map(len, lines[:20])) <= 120
    entry = coeffs.load(run / "entry.yaml")
    assert entry.fit(branch="cond").degree == 4
    assert (
        entry.source.command
        == "calibrate fit RUN --degree 4 --target output --signal modulated_input"
    )
    assert str(run) not in (run / "entry.yaml").read_text()


def test_options(run, tmp_path):
    result = invoke(run, "--degree", 2, "--target", "residual", "--constrained", "--out", tmp_path / "entry.yaml",
                    "--speedup", 1.5, "--score", FLUX)  # fmt: skip
    assert result.exit_code == 0, result.output
    entry = coeffs.load(tmp_path / "entry.yaml")
    assert (entry.fit().degree, entry.fit().method, entry.target) == (
        2,
        "constrained",
        "residual",
    )
    assert "1.5" in next(line for line in result.stdout.splitlines() if " < " in line)
    assert any(
        line.startswith("coefficients transformer/cond")
        for line in result.stdout.splitlines()
    )


def test_several_runs_are_one(tmp_path):
    frame = make_frame(prompts=6)
    halves = [
        make_run(tmp_path / str(half), frame[frame["prompt_id"].isin(names)])
        for half, names in enumerate((["p00", "p01", "p02"], ["p03", "p04", "p05"]))
    ]
    assert invoke(*halves).exit_code == 0
    whole = make_run(tmp_path / "whole", frame)
    assert invoke(whole).exit_code == 0
    parts, together = (coeffs.load(path / "entry.yaml") for path in (halves[0], whole))
    assert parts.source.log_sha256 == together.source.log_sha256
    assert parts.fit() == together.fit()


def test_the_default_command_passes_what_it_has(run):
    fit_and_report([run], degree=3, registry=None)
    assert coeffs.load(run).fit().degree == 3


@pytest.mark.parametrize("arguments,error", [
    (["nowhere"], CalibrateError), (["--score", "no-such-entry"], CoeffsError), (["--score", "1,nan"], CoeffsError),
    (["--score", "1,2,3,4,5,6,7,8"], CoeffsError), (["--speedup", "40"], CalibrateError),
])  # fmt: skip
def test_expected_errors_are_one_line_and_leave_the_entry_alone(
    run, tmp_path, arguments, error
):
    out = tmp_path / "entry.yaml"
    result = invoke(*([] if arguments == ["nowhere"] else [run]), *arguments, "--out", out)
    assert isinstance(result.exception, error)
    assert "\n" not in str(result.exception) and not out.exists() and not result.stdout


def test_a_truncated_file_loses_nothing(tmp_path):
    run = make_run(tmp_path / "run", make_frame(prompts=3))
    assert invoke(run).exit_code == 0
    before = (run / "entry.yaml").read_bytes()
    file = next((run / "pairs").iterdir())
    file.write_bytes(file.read_bytes()[:500])
    result = invoke(run)
    assert file.name in str(result.exception) and (run / "entry.yaml").read_bytes() == before


def test_a_read_only_place_is_one_line(run):
    result = invoke(run, "--out", "/proc/entry.yaml")
    assert isinstance(result.exception, CoeffsError) and "nothing was changed" in str(
        result.exception
    )


@pytest.mark.parametrize(
    "wrong", [["--degree", "7"], ["--degree", "0"], ["--target", "vibes"], []]
)
def test_wrong_usage(run, wrong):
    assert invoke(*([run, *wrong] if wrong else [])).exit_code == 2
