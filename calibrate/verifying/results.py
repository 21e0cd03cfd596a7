"""What a verification leaves behind: its results and facts in the run folder. Reading it needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from calibrate.errors import InvalidOption
from calibrate.runs.folder import write_atomically
from calibrate.trials.setting import GATE
from calibrate.verifying.comparison import Comparison, judge, summarize

_MAPPINGS = ["patterns", "replayed"]  # columns of dicts, kept as JSON


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        results: One row per policy, budget and prompt: measures, computed steps, seconds, patterns (JSON).
        facts: What else a reader needs: headline, refused policies, noise floor, drift of the replay, device.
        folder: Where it is kept.
    """

    results: pd.DataFrame
    facts: dict[str, Any]
    folder: Path

    @property
    def headline(self) -> str:
        return self.facts["headline"]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per policy and budget, see :func:`calibrate.verifying.comparison.summarize`."""
        return summarize(self.results)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The fitted gate against every other policy."""
        return judge(self.results, GATE)


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
        results[column] = results[column].fillna("{}").map(json.loads)
    return Verification(results, facts, path)


def write_verification(verification: Verification) -> None:
    """Keep a verification in its folder."""
    folder, results = verification.folder, verification.results.copy()
    folder.mkdir(parents=True, exist_ok=True)
    results[_MAPPINGS] = results[_MAPPINGS].map(json.dumps, na_action="ignore")
    results.to_parquet(folder / "results.parquet")
    facts = json.dumps(verification.facts, indent=2)
    write_atomically(folder / "verification.json", f"{facts}\n".encode())
