"""The run folder: what is finished stays, what is damaged is set aside, what is foreign is refused."""

import json
import os
import resource
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibrate.errors import CorruptShard, ProtocolMismatch, RunFolderError
from calibrate.model.prompts import load_prompts
from calibrate.runs.files import PAIR_COLUMNS, encode_pairs, read_pairs, write_atomically
from calibrate.runs.folder import RunFolder, tidy
from calibrate.runs.pairs import load_run

IDENTITY = {
    "run_id": "0",
    "model": "toy",
    "protocol": {"num_steps": 5},
    "protocol_sha256": "aa",
}
PROMPTS = load_prompts(["a", "b", "c"])
TIMING = {"transformer": {"call_seconds": 0.5, "stack_seconds": 0.25, "calls": 3}}


def rows_of(count=3):
    texts = {"branch": "cond", "expert": "transformer"}
    numbers = dict.fromkeys(PAIR_COLUMNS[6:], 0.125)
    return [
        {**numbers, **texts, "step": step, "num_steps": count + 1}
        for step in range(1, count + 1)
    ]


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", IDENTITY, PROMPTS, created="now")


def test_manifest_says_what_is_recorded(run):
    again = RunFolder.open(run.path)
    assert again.manifest["model"] == "toy" and again.manifest["created"] == "now"
    assert [group.prompt for group in again.groups] == list(PROMPTS.prompts)
    assert again.groups[2].name == f"00002-{PROMPTS.prompts[2].prompt_id}-2"


def test_finished_group_is_a_parquet_file_that_pandas_reads(run):
    run.write_group(run.groups[1], rows_of(), TIMING)
    frame = pd.read_parquet(run.path / "pairs")
    assert tuple(frame.columns) == PAIR_COLUMNS and len(frame) == 3
    assert set(frame["prompt_id"]) == {PROMPTS.prompts[1].prompt_id} and set(
        frame["seed"]
    ) == {1}
    assert (
        frame["x"].dtype == "float64"
        and frame["step"].dtype == "int32"
        and frame["seed"].dtype == "int64"
    )
    assert run.finished() == {run.groups[1].name} and not run.is_complete
    assert (
        json.loads((run.path / "timing" / f"{run.groups[1].name}.json").read_text()) == TIMING
    )


def test_same_rows_give_the_same_bytes_in_any_order():
    rows = [{**row, "prompt_id": "a", "seed": 0} for row in rows_of()]
    assert encode_pairs(rows) == encode_pairs(rows[::-1])


def test_non_finite_values_survive(run):
    run.write_group(
        run.groups[0],
        [{**rows_of(1)[0], "x": float("nan"), "y_output": float("inf")}],
        TIMING,
    )
    table = read_pairs(run.shard(run.groups[0].name))
    assert table["x"][0].as_py() != table["x"][0].as_py() and table["y_output"][
        0
    ].as_py() == float("inf")


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "foreign"])
def test_damaged_shard_is_named_on_reading_and_set_aside_on_recording(run, damage):
    group = run.groups[0]
    run.write_group(group, rows_of(), TIMING)
    shard = run.shard(group.name)
    whole = shard.read_bytes()
    if (
        damage == "flip"
    ):  # one bit of a data page: the footer is fine, the page's checksum is not
        column = pq.ParquetFile(shard).metadata.row_group(0).column(8)
        position = column.data_page_offset + column.total_compressed_size - 3
        shard.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        )
    elif damage == "foreign":
        pd.DataFrame({"x": [1.0]}).to_parquet(shard)
    else:
        shard.write_bytes(whole[: len(whole) // 2] if damage == "truncate" else b"")
    damaged = shard.read_bytes()
    with pytest.raises(CorruptShard, match=str(shard)) as caught:
        read_pairs(shard)
    assert "\n" not in str(caught.value)
    assert tidy(run.path) == [group.name] and run.finished() == set()
    assert [path.read_bytes() for path in (run.path / "corrupt").iterdir()] == [damaged]
    run.write_group(group, rows_of(), TIMING)
    assert tidy(run.path) == [] and shard.read_bytes() == whole


def test_second_damaged_copy_does_not_replace_the_first(run):
    for content in (b"1", b"2"):
        run.write_group(run.groups[0], rows_of(), TIMING)
        run.shard(run.groups[0].name).write_bytes(content)
        tidy(run.path)
    assert sorted(path.read_bytes() for path in (run.path / "corrupt").iterdir()) == [
        b"1",
        b"2",
    ]


def test_more_prompts_of_the_same_set_extend_the_run_and_fewer_do_not_shrink_it(tmp_path):
    path = tmp_path / "run"
    for count, there in ((2, 2), (3, 3), (1, 3)):
        assert len(RunFolder.create(path, IDENTITY, PROMPTS.first(count)).groups) == there
    assert len(RunFolder.open(path).groups) == 3


def test_another_protocol_or_prompt_set_is_not_mixed_in(run):
    other = {**IDENTITY, "protocol": {"num_steps": 7}, "protocol_sha256": "bb"}
    before = (run.path / "run.yaml").read_bytes()
    with pytest.raises(ProtocolMismatch, match=r"protocol.num_steps 5 -> 7.*--out"):
        RunFolder.create(run.path, other, PROMPTS)
    with pytest.raises(ProtocolMismatch, match="other prompts or seeds"):
        RunFolder.create(run.path, IDENTITY, load_prompts(["a", "b", "d"]))
    assert (run.path / "run.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "content", [None, b"", b"prompts: 3", b"[1", b"prompts: [3]", b"\xff\xfe\x00"]
)
def test_folder_that_is_no_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(RunFolderError, match=str(tmp_path)) as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_pairs_without_a_manifest_are_not_adopted(run):
    run.write_group(run.groups[0], rows_of(), TIMING)
    (run.path / "run.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"pairs but no run.yaml"):
        RunFolder.create(run.path, IDENTITY, PROMPTS)


@pytest.mark.parametrize(
    "name", ["pairs", "run.yaml", "timing", "failures", "lock", "entry.yaml"]
)
def test_links_in_a_run_folder_are_refused(tmp_path, name):
    """Otherwise a run folder from elsewhere could make us overwrite a file outside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunFolderError, match="a link inside a run folder"):
        RunFolder.open(folder)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "..", ".hidden", "a/b.png"])
def test_manifest_cannot_name_images_outside_the_run(run, name):
    with pytest.raises(RunFolderError, match="expected the name of a file"):
        run.input_path(name)


@pytest.mark.parametrize("prompt_id", ["../../x", "/abs", "a/b", "a\n", ""])
def test_manifest_cannot_name_groups_outside_the_run(run, prompt_id):
    run.manifest["prompts"][0]["prompt_id"] = prompt_id
    with pytest.raises(RunFolderError, match="not the name of a group"):
        run.write_group(run.groups[0], rows_of(), TIMING)
    with pytest.raises(RunFolderError, match="not the name of a group"):
        run.write_failure(run.groups[0], "kind", "message", "job")
    assert [path for path in run.path.parent.rglob("*") if path.is_file()] == [
        run.path / "run.yaml"
    ]


def test_full_disk_loses_nothing_and_leaves_nothing_half_written(tmp_path):
    """A real failing write: files of this process may not grow past 1,000 bytes."""
    path = tmp_path / "whole"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            RunFolderError, match=r"whole: cannot be written .*nothing finished is lost"
        ):
            write_atomically(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["whole"]


def test_failures_are_named_until_the_group_is_finished(run):
    run.write_failure(run.groups[0], "out of memory", "tried 3 GiB", "job 1")
    assert run.failures()[run.groups[0].name]["kind"] == "out of memory"
    assert run.failed_in(run.groups[0]) == "job 1" and run.failed_in(run.groups[1]) is None
    run.write_group(run.groups[0], rows_of(), TIMING)
    assert run.failures() == {}


def _with_column(shard, change):
    table = change(pq.read_table(shard))
    pq.write_table(table, shard)


@pytest.mark.parametrize("older", [True, False], ids=["lacks a column", "has one more"])
def test_shards_of_another_version_are_neither_moved_nor_recorded_again(run, older):
    """A column more or less in this version's table is no damage."""
    for group in run.groups:
        run.write_group(group, rows_of(), TIMING)
        if older:
            _with_column(
                run.shard(group.name), lambda table: table.drop_columns(["cos_distance"])
            )
        else:
            _with_column(
                run.shard(group.name),
                lambda table: table.append_column("later", pa.array([1.5] * 3)),
            )
    before = _contents(run.path)
    assert tidy(run.path) == []
    again = RunFolder.create(run.path, IDENTITY, PROMPTS, created="later")
    assert again.is_complete and _contents(run.path) == before
    rows = load_run(run.path).rows
    assert rows["cos_distance"].isna().all() == older
    assert older or set(rows["later"]) == {1.5}


def test_run_from_before_the_format_number_is_read_as_it_is(run):
    manifest = run.path / "run.yaml"
    assert manifest.read_text().startswith("format: 1\n")
    manifest.write_text(manifest.read_text().removeprefix("format: 1\n"))
    before = _contents(run.path)
    RunFolder.create(run.path, IDENTITY, PROMPTS)
    assert _contents(run.path) == before


def test_newer_format_is_refused_and_nothing_is_moved(run):
    run.shard(run.groups[0].name).write_bytes(b"in a form that this version cannot read")
    manifest = run.path / "run.yaml"
    manifest.write_text(manifest.read_text().replace("format: 1", "format: 2"))
    before = _contents(run.path)
    for attempt in (RunFolder.open, tidy):
        with pytest.raises(RunFolderError, match=r"format 2.*update teacal") as caught:
            attempt(run.path)
        assert "\n" not in str(caught.value)
    assert _contents(run.path) == before


def test_file_that_may_not_be_read_is_not_called_damaged(run, monkeypatch):
    run.write_group(run.groups[0], rows_of(), TIMING)
    before = _contents(run.path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(RunFolderError, match="Permission denied") as caught:
            tidy(run.path)
    assert not isinstance(caught.value, CorruptShard) and _contents(run.path) == before


def _contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
