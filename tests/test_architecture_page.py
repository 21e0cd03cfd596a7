"""docs/architecture.md names files that exist, and its picture is the one of today's imports."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:coeffs|runtime|calibrate|tests|docs)/[\w./-]*)`", PAGE))
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_picture_is_current() -> None:
    """Draw it again with `python docs/build_architecture.py` after an import has come or gone."""
    sys.path.insert(0, str(ROOT / "docs"))
    from build_architecture import PICTURE, draw
    from test_house import GRAPH

    assert PICTURE.read_bytes() == draw(GRAPH)
