"""The program: fast to start, one line for what goes wrong, and the exit codes that it promises."""

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import calibrate
from calibrate.cli import cli
from calibrate.errors import CalibrateError, Incomplete
from coeffs.errors import CoeffsError
from runtime.errors import RuntimeCacheError

REPOSITORY = Path(calibrate.__file__).parents[1]
TINY = ["--num-prompts", "2", "--steps", "4", "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments, code=2):
    """The one line on stderr of a command that ends with this exit code."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), "a traceback would be shown"
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def recording(monkeypatch):
    """Replaces the recording by a function of one's own."""
    module = importlib.import_module("calibrate.recording.record")
    return lambda function: monkeypatch.setattr(module, "record", function)


def test_start_needs_neither_torch_nor_numpy():
    heavy = "{'torch','numpy','diffusers','pandas'}"
    script = f"import sys; import calibrate.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout == "[]\n"


def test_help_is_fast():
    """In processor time, which other work on the machine does not add to; best of three all the same."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "calibrate", "--help"],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself_with_an_example(name):
    command = cli.commands[name]
    assert command.help and "Example:" in command.help, "one sentence and an example"
    options = [p for p in command.params if isinstance(p, click.Option)]
    undocumented = [p.name for p in options if not p.help and not isinstance(p.type, click.Choice)]
    assert not undocumented
    assert invoke(name, "--help").exit_code == 0


def test_version_and_unknown_command():
    assert calibrate.__version__ in invoke("--version").output
    assert "No such command" in refused("nonsense") or "unexpected" in refused("nonsense")


@pytest.mark.parametrize("command", ["run", "record"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "no-such-model"], "tried the embedded models, a folder here, and a hub id"),
        (["--model", "someone/no-such-model"], "Check the name and the connection"),
        (["--steps", "1"], "--steps 1: expected a whole number from 2"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--prompts", "no-such-file.txt"], "no-such-file.txt: No such file"),
        (["--num-prompts", "999"], "has 260"),
        (["--num-frames", "9"], "the pipeline takes no argument 'num_frames'"),
        (
            ["--pipe-arg", "enable_rewrite=no"],
            "takes no argument 'enable_rewrite'; did you mean enable_prompt_rewrite",
        ),
        (["--pipe-arg", "oops"], "expected KEY=VALUE"),
        (["--image", "no.png"], "'no.png' does not exist"),
        (["--device", "tpu"], "--device tpu"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--out", "/proc/run"], "/proc/run: cannot be created"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(command, *options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"), [("", "no prompt in it"), ('{"prompt": "a"}\n{', "p.jsonl:2: not JSON")]
)
def test_broken_prompt_file_is_named_with_its_line(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_text(content)
    assert said in refused("record", "--prompts", tmp_path / "p.jsonl")


def test_folder_without_model_index_is_named(tmp_path):
    assert "no model_index.json in it" in refused("record", "--model", tmp_path)


def test_embedded_model_takes_no_image(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert "the pipeline takes no image" in refused("record", "--image", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("base", "code"),
    [(CalibrateError, 2), (CoeffsError, 2), (RuntimeCacheError, 2), (Incomplete, 3)],
)
def test_expected_errors_of_all_packages_are_one_line(recording, base, code):
    def fail(**options):
        raise base("first line\nand second")

    recording(fail)
    assert refused("record", code=code) == "Error: first line and second"


def test_unexpected_errors_keep_their_traceback(recording):
    def fail(**options):
        raise ZeroDivisionError("a bug of ours")

    recording(fail)
    assert isinstance(invoke("record").exception, ZeroDivisionError)


def test_error_of_the_operating_system_names_the_file(recording):
    def fail(**options):
        raise OSError(28, "No space left on device", "/data/entry.yaml")

    recording(fail)
    assert refused("record").startswith("Error: /data/entry.yaml: No space left on device; check")


def test_failed_prompts_end_with_exit_code_3_and_are_named(recording, tmp_path):
    class Run:
        path, groups = tmp_path, [1] * 8

        def finished(self):
            return {"00000"}

        def failures(self):
            return {f"0000{i}": {"kind": "out of memory"} for i in range(1, 8)}

    recording(lambda **options: Run())
    line = refused("record", code=3)
    assert "7 of 8 prompts failed: 00001 (out of memory)" in line and "and 2 more" in line


def test_rank_other_than_0_keeps_quiet(recording, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recording(lambda **options: None)
    result = invoke("run")
    assert (result.exit_code, result.output) == (0, "")


def test_whole_job_on_the_embedded_model(tmp_path):
    """Record, fit, replay, draft entry; then nothing is recorded again, and more prompts continue the run."""
    run = tmp_path / "run"
    first = invoke(*TINY, "--out", run)
    assert first.exit_code == 0, first.output
    assert (run / "entry.yaml").exists() and "draft entry" in first.stdout
    stamps = {path: path.stat().st_mtime_ns for path in (run / "pairs").iterdir()}
    assert len(stamps) == 2
    more = invoke("record", *TINY[2:], "--num-prompts", "3", "--out", run)
    assert more.exit_code == 0 and more.stdout == f"{run}: 3 of 3 prompts recorded\n"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "holds another recording (protocol.num_steps 4 -> 5" in refused(
        "record", "--steps", 5, "--out", run
    )
    manifest = yaml.safe_load((run / "run.yaml").read_text())
    assert (
        manifest["command"]
        == "calibrate record --model tiny-longcat-image --num-prompts 2 --steps 4"
    )
    assert manifest["protocol"]["num_steps"] == 4 and manifest["protocol"]["dtype"] == "bfloat16"
    assert str(tmp_path) not in (run / "run.yaml").read_text()


def test_scheduler_that_ends_a_job_is_treated_like_ctrl_c(recording):
    recording(lambda **options: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert "interrupted; what is finished is kept" in refused("record", code=3)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "calibrate",
        "record",
        "--steps",
        "40",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run.yaml").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert "run the same command again to continue" in err and "Traceback" not in err


def test_every_verb_is_a_function_of_the_package():
    for name in ("record", "fit", "plan", "verify", "report"):
        assert callable(getattr(calibrate, name)), name
    with pytest.raises(AttributeError):
        _ = calibrate.nothing
