"""Reading a run: what is read, what is refused with which words, and a hash that layout cannot change."""

import json

import numpy as np
import pandas as pd
import pytest
from analysis_data import make_frame, make_run

from calibrate.errors import CalibrateError, CorruptShard
from calibrate.runs.folder import RunFolder
from calibrate.runs.pairs import load_run, seconds_per_prompt


def refused(source, *words):
    with pytest.raises(CalibrateError) as caught:
        load_run(source)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert caught.value.exit_code == 2
    for word in words:
        assert str(word) in text, text
    return caught.value


def test_a_folder_and_the_table_it_holds_give_the_same_run(tmp_path):
    frame = make_frame(prompts=3, seeds=2)
    folder = load_run(make_run(tmp_path / "run", frame))
    table = load_run(frame.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(folder.frame, table.frame, check_dtype=False)
    assert folder.log_sha256 == table.log_sha256
    assert folder.branches() == ["cond", "uncond"] and folder.experts == ["transformer"]
    assert folder.prompts == ["p00", "p01", "p02"] and not folder.excluded
    assert folder.timing == {"transformer": pytest.approx((0.5, 0.4))}
    assert (folder.manifest["model"], table.manifest) == ("some-model", {})


def test_the_hash_depends_on_the_pairs_and_on_nothing_else(tmp_path):
    frame = make_frame(prompts=4, seeds=2)
    whole = load_run(make_run(tmp_path / "whole", frame))
    first, rest = (
        frame[frame["prompt_id"].isin(names)] for names in (["p00", "p02"], ["p01", "p03"])
    )
    parts = load_run([make_run(tmp_path / "a", rest), make_run(tmp_path / "b", first)])
    assert parts.log_sha256 == whole.log_sha256
    renamed = frame.assign(prompt_id=frame["prompt_id"].replace({"p00": "p0", "p01": "0p01"}))
    changed = frame.copy()
    changed.loc[7, "y_hidden"] = np.nextafter(changed.loc[7, "y_hidden"], 1)
    hashes = {load_run(one).log_sha256 for one in (frame, renamed, changed, frame[1:])}
    assert len(hashes) == 4


def test_non_finite_rows_are_left_out_counted_and_kept_for_the_replay():
    frame = make_frame(prompts=3)
    frame.loc[[3, 50], "y_output"] = np.nan
    frame.loc[4, "x"] = np.inf
    frame.loc[4, "y_output"] = np.nan
    run = load_run(frame)
    assert run.excluded == {"non-finite x": 1, "non-finite y_output": 2}
    assert len(run.frame) == len(frame) - 3 and len(run.rows) == len(frame)
    assert np.isfinite(run.frame[["x", "y_output"]]).all(axis=None)


def test_a_quantity_the_model_does_not_have_excludes_nothing():
    run = load_run(make_frame(prompts=2).assign(y_hidden=np.nan, x_time_embedding=np.nan))
    assert not run.excluded
    assert len(run.pairs(target="output")) and not len(run.pairs(target="hidden"))
    assert not len(run.pairs(signal="time_embedding"))


def test_pairs_select_signal_target_expert_and_branch():
    run = load_run(make_frame(prompts=2, experts=("transformer", "transformer_2")))
    pairs = run.pairs("time_embedding", "residual", "transformer_2", "cond")
    assert set(pairs["expert"]) == {"transformer_2"} and set(pairs["branch"]) == {"cond"}
    assert (pairs["x"] == pairs["x_time_embedding"]).all() and (
        pairs["y"] == pairs["y_residual"]
    ).all()
    assert len(run.pairs(branch="pooled")) == len(run.frame)
    with pytest.raises(
        CalibrateError, match="signal 'vibes': the log has modulated_input, time_embedding"
    ):
        run.pairs(signal="vibes")


def test_missing_folders_and_files(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "run.yaml")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "run.yaml")
    run = make_run(tmp_path / "run", make_frame(prompts=1))
    for file in (run / "pairs").iterdir():
        file.unlink()
    refused(run, "no finished prompt", "calibrate record")
    refused([], "no run folder")
    (run / "run.yaml").write_text("prompts: [")
    refused(run, "run.yaml")


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    run = make_run(tmp_path / "run", make_frame(prompts=2))
    file = run / "pairs" / "00001-p01-0.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    error = refused(run, "00001-p01-0.parquet")
    assert isinstance(error, CorruptShard)


def test_columns_are_checked():
    frame = make_frame(prompts=2)
    refused(frame.drop(columns=["x", "sigma"]), "missing column sigma, x")
    refused(frame.assign(x="a lot"), "column x should hold numbers")
    refused(frame.assign(step=np.nan), "column step should hold whole numbers")
    refused(frame.assign(branch=None), "column branch should hold text")
    refused(frame.assign(step=frame["step"] - 1), "step 0", "start at step 1")
    refused(frame[:0], "no pairs")
    refused(frame.assign(x=np.nan), "none of the 76 pairs is finite")


def test_runs_of_another_protocol_and_repeated_trajectories_are_refused(tmp_path):
    first, second = (make_frame(prompts=2).assign(prompt_id=name) for name in "ab")
    first, second = (
        frame.drop_duplicates(["prompt_id", "branch", "step"]) for frame in (first, second)
    )
    a = make_run(tmp_path / "a", first)
    other = make_run(
        tmp_path / "b", second, protocol={"num_steps": 28}, protocol_sha256="1" * 64
    )
    assert isinstance(refused([a, other], a, other, "different protocol"), ValueError)
    other = make_run(tmp_path / "c", second, protocol={"num_steps": 28})
    refused([a, other], "different protocol (protocol.num_steps 20 -> 28")
    refused([a, make_run(tmp_path / "d", second, model="else")], "different model")
    refused([a, a], "prompt a with seed 0", "twice")
    refused(pd.concat([first, first[:1]]), "twice")
    assert load_run([a, make_run(tmp_path / "e", second)]).prompts == ["a", "b"]


def test_unusable_timing_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", make_frame(prompts=3))
    for name, text in (
        ("00000-p00-0", "{"),
        ("00001-p01-0", '{"transformer": {"calls": 3}}'),
    ):
        (run / "timing" / f"{name}.json").write_text(text)
    assert load_run(run).timing == {"transformer": pytest.approx((0.5, 0.4))}
    (run / "timing" / "00002-p02-0.json").write_text("[]")
    assert load_run(run).timing == {}


def test_seconds_of_a_generation_come_from_the_recorded_timing(tmp_path):
    run = make_run(tmp_path / "run", make_frame(prompts=2))
    calls = json.loads((run / "timing" / "00000-p00-0.json").read_text())["transformer"][
        "calls"
    ]
    assert seconds_per_prompt(RunFolder.open(run)) == pytest.approx(0.5 * calls)
    for file in (run / "timing").iterdir():
        file.write_text("{")
    assert seconds_per_prompt(RunFolder.open(run)) is None
