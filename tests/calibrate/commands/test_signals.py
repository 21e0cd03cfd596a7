"""SIGINT and SIGTERM at random moments of every command: one clean line, exit code 3, and nothing lost.

    SIGNAL_MOMENTS=40 python -m pytest tests/calibrate/commands/test_signals.py

spreads that many moments over all commands, each in a process of its own; the suite interrupts the longest three once.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from click.testing import CliRunner

import calibrate
import coeffs
from calibrate.cli import cli

pytestmark = pytest.mark.slow

REPOSITORY = Path(calibrate.__file__).parents[1]
MOMENTS = int(os.environ.get("SIGNAL_MOMENTS", 0))
# The suite interrupts those that run for long, once each: two at work, in a fork that need not load anything, and
# the third in a process of its own, while it loads.
FORKED = () if MOMENTS else ("record", "verify")
QUICK = (*FORKED, "plan")
# "RUN" stands for the folder that each command works on.
COMMANDS = {
    "record": "record --num-prompts 4 --steps 5 --device cpu --out RUN",
    "run": "--num-prompts 2 --steps 5 --device cpu --out RUN",
    "fit": "fit RUN",
    "plan": "plan RUN --computed 3 --choosing 1 --num-prompts 1 --candidates 1 --device cpu",
    "verify": "verify RUN --num-prompts 1 --budgets 3 --policies gate,uniform --device cpu",
    "report": "report RUN",
    "show": "show RUN",
    "export": "export RUN --to json",
}
PROGRAM = [sys.executable, "-m", "calibrate"]


def words_of(command, folder):
    return [word.replace("RUN", str(folder)) for word in COMMANDS[command].split()]


def arguments_of(command, folder):
    return [*PROGRAM, *words_of(command, folder)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small run with its entry, which every command gets a copy of, and the seconds that making it took."""
    folder = tmp_path_factory.mktemp("signals") / "run"
    begun = time.monotonic()
    if MOMENTS:
        command = arguments_of("run", folder)
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    else:
        finish("run", folder)
    return folder, time.monotonic() - begun


def finish(command, folder):
    """The seconds that a command takes to its end, in this process, which has loaded what takes others 5 s."""
    begun = time.monotonic()
    done = CliRunner().invoke(cli, words_of(command, folder))
    assert done.exit_code == 0, done.output
    return time.monotonic() - begun


def pairs_of(folder):
    shards = sorted((folder / "pairs").glob("*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def handles(pid, number):
    """Whether the process has got as far as the program's first line; before it Python itself is started."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (number - 1) & 1


def wait_for_the_first_line(process):
    while not handles(process.pid, signal.SIGTERM):
        time.sleep(0.002)


def interrupt(command, folder, number, after):
    """(exit code, stderr) of a command that gets a signal so many seconds after its first line."""
    if command in FORKED:
        err = folder.with_suffix(".err")
        process = forked.start("calibrate", words_of(command, folder), err)
        wait_for_the_first_line(process)
        time.sleep(after)
        os.kill(process.pid, number)
        process.join(120)
        return process.exitcode, err.read_text()
    process = subprocess.Popen(
        arguments_of(command, folder),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_the_first_line(process)
    time.sleep(after)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("command", COMMANDS if MOMENTS else QUICK)
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="asks /proc for the handler"
)
def test_every_command_ends_cleanly_at_any_moment(command, recorded, tmp_path):
    folder = tmp_path / "run"
    undisturbed, longest = recorded
    if command not in ("record", "run"):  # no other command writes pairs
        shutil.copytree(undisturbed, folder)
    if command in ("record", "run", *FORKED):
        before, undisturbed = folder, tmp_path / "undisturbed"
        if before.exists():
            shutil.copytree(before, undisturbed)
        seconds = finish(command, undisturbed)
        longest = seconds if command in FORKED else longest
    moments = random.Random(command)
    outcomes = []
    for _ in range(max(1, MOMENTS // len(COMMANDS))):
        after = moments.uniform(0, longest)
        number = moments.choice([signal.SIGINT, signal.SIGTERM])
        kept = pairs_of(folder)
        code, err = interrupt(command, folder, number, after)
        outcomes.append((number.name, round(after, 2), code, err.strip().splitlines()[-1:]))
        assert "Traceback" not in err, outcomes[-1]
        assert code in (0, 3), (outcomes[-1], err)  # 0: it was done before the signal came
        if code == 3:
            assert "interrupted; what is finished is kept" in err, outcomes[-1]
            assert str(folder) in err, outcomes[-1]
        assert kept.items() <= pairs_of(folder).items(), "a finished prompt is lost"
        if (folder / "entry.yaml").exists():
            coeffs.load(folder / "entry.yaml")
    print(*outcomes, sep="\n")  # noqa: T201 - shown with -s
    finish(command, folder)
    assert pairs_of(folder) == pairs_of(undisturbed)
