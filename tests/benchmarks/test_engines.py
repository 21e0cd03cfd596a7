"""docs/registry.md: its table of exports against the real packages counts what is exported today."""

from pathlib import Path

import pytest

import coeffs
from benchmarks.engines.check import NOT_VERIFIABLE, exports
from coeffs.engines.releases import releases

PAGE = Path(__file__).parents[2] / "docs" / "registry.md"


def test_the_page_counts_all_entries():
    assert f"every export of all {len(coeffs.entries())} entries" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("form", releases())
def test_the_page_counts_the_exports_of_today(form):
    schedules = [schedule for _, schedule in exports(form)]
    plans = sum(schedule is not None for schedule in schedules)
    count, release = len(schedules), releases()[form].release
    if form in NOT_VERIFIABLE:
        cells = f"{count} exported; {NOT_VERIFIABLE[form]} | |"
    else:
        cells = f"{count} of {count} | {f'{plans} of {plans}' if plans else ''} |"
    assert f"| `{form}` | {release} | {cells}" in PAGE.read_text("utf-8")
