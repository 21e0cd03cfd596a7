"""A full or unwritable disk: every command that writes says so in one line, and leaves what was there."""

import resource
import shutil

import pytest
from click.testing import CliRunner

import coeffs
from calibrate.cli import cli

WRITING = {
    "record": "record --num-prompts 3 --steps 4 --device cpu --out RUN",
    "fit": "fit RUN",
    "plan": "plan RUN --computed 3 --choosing 1 --num-prompts 1 --candidates 1 --device cpu",
    "verify": "verify RUN --num-prompts 1 --budgets 3 --policies gate,uniform --device cpu",
    "report": "report RUN",
}


def invoke(command, folder):
    words = [word.replace("RUN", str(folder)) for word in WRITING[command].split()]
    return CliRunner().invoke(cli, words)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "run"
    record = ["record", "--num-prompts", "2", "--steps", "4", "--device", "cpu", "--out"]
    for words in ([*record, str(folder)], ["fit", str(folder)]):
        assert CliRunner().invoke(cli, words).exit_code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING)
def test_full_disk_is_one_line_and_leaves_what_was_there(command, recorded, tmp_path):
    """No file of this process may grow past 1,000 bytes, whichever library writes it."""
    folder = tmp_path / "run"
    shutil.copytree(recorded, folder)
    kept = {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.name != "lock" and path.is_file()
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        result = invoke(command, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(result.exception, SystemExit), result.exception
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code in (1, 2) and last.startswith("Error: "), result.output
    assert "File too large" in last
    assert {path: path.read_bytes() for path in kept} == kept
    assert coeffs.load(folder / "entry.yaml")
