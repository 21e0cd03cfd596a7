"""Text for people: tables that fit, durations in words, and what a mistyped name may have meant."""

import pytest

from calibrate.text import WIDTH, aligned, block, did_you_mean, duration, siblings


def test_columns_line_up_and_the_first_is_flush_left():
    assert (
        aligned(("a", "bb"), [("xyz", "1"), ("x", "100")]) == "a     bb\nxyz    1\nx    100"
    )


def test_table_wider_than_the_output_goes_on_below_with_its_labels():
    header = ["name", *(f"column {index}" for index in range(20))]
    rows = [["first", *range(20)], ["second", *range(20)]]
    lines = aligned(header, rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) > 1
    assert all(
        [line.split()[0] for line in part.splitlines()] == ["name", "first", "second"]
        for part in blocks
    )
    assert " ".join(lines).count("column ") == 20


def test_one_column_wider_than_the_output_is_not_lost():
    assert "x" * 200 in aligned(("a", "b"), [("1", "x" * 200)])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45, "45 s"), (600, "10 min"), (7200, "2.0 h")],
)
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text


def test_block_leaves_out_what_is_not_known():
    assert (
        block("plan", {"model": "toy", "time": "", "folder": "x"})
        == "plan\n  model   toy\n  folder  x"
    )


def test_nearest_names_whatever_the_case():
    known = ["FLUX.1-dev", "FLUX.1-schnell", "Wan2.1-T2V-14B"]
    assert did_you_mean("flux1-dev", known).startswith("did you mean FLUX.1-dev")
    assert did_you_mean("something else", known) == ""


def test_place_that_is_not_there_has_no_siblings(tmp_path):
    (tmp_path / "run").mkdir()
    assert siblings(tmp_path / "other") == [str(tmp_path / "run")]
    assert siblings(tmp_path / "nowhere" / "other") == []
