"""The promises in docs/reliability.md name tests that exist."""

import re
from pathlib import Path

import calibrate

REPOSITORY = Path(calibrate.__file__).parents[1]


def test_every_test_that_a_promise_names_exists():
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py")
    )
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`(tests/[\w/]+\.py)`", page):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"`(benchmarks/\w+\.py)`", page):
        assert (REPOSITORY / name).exists(), name
