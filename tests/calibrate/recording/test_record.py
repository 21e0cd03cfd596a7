"""The recording loop: what is kept, what is tried again, and what ends it."""

import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml
from recording_stub import Denoiser, Recorder, generate_with

import calibrate.recording.recorder
from calibrate import record
from calibrate.errors import (
    CalibrateError,
    Incomplete,
    InvalidOption,
    ProtocolMismatch,
    RunFolderError,
    RunInUse,
)
from calibrate.model.table import DEFAULT_PROMPTS
from calibrate.runs.gram_log import NoPlan, load_grams
from calibrate.runs.lock import hold
from runtime.errors import UnsupportedModel

PROMPTS = ["a cup", "a house", "a lake", "a cat"]


@pytest.fixture(autouse=True)
def stub_recorder(monkeypatch):
    monkeypatch.setattr(calibrate.recording.recorder, "Recorder", Recorder)


def record_toy(path, generate=None, prompts=PROMPTS, **options):
    denoiser = Denoiser()
    generate = generate or generate_with
    return record(
        "toy",
        generate=generate(denoiser),
        modules=denoiser,
        prompts=prompts,
        out=path,
        **options,
    )


def bytes_of(run):
    return {path.name: path.read_bytes() for path in (run.path / "pairs").iterdir()}


def failing(*bad, error=None):
    """A generation that raises for some prompts."""

    def make(denoiser):
        generate = generate_with(denoiser)

        def call(prompt, seed):
            generate(prompt, seed)
            if prompt in bad:
                raise error or RuntimeError("no luck")

        return call

    return make


def test_every_prompt_becomes_one_shard(tmp_path):
    run = record_toy(tmp_path / "run")
    assert run.is_complete and not run.failures()
    frame = pd.read_parquet(run.path / "pairs")
    assert len(frame) == len(PROMPTS) * 5 and frame["prompt_id"].nunique() == 4
    manifest = yaml.safe_load((run.path / "run.yaml").read_text())
    assert manifest["model"] == "toy" and manifest["transformer_classes"] == {
        "transformer": "Denoiser"
    }
    assert manifest["protocol"]["dtype"] == "float32" and len(manifest["prompts"]) == 4
    assert set(manifest["versions"]) == {"teacal", "torch", "diffusers", "numpy", "python"}


def test_same_command_records_nothing_again(tmp_path):
    first = record_toy(tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in first.path.glob("*/*")}
    second = record_toy(tmp_path / "run", failing(*PROMPTS))
    assert (
        second.is_complete
        and {path: path.stat().st_mtime_ns for path in second.path.glob("*/*")} == stamps
    )


def test_default_folder_depends_on_protocol_and_prompts_but_not_on_how_many(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folders = [
        record_toy(None, **options).path.as_posix()
        for options in (
            {"num_prompts": 1},
            {},
            {"steps": 7},
            {"seed": 5},
            {"prompts": ["x"]},
        )
    ]
    assert folders[0] == folders[1] and folders[0].startswith("runs/toy-")
    assert len(set(folders)) == 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("no luck"), "RuntimeError"),
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
            "out of memory",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "out of memory",
        ),
    ],
)
def test_one_failing_prompt_costs_only_itself_and_is_tried_again(tmp_path, error, kind):
    run = record_toy(tmp_path / "run", failing("a lake", error=error))
    assert not run.is_complete and len(run.finished()) == 3
    (name, failure), *others = run.failures().items()
    assert name.startswith("00002-") and failure["kind"] == kind and not others
    again = record_toy(tmp_path / "run")
    assert again.is_complete and not again.failures()
    assert bytes_of(again) == bytes_of(record_toy(tmp_path / "undisturbed"))


def test_memory_that_really_runs_out_is_a_failure_of_that_prompt(tmp_path):
    def make(denoiser):
        generate = generate_with(denoiser)

        def call(prompt, seed):
            generate(prompt, seed)
            if prompt == "a cat":
                torch.empty(1 << 46)

        return call

    run = record_toy(tmp_path / "run", make)
    assert [failure["kind"] for failure in run.failures().values()] == ["out of memory"]


def test_generation_without_pairs_is_a_failure(tmp_path):
    run = record_toy(
        tmp_path / "run",
        lambda denoiser: generate_with(denoiser, steps=1),
        prompts=["a", "b"],
    )
    assert {failure["kind"] for failure in run.failures().values()} == {"no pairs"}


def test_non_finite_pairs_are_kept_counted_and_named(tmp_path, caplog):
    def make(denoiser):
        def call(prompt, seed):
            generate_with(denoiser)(prompt, seed)
            if prompt == "a cup":
                denoiser(torch.full((4, 8), torch.nan))

        return call

    run = record_toy(tmp_path / "run", make)
    assert run.is_complete
    assert "1 of 6 pairs are not finite" in caplog.text and "00000-" in caplog.text
    assert pd.read_parquet(run.path / "pairs")["x"].isna().sum() == 1


def test_recording_stops_when_the_first_prompts_all_fail_alike(tmp_path):
    """A wrong argument fails for every prompt: better to say so after three than after seventy."""
    with pytest.raises(
        Incomplete, match=r"the first 3 prompts all failed alike .*no luck"
    ) as caught:
        record_toy(tmp_path / "run", failing(*PROMPTS))
    assert caught.value.exit_code == 3


def test_what_is_wrong_with_the_model_is_no_failure_of_a_prompt(tmp_path):
    with pytest.raises(UnsupportedModel):
        record_toy(tmp_path / "run", failing("a cup", error=UnsupportedModel("no attention")))
    assert not (tmp_path / "run" / "failures").exists()


def gram_files(run):
    return {path.stem for path in (run.path / "gram").glob("*.npz")}


def test_gram_matrices_are_kept_unless_declined(tmp_path):
    run = record_toy(tmp_path / "with")
    assert gram_files(run) == run.finished()
    assert not gram_files(record_toy(tmp_path / "without", gram=False))


def test_run_begun_without_gram_matrices_is_not_recorded_again_unasked(tmp_path, caplog):
    """The default changed; a run that somebody recorded for hours did not."""
    first = record_toy(tmp_path / "run", gram=False)
    record_toy(tmp_path / "run", failing(*PROMPTS))
    assert not gram_files(first)
    assert "4 of 4 recorded prompts have no Gram matrices" in caplog.text
    assert "--gram records them again" in caplog.text


def test_plan_says_the_command_that_adds_what_it_lacks(tmp_path, caplog):
    """Bug: it said `calibrate record --gram`, which changed nothing."""
    run = record_toy(tmp_path / "run", gram=False)
    with pytest.raises(NoPlan, match=f"record --model toy --gram --out {run.path}"):
        load_grams(run.path)


def test_gram_matrices_that_lack_are_recorded_on_request_and_pairs_stay(tmp_path):
    """Bug: `record --gram` on an existing run did nothing, and `plan` told the user to run it."""
    first = record_toy(tmp_path / "run", gram=False)
    stamps = {path: path.stat().st_mtime_ns for path in (first.path / "pairs").iterdir()}
    again = record_toy(tmp_path / "run", gram=True)
    assert gram_files(again) == again.finished() and len(again.finished()) == 4
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_gram_matrices_of_some_prompts_only_are_said_and_the_rest_goes_on_with_them(
    tmp_path, caplog
):
    run = record_toy(tmp_path / "run", num_prompts=2)
    lost = run.groups[0].name
    (run.path / "gram" / f"{lost}.npz").unlink()
    more = record_toy(tmp_path / "run")
    assert more.finished() - gram_files(more) == {lost}
    assert "1 of 2 recorded prompts have no Gram matrices" in caplog.text


def test_recorder_without_gram_matrices_does_not_record_for_ever(tmp_path, monkeypatch):
    """A model may give none; asking for them must end all the same."""
    record_toy(tmp_path / "run", gram=False)
    finish = Recorder.finish
    monkeypatch.setattr(Recorder, "finish", lambda self: replace(finish(self), gram={}))
    assert not gram_files(record_toy(tmp_path / "run", gram=True))


def test_shipped_set_gives_enough_prompts_and_a_list_all_of_its_own(tmp_path):
    run = record_toy(tmp_path / "shipped", prompts="default")
    assert len(run.groups) == DEFAULT_PROMPTS < 70
    texts = [str(i) for i in range(DEFAULT_PROMPTS + 5)]
    assert len(record_toy(tmp_path / "own", prompts=texts).groups) == len(texts)
    more = record_toy(
        tmp_path / "shipped", prompts="default", num_prompts=DEFAULT_PROMPTS + 1
    )
    assert len(more.groups) == DEFAULT_PROMPTS + 1


def test_what_is_going_to_be_recorded_is_said_first(tmp_path, capsys):
    record_toy(tmp_path / "run", num_prompts=2)
    said = capsys.readouterr().err
    assert (
        f"{tmp_path / 'run'}: 2 of 2 prompts to record, how long is said after the first"
        in said
    )
    assert re.search(
        r"first prompt: 1 s, about 1 s for the 1 left; .* of memory at most, 0 MiB", said
    )
    record_toy(tmp_path / "run")
    said = capsys.readouterr().err
    assert "2 of 4 prompts to record" in said and said.count("first prompt: ") == 1
    record_toy(tmp_path / "run", progress=False)
    assert capsys.readouterr().err == ""


def test_argument_longer_than_a_file_name_is_kept_in_the_command(tmp_path):
    """Bug: it was looked for as a file, which the system refuses."""
    run = record_toy(tmp_path / "run", num_prompts=1, pipe_args={"note": "x" * 5000})
    assert "--pipe-arg note=xxx" in run.manifest["command"]


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record_toy(tmp_path / "run", failing("a lake", error=KeyboardInterrupt()))
    assert len(list((tmp_path / "run" / "pairs").iterdir())) == 2
    assert record_toy(tmp_path / "run").is_complete


def test_corrupt_shard_is_recorded_again(tmp_path, caplog):
    run = record_toy(tmp_path / "run")
    whole = bytes_of(run)
    shard = run.shard(run.groups[1].name)
    shard.write_bytes(shard.read_bytes()[:100])
    again = record_toy(tmp_path / "run")
    assert bytes_of(again) == whole and len(list((run.path / "corrupt").iterdir())) == 1
    assert run.groups[1].name in caplog.text and "recorded anew" in caplog.text


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    run = record_toy(tmp_path / "run")
    leftover = run.path / "pairs" / ".00009-x-1.parquet.4711.tmp"
    leftover.write_bytes(b"half")
    record_toy(tmp_path / "run")
    assert not leftover.exists()


def test_other_settings_refuse_to_mix(tmp_path):
    record_toy(tmp_path / "run")
    with pytest.raises(ProtocolMismatch, match=r"protocol.guidance_scale None -> 3.0"):
        record_toy(tmp_path / "run", guidance_scale=3.0)


def test_two_recordings_into_one_folder_are_refused_and_a_dead_one_does_not_matter(
    tmp_path,
):
    folder = tmp_path / "run"
    folder.mkdir()
    script = "import sys,time; sys.path.insert(0, sys.argv[1])\nfrom calibrate.runs.lock import hold\n"
    script += "with hold(sys.argv[2]):\n"
    script += "    print('held', flush=True); time.sleep(60)"
    repository = os.path.dirname(os.path.dirname(calibrate.__file__))
    with subprocess.Popen(
        [sys.executable, "-c", script, repository, folder],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            RunInUse, match=f"process {other.pid} on .* is recording into this run"
        ) as caught:
            record_toy(folder)
        assert "\n" not in str(caught.value)
        other.kill()
    assert record_toy(folder).is_complete


def test_one_process_does_not_record_twice_into_one_folder_either(tmp_path):
    """Its own locks would not stop it: file locks belong to a process."""
    tmp_path.joinpath("run").mkdir()
    with (
        hold(tmp_path / "run"),
        pytest.raises(RunInUse, match="this process is recording"),
    ):
        record_toy(tmp_path / "run")
    assert record_toy(tmp_path / "run").is_complete


def test_file_system_without_locks_is_said_and_records_all_the_same(
    tmp_path, monkeypatch, caplog
):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert record_toy(tmp_path / "run").is_complete
    assert "no file locks here" in caplog.text


def test_read_only_place_is_one_line():
    with pytest.raises(RunFolderError, match="/proc/run: cannot be created"):
        record_toy("/proc/run")


def test_full_disk_keeps_what_is_finished(tmp_path):
    """Files of this process may not grow past 3 kB: the first shards fit, the long one does not."""

    def make(denoiser):
        return lambda prompt, seed: generate_with(
            denoiser, steps=60 if prompt == "a lake" else 4
        )(prompt, seed)

    small = max(
        len(content)
        for content in bytes_of(record_toy(tmp_path / "small", prompts=["a"])).values()
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small + 200, limits[1]))
    try:
        with pytest.raises(
            RunFolderError,
            match=r"cannot be written .File too large.; nothing finished is lost",
        ):
            record_toy(tmp_path / "run", make)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path / "run" / "pairs").iterdir())) == 2
    assert record_toy(tmp_path / "run", make).is_complete


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "--steps 1: expected a whole number from 2"),
        ({"height": 0}, "--height 0"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"num_prompts": 5}, "has 4"),
        ({"prompts": []}, "no prompt in it"),
        ({"seed": -1}, "the seed is -1"),
        ({"pipe_args": {"a": float("nan")}}, "cannot be written down"),
        ({"guidance_scale": float("inf")}, "finite number"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, options, said):
    with pytest.raises(CalibrateError, match=said):
        record_toy(tmp_path / "run", failing(*PROMPTS, error=AssertionError), **options)


def test_callable_needs_to_know_what_to_watch(tmp_path):
    with pytest.raises(InvalidOption, match="name the denoiser to watch"):
        record(lambda prompt, seed: None, out=tmp_path / "run", prompts=["a"])


def test_callable_alone_is_a_model(tmp_path):
    denoiser = Denoiser()
    run = record(
        generate_with(denoiser), modules=denoiser, prompts=["a"], out=tmp_path / "run"
    )
    assert run.manifest["model"] == "generate"
