"""SIGKILL at random moments: the short form of benchmarks/kill_resume.py, on a toy denoiser."""

import time

import pytest
from recording_stub import Denoiser, generate_with, install

from benchmarks.kill_resume import kill_and_resume

pytestmark = pytest.mark.slow


def record_slowly(path):
    """In a process of its own: thirty groups of a few milliseconds, so that kills hit every kind of moment."""
    install()
    from calibrate import record

    denoiser = Denoiser()
    generate = generate_with(denoiser)

    def call(prompt, seed):
        generate(prompt, seed)
        time.sleep(0.01)

    record(
        "toy",
        generate=call,
        modules=denoiser,
        prompts=[str(i) for i in range(30)],
        out=path,
        progress=False,
    )


def test_killed_recording_ends_like_an_undisturbed_one(tmp_path):
    import pandas  # noqa: F401 - here, and not once in every child
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    import calibrate.recording.record  # noqa: F401

    outcome = kill_and_resume(record_slowly, tmp_path, kills=10)
    assert outcome.identical and not outcome.lost and not outcome.rewritten
    assert outcome.kills == 10 and outcome.kills_during_recording >= 4
