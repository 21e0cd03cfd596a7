"""A prompt has one purpose: what was recorded or chose plans is never judged."""

import pytest

from calibrate.errors import RunFolderError
from calibrate.runs.purposes import (
    CHOOSING,
    JUDGED,
    RECORDED,
    for_choosing,
    for_judging,
    note,
    purposes,
)


def test_purposes_are_kept_and_a_choosing_prompt_stays_one(tmp_path):
    assert purposes(tmp_path) == {}
    note(tmp_path, ["a", "b"], CHOOSING)
    note(tmp_path, ["b", "c"], JUDGED)
    assert purposes(tmp_path) == {"a": CHOOSING, "b": CHOOSING, "c": JUDGED}
    note(tmp_path, ["c"], CHOOSING)
    assert purposes(tmp_path)["c"] == CHOOSING


def test_recorded_and_choosing_prompts_never_judge():
    known = {"a": RECORDED, "b": CHOOSING, "c": JUDGED}
    assert for_judging(known, ["a", "b", "c", "d"]) == ["c", "d"]


def test_choosing_takes_those_that_chose_before_then_fresh_ones_then_judged_ones():
    known = {"a": RECORDED, "b": JUDGED, "d": CHOOSING}
    assert for_choosing(known, ["a", "b", "c", "d", "e"], 3) == ["d", "c", "e"]
    assert for_choosing(known, ["a", "b", "c", "d", "e"], 9) == ["d", "c", "e", "b"]


def test_a_damaged_file_is_said_and_not_taken_for_none(tmp_path):
    (tmp_path / "purposes.json").write_text("[")
    with pytest.raises(RunFolderError, match=r"purposes\.json: not readable"):
        purposes(tmp_path)
