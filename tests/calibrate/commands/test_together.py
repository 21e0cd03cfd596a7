"""Several commands on one run, and one command started as several ranks."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from analysis_data import make_frame, make_run
from click.testing import CliRunner

import calibrate
from calibrate.cli import cli
from calibrate.errors import InvalidOption, RunInUse
from calibrate.runs.lock import hold

REPOSITORY = Path(calibrate.__file__).parents[1]
COMMANDS = {"plan": ["--computed", "3"], "verify": []}
FUNCTIONS = {
    "plan": "calibrate.planning.plan",
    "verify": "calibrate.verifying.verify",
    "certify": "calibrate.certifying.certify",
    "audit": "calibrate.certifying.audit",
}
HOLDER = """
import sys, time
from calibrate.runs.lock import hold
with hold(sys.argv[1], "verifying"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    manifest = {"format": 1, "model": "toy", "prompts": [], "protocol": {"num_steps": 4}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(manifest))
    return tmp_path / "run"


@pytest.fixture
def calls(monkeypatch):
    """Which of the library's functions were called."""
    called = []
    for name, module in FUNCTIONS.items():
        monkeypatch.setattr(
            f"{module}.{name}", lambda *args, name=name, **options: called.append(name)
        )
    return called


@pytest.fixture
def holder(run):
    """Another process that verifies the run."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


@pytest.mark.parametrize("command", COMMANDS)
def test_second_command_on_a_run_is_refused_and_names_the_first(command, run, holder):
    """Bug: two verifications in one folder did everything twice and spoiled each other's timings."""
    result = CliRunner().invoke(cli, [command, str(run), *COMMANDS[command]])
    assert result.exit_code == 2
    assert (
        f"process {holder.pid} on" in result.stderr
        and "is verifying this run" in result.stderr
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_hold_the_run_like_the_commands(name, run, holder):
    """Bug: called from Python they did not look whether somebody else was at work there."""
    function = getattr(importlib.import_module(FUNCTIONS[name]), name)
    with pytest.raises(RunInUse, match=f"process {holder.pid} on .* is verifying this run"):
        function(run)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"verify"}))
def test_functions_for_one_process_are_refused_on_other_ranks(name, run, monkeypatch):
    """Bug: in a script under torchrun every rank did all of it, in one folder at once."""
    monkeypatch.setenv("RANK", "1")
    function = getattr(importlib.import_module(FUNCTIONS[name]), name)
    with pytest.raises(RunInUse, match="call it on rank 0 only"):
        function(run)


def test_run_without_an_entry_says_what_makes_one_in_python_too(tmp_path):
    run = make_run(tmp_path / "run", make_frame(prompts=2))
    with pytest.raises(
        InvalidOption, match=r"in Python coeffs\.save\(calibrate\.fit\("
    ) as caught:
        calibrate.verify(run)
    assert "\n" not in str(caught.value)


def test_planning_is_left_to_rank_0_and_the_others_say_so(run, calls, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(cli, ["plan", str(run), *COMMANDS["plan"]])
    assert (result.exit_code, calls, result.stdout) == (0, [], "")
    assert (
        result.stderr == "rank 1: `calibrate plan` works in one process; rank 0 does it all\n"
    )


def test_rank_1_of_a_verification_does_its_share_and_leaves_the_end_to_rank_0(
    run, calls, monkeypatch
):
    """Bug: `torchrun -m calibrate verify` made every rank do everything, and later rank 0 alone."""
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(cli, ["verify", str(run)])
    assert (result.exit_code, calls, result.stdout) == (0, ["verify"], "")
    assert result.stderr.endswith(
        "rank 1: its share of the prompts is done; rank 0 concludes\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_command_says_first_what_it_works_on(command, run, calls):
    result = CliRunner().invoke(cli, [command, str(run), *COMMANDS[command]])
    head = result.stderr.split("folder")[0]
    for text in (f"{command}: ", "toy", "4 steps", "0 of 0 prompts"):
        assert text in head
    assert str(run) in result.stderr


def test_verification_of_an_entry_holds_its_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold("runs/verify-vllm-omni-qwen-image@v1", "verifying"):
        result = CliRunner().invoke(cli, ["verify", "vllm-omni/qwen-image"])
    assert result.exit_code == 2
    assert "runs/verify-vllm-omni-qwen-image@v1: this process is" in result.stderr
