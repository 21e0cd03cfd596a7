"""The tables of a study, from rows of which the means are known."""

from benchmarks.study import tables


def figures(*rows: tuple[str, int, str, float, float]) -> dict:
    names = ("policy", "budget", "prompt_id", "computed_steps", "snr_db")
    return {
        "measure": "snr_db",
        "steps": 10,
        "prompts": {"judged": 3},
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
    }


def test_levels_and_paired_differences_from_fewer_steps():
    text = tables(
        "a model",
        figures(
            ("plan", 5, "a", 5, 30.0),
            ("plan", 5, "b", 5, 20.0),
            ("plan", 5, "c", 5, 25.0),
            ("fewer steps", 5, "a", 5, 29.0),
            ("fewer steps", 5, "b", 5, 17.0),
            ("fewer steps", 5, "c", 5, 23.0),
            ("fitted gate", 5, "a", 7, 40.0),
            ("fitted gate", 5, "b", 7, 40.0),
            ("cache-dit's masks", 8, "a", 8, 33.0),
            ("cache-dit's masks", 8, "b", 8, 31.0),
        ),
    )
    levels, differences = text.split("minus fewer steps")
    assert "a model, 3 prompts: SNR in dB, mean (worst prompt)" in levels
    assert "| computed of 10 | 8 | 5 |" in levels
    assert "| plan |  | 25.0 (20.0) |" in levels
    assert "| fitted gate |  | 40.0 (40.0) at 7.0 |" in levels
    assert "| cache-dit's masks | 32.0 (31.0) |  |" in levels
    # Mean 2 with a standard error of 0.577; Student's t with two degrees of freedom is 4.30 there.
    assert "| plan | +2.0 (-0.5 to +4.5) |" in differences
    assert "| fitted gate |  |" in differences, "two steps off its budget"
    assert (
        "| computed of 10 | 5 |" in differences and "| cache-dit's masks |  |" in differences
    )
    assert "| fewer steps |" not in differences
