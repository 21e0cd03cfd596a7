"""What a verification leaves behind: its results and facts in the run folder. Reading it needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.runs.folder import write_atomically
from calibrate.trials.setting import GATE
from calibrate.verifying.comparison import Comparison, judge, summarize

_MAPPINGS = ("patterns", "replayed")  # columns of dicts, kept as JSON


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        results: One row per policy, budget and prompt: measures, computed steps, seconds, patterns (JSON).
        summary: One row per policy and budget, see :func:`calibrate.verifying.comparison.summarize`.
        comparisons: The fitted gate against every other policy.
        facts: What else a reader needs: headline, refused policies, noise floor, drift of the replay, device.
        folder: Where it is kept.
    """

    results: pd.DataFrame
    summary: pd.DataFrame
    comparisons: list[Comparison]
    facts: dict[str, Any]
    folder: Path

    @property
    def headline(self) -> str:
        return self.facts["headline"]


def load_verification(folder: str | os.PathLike) -> Verification | None:
    """What the latest verification in this run folder found; ``None`` where there was none."""
    path = Path(folder) / "verify"
    try:
        facts = json.loads((path / "verification.json").read_text(encoding="utf-8"))
        results = pd.read_parquet(path / "results.parquet")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"{path}: cannot be read ({error}); run `calibrate verify` again"
        ) from None
    for column in _MAPPINGS:
        results[column] = [
            json.loads(text) if isinstance(text, str) else {} for text in results[column]
        ]
    return Verification(results, summarize(results), judge(results, GATE), facts, path)


def write_verification(found: Verification) -> None:
    """Keep a verification in its folder."""
    found.folder.mkdir(parents=True, exist_ok=True)
    texts = {
        column: [
            json.dumps(value) if isinstance(value, dict) else None
            for value in found.results[column]
        ]
        for column in _MAPPINGS
    }
    found.results.assign(**texts).to_parquet(found.folder / "results.parquet")
    write_atomically(
        found.folder / "verification.json", (json.dumps(found.facts, indent=2) + "\n").encode()
    )
