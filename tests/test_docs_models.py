"""docs/models.md says what the code finds: it is generated anew and compared."""

import importlib.util
import re
from pathlib import Path

import pytest
import zoo

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    builder = load(DOCS / "build_models.py")
    page = builder.render()
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page, (
        "run: python docs/build_models.py"
    )
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(rows) == {tiny.cls for tiny in zoo.TINY.values()} and len(rows) == len(
        set(rows)
    )


def test_the_classes_called_compiled_are_those_that_are_tested():
    tested = re.search(
        r"^DEEP = \{(.*?)^\}",
        (DOCS.parent / "tests/runtime/test_compile.py").read_text(),
        re.S | re.M,
    )
    assert sorted(load(DOCS / "build_models.py").COMPILED) == sorted(
        re.findall(r'^    "(\w+)"', tested[1], re.M)
    )
