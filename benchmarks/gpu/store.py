"""Finished rows on disk: one JSON file, replaced as a whole after every case; a kill costs one case at most."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.common import surroundings


class Store:
    """Rows by case name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def is_done(self, name: str) -> bool:
        """Whether a case has its figures; one that failed is tried again."""
        return "figures" in self.rows.get(name, {})

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row with the hardware, versions and commit that it was measured with."""
        self.rows[name] = {**row, "surroundings": surroundings()}
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        partial.replace(self._path)
