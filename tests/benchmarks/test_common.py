"""What every result file says about where its figures come from."""

import subprocess

import pytest

from benchmarks.common import commit_of

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@example.org")


@pytest.fixture
def clone(tmp_path):
    """A clone with one commit, one folder down, and the commit."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    for command in (
        ("init", "-q", origin),
        ("-C", origin, *IDENTITY, "commit", "-q", "--allow-empty", "-m", "first"),
        ("clone", "-q", origin, clone),
    ):
        subprocess.run(["git", *map(str, command)], check=True)
    head = (clone / ".git" / "HEAD").read_text().removeprefix("ref: ").strip()
    (clone / "below").mkdir()
    return clone, (clone / ".git" / head).read_text().strip()


def test_the_commit_of_a_clone_of_anybody_is_known(clone, monkeypatch):
    folder, commit = clone
    assert len(commit) == 40 and commit_of(folder / "below") == commit
    monkeypatch.setenv(
        "GIT_TEST_ASSUME_DIFFERENT_OWNER", "1"
    )  # git's own way to test its refusal
    refusal = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True)
    assert b"dubious ownership" in refusal.stderr
    assert commit_of(folder) == commit


def test_the_commit_is_that_of_the_folder_within_another_repository_s_hook(
    clone, monkeypatch
):
    folder, commit = clone
    monkeypatch.setenv("GIT_DIR", str(folder.parent / "origin" / "elsewhere"))
    assert commit_of(folder) == commit


def test_no_commit_outside_of_a_clone_or_without_git(tmp_path, clone, monkeypatch):
    assert commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(clone[0]) is None
