"""The program: fast to start, one line for what goes wrong, and the exit codes that it promises."""

import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import forked
import pytest
import yaml
from click.testing import CliRunner

import calibrate
import coeffs
from calibrate.cli import cli
from calibrate.errors import CalibrateError, Incomplete
from calibrate.model.table import model_table
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
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
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
    undocumented = [
        p.name for p in options if not p.help and not isinstance(p.type, click.Choice)
    ]
    assert not undocumented
    assert invoke(name, "--help").exit_code == 0


def test_version_and_unknown_command():
    assert calibrate.__version__ in invoke("--version").output
    assert "No such command" in refused("nonsense") or "unexpected" in refused("nonsense")


@pytest.mark.parametrize("command", ["run", "record"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--model", "no-such-model"],
            "tried the embedded models, a folder here, and a hub id",
        ),
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
    ("content", "said"),
    [("", "no prompt in it"), ('{"prompt": "a"}\n{', "p.jsonl:2: not JSON")],
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
    assert refused("record").startswith(
        "Error: /data/entry.yaml: No space left on device; check"
    )


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
    assert (
        manifest["protocol"]["num_steps"] == 4 and manifest["protocol"]["dtype"] == "bfloat16"
    )
    assert str(tmp_path) not in (run / "run.yaml").read_text()


SENDS_SIGTERM = """
import importlib, os, signal, sys
sys.argv = ["calibrate", "record", "--out", "some/folder"]
module = importlib.import_module("calibrate.recording.record")
module.record = lambda **options: os.kill(os.getpid(), signal.SIGTERM)
from calibrate.__main__ import main
main()
"""


def test_scheduler_that_ends_a_job_is_treated_like_ctrl_c():
    done = subprocess.run(
        [sys.executable, "-c", SENDS_SIGTERM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "some/folder: interrupted; what is finished is kept" in done.stderr.strip()


CALLED_AS = """
import sys
sys.argv = [f"/usr/bin/{sys.argv[1]}", "--help"]
from calibrate.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["record", "--model", "{0}", "--out", "new"], "new"),
        (["--out=new"], "new"),
        (["plan", "--no-runs", "{0}"], "{0}"),
        (["fit", "{0}", "--registry", "elsewhere"], "{0}"),
        (["record", "--model", "{0}"], ""),
    ],
)
def test_signal_before_the_words_are_parsed_names_the_folder_too(words, folder, tmp_path):
    words = [word.format(tmp_path) for word in words]
    script = (
        f"import sys, calibrate.__main__ as m; sys.argv[1:] = {words!r}; m._end(15, None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    where = f"{folder.format(tmp_path)}: " if folder else ""
    assert done.returncode == 3 and done.stderr.startswith(
        f"\nError: {where}interrupted; what"
    )


@pytest.mark.parametrize("program", ["calibrate", "teacal"])
def test_program_answers_to_both_names(program):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"][program] == "teacal:main"
    done = subprocess.run(
        [sys.executable, "-c", CALLED_AS, program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"Usage: {program} ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reccord"], "No such command 'reccord'; did you mean record"),
        (["verfy", "RUN"], "did you mean verify"),
        (["--model", "long-cat-image"], "did you mean LongCat-Image"),
        (["record", "--prompts", "defalt"], "did you mean default?"),
        (["fit", "runs/toy-2"], "did you mean runs/toy-1?"),
    ],
)
def test_mistyped_names_are_answered_with_the_nearest(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "toy-1").mkdir(parents=True)
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", ""],
        ["--out", ""],
        ["record", "--out="],
        ["fit", ""],
        ["verify", "RUN", "--out", ""],
    ],
)
def test_empty_values_are_refused(arguments, tmp_path, monkeypatch):
    """Bug: an unset variable in a script calibrated the embedded model, or wrote into the current folder."""
    monkeypatch.chdir(tmp_path)
    assert "empty; give a value, or leave the option away" in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_help_names_the_model_and_the_order_of_work():
    for flag in ("-h", "--help"):
        text = invoke(flag).output
        places = [
            text.index(f"calibrate {word}")
            for word in ("--model", "plan", "verify", "report")
        ]
        assert places == sorted(places) and "calibrate models" in text
        assert max(map(len, text.splitlines())) <= 100


def test_models_lists_every_alias_in_100_columns():
    lines = invoke("models").output.splitlines()
    assert {line.split()[0] for line in lines[1:]} == {row.alias for row in model_table()}
    assert max(map(len, lines)) <= 100


def test_entries_that_the_help_names_exist():
    """Bug: the example of `fit --help` failed."""
    for command in cli.commands.values():
        for entry in re.findall(r"--score (\S+)", command.help or ""):
            assert coeffs.load(entry)


def test_error_of_the_operating_system_without_a_file_name_is_one_line(recording):
    """Bug: it was shown as a traceback; libraries that write through a stream raise it."""

    def fail(**options):
        raise OSError(28, "No space left on device")

    recording(fail)
    line = refused("record")
    assert line.startswith("Error: calibrate record: No space left on device; check")


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    words = ["record", "--steps", "40", "--device", "cpu", "--out", str(tmp_path / "run")]
    process = forked.start("calibrate", words, tmp_path / "err")
    while not (tmp_path / "run" / "run.yaml").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 3, err
    assert "run the same command again to continue" in err and "Traceback" not in err


def test_every_verb_is_a_function_of_the_package():
    for name in ("record", "fit", "plan", "verify", "report"):
        assert callable(getattr(calibrate, name)), name
    with pytest.raises(AttributeError):
        _ = calibrate.nothing


def test_every_policy_is_listed_with_what_it_is():
    from calibrate.verifying.lineup import POLICIES

    listed = CliRunner().invoke(cli, ["verify", "--list-policies"])
    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(POLICIES)
    assert all(
        policy.label in line for policy, line in zip(POLICIES.values(), lines, strict=True)
    )
