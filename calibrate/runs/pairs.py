"""The log of a run as one table: reading, checking, excluding, hashing. One row is one pair of consecutive steps.

A run is a folder with ``run.yaml`` and ``pairs/*.parquet``, one file per finished prompt and seed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.errors import RunFolderError, one_line
from calibrate.runs.files import (
    FLOAT_COLUMNS,
    INTEGER_COLUMNS,
    PAIR_COLUMNS,
    TEXT_COLUMNS,
    read_pairs,
)
from calibrate.runs.folder import RunFolder
from coeffs.entry.signals import SIGNALS

MEASURED_COLUMNS = ("x", "y_output", "y_hidden", "y_residual")
TRAJECTORY = ["prompt_id", "seed", "expert", "branch"]
SIGNAL_COLUMNS = {signal.name: signal.column for signal in SIGNALS.values()}
TARGET_COLUMNS = {"output": "y_output", "hidden": "y_hidden", "residual": "y_residual"}
# The columns' types in memory, and how a message calls them.
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(TEXT_COLUMNS, (str, "text")),
    **dict.fromkeys(INTEGER_COLUMNS, ("int64", "whole numbers")),
    **dict.fromkeys(FLOAT_COLUMNS, ("float64", "numbers")),
}


class InvalidRun(RunFolderError, ValueError):
    """A log that cannot be fitted: empty, mixed up, or not a log at all; names the file."""


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        frame: The pairs that can be used, sorted by prompt, seed, expert, branch and step.
        manifest: Content of ``run.yaml`` (of the first folder where several were read); empty for a bare table.
        excluded: How many rows ``frame`` lacks, by reason.
        path: The run's folder; ``None`` for a bare table.
        rows: All recorded rows, the excluded ones too, in the same order: what a replay has to walk through.
        timing: ``expert -> (seconds per denoiser call, seconds of it in the block stack)``, means over all calls.
        folders: All folders that were read; none for a bare table.
    """

    frame: pd.DataFrame
    manifest: dict[str, Any]
    excluded: dict[str, int]
    path: Path | None
    rows: pd.DataFrame
    timing: dict[str, tuple[float, float]] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()

    @property
    def experts(self) -> list[str]:
        return sorted(self.frame["expert"].unique())

    @property
    def prompts(self) -> list[str]:
        return sorted(self.frame["prompt_id"].unique())

    def branches(self, expert: str = "transformer") -> list[str]:
        """CFG branches recorded for ``expert``, the conditional one first."""
        found = self.frame.loc[self.frame["expert"] == expert, "branch"].unique()
        return sorted(found, key=lambda branch: (branch != "cond", branch))

    def pairs(
        self, signal: str = "modulated_input", target: str = "output", expert: str | None = None,
        branch: str | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Usable pairs with the chosen signal and target as columns ``x`` and ``y``, and the others as they are.

        ``branch`` ``None`` or ``"pooled"`` takes all branches, ``expert`` ``None`` all experts.
        """
        x = column_of(signal, SIGNAL_COLUMNS, "signal")
        y = column_of(target, TARGET_COLUMNS, "target")
        rows = self.frame
        if expert is not None:
            rows = rows[rows["expert"] == expert]
        if branch not in (None, "pooled"):
            rows = rows[rows["branch"] == branch]
        rows = rows.assign(x=rows[x], y=rows[y])
        return rows[np.isfinite(rows["x"]) & np.isfinite(rows["y"])].reset_index(drop=True)

    @property
    def log_sha256(self) -> str:
        """Hash of all recorded rows in canonical order and byte form: independent of files, row order and pandas."""
        digest = hashlib.sha256()
        for column in PAIR_COLUMNS:
            digest.update(f"{column}\n".encode())
            if column in TEXT_COLUMNS:
                # A length before each text, so that moving a character between rows changes the hash.
                digest.update("".join(f"{len(text)}:{text}" for text in self.rows[column]).encode())
            elif column in INTEGER_COLUMNS:
                digest.update(self.rows[column].to_numpy("<i8").tobytes())
            else:
                values = self.rows[column].to_numpy("<f8").copy()
                values[np.isnan(values)] = np.nan  # one bit pattern for all NaN
                digest.update((values + 0.0).tobytes())  # -0.0 reads as 0.0
        return digest.hexdigest()


def load_run(source: str | os.PathLike | pd.DataFrame | Iterable[str | os.PathLike]) -> Run:
    """Read one run folder, several of the same protocol as one, or a table with the log's columns.

    Raises:
        RunFolderError: For a folder that is no run, or a damaged file (``CorruptShard``, names it).
        InvalidRun: For a missing column, no pairs, no usable pairs, folders of different protocols, or a trajectory
            that occurs twice.
    """
    if isinstance(source, pd.DataFrame):
        return _run(_checked(source, "the table"), {}, None, {})
    folders = [
        RunFolder.open(path)
        for path in ([source] if isinstance(source, str | os.PathLike) else source)
    ]
    if not folders:
        raise InvalidRun("no run folder given: name at least one")
    for other in folders[1:]:
        _require_same_protocol(folders[0], other)
    rows = pd.concat([_read_pairs(folder) for folder in folders], ignore_index=True)
    run = _run(rows, folders[0].manifest, folders[0].path, _read_timing(folders))
    return replace(run, folders=tuple(folder.path for folder in folders))


def column_of(name: str, columns: Mapping[str, str], kind: str) -> str:
    """Column of a signal or target, by its name in an entry."""
    if name not in columns:
        raise InvalidRun(f"{kind} {name!r}: the log has {', '.join(columns)}")
    return columns[name]


def _read_pairs(folder: RunFolder) -> pd.DataFrame:
    files = sorted((folder.path / "pairs").glob("*.parquet"))
    if not files:
        raise InvalidRun(
            f"{folder.path}: no finished prompt in pairs/; record at least one with `calibrate record`"
        )
    return pd.concat(
        [_checked(read_pairs(file).to_pandas(), str(file)) for file in files], ignore_index=True
    )


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with the log's columns and types, and behind them those that another version recorded."""
    missing = [column for column in PAIR_COLUMNS if column not in table]
    if missing:
        raise InvalidRun(
            f"{name}: missing column {', '.join(missing)}; expected {', '.join(PAIR_COLUMNS)}"
        )
    further = [column for column in table if column not in PAIR_COLUMNS]
    table = table.loc[:, [*PAIR_COLUMNS, *further]].copy()
    for column, (kind, expected) in _KINDS.items():
        try:
            if kind is str and table[column].isna().any():
                raise ValueError("empty values")
            table[column] = table[column].astype(kind)
        except (ValueError, TypeError) as error:
            raise InvalidRun(
                f"{name}: column {column} should hold {expected} ({one_line(error)})"
            ) from None
    if (table["step"] < 1).any():
        raise InvalidRun(f"{name}: step {table['step'].min()} in the log; pairs start at step 1")
    return table


def _run(rows: pd.DataFrame, manifest: dict, path: Path | None, timing: dict) -> Run:
    if rows.empty:
        raise InvalidRun(
            "the log holds no pairs; record at least one prompt with two or more steps"
        )
    # Plain comparison of code points: the order, and with it the hash, must not depend on a locale.
    rows = rows.sort_values([*TRAJECTORY, "step"], kind="stable", ignore_index=True)
    twice = rows.duplicated([*TRAJECTORY, "step"])
    if twice.any():
        prompt, seed, expert, branch = rows.loc[twice.idxmax(), TRAJECTORY]
        raise InvalidRun(
            f"prompt {prompt} with seed {seed} ({expert}, {branch}) is in the log twice; leave one of the runs out"
        )
    # A column that was never recorded excludes nothing; a step that went wrong does.
    excluded: Counter[str] = Counter()
    usable = np.ones(len(rows), bool)
    for column in MEASURED_COLUMNS:
        bad = ~np.isfinite(rows[column].to_numpy())
        if column in ("x", "y_output") or not bad.all():
            excluded[f"non-finite {column}"] = int((usable & bad).sum())
            usable &= ~bad
    if not usable.any():
        raise InvalidRun(
            f"none of the {len(rows)} pairs is finite, the model produced NaN or infinity; try --dtype float32"
        )
    return Run(rows[usable].reset_index(drop=True), manifest, dict(+excluded), path, rows, timing)


def _require_same_protocol(first: RunFolder, other: RunFolder) -> None:
    for key in ("model", "protocol_sha256", "protocol", "checkpoint"):
        if first.manifest.get(key) != other.manifest.get(key):
            what = key.removesuffix("_sha256") + _first_difference(first.manifest, other.manifest)
            raise InvalidRun(
                f"{other.path} and {first.path}: different {what}; fit runs of one protocol together"
            )


def _first_difference(manifest: dict, other: dict) -> str:
    ours, theirs = manifest.get("protocol"), other.get("protocol")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}, key=str):
            if ours.get(key) != theirs.get(key):
                return f" ({key}: {theirs.get(key)} and {ours.get(key)})"
    return ""


def seconds_per_prompt(folder: RunFolder) -> float | None:
    """Mean seconds that the denoiser took for a whole generation; None where nothing was timed."""
    totals = [
        sum(timing["call_seconds"] * timing["calls"] for timing in experts.values())
        for experts in _timings(folder)
    ]
    return float(np.mean(totals)) if totals else None


def _read_timing(folders: list[RunFolder]) -> dict[str, tuple[float, float]]:
    """Means over all calls of all groups."""
    sums: dict[str, np.ndarray] = {}
    for experts in (timings for folder in folders for timings in _timings(folder)):
        for expert, timing in experts.items():
            calls = timing["calls"]
            row = np.array([timing["call_seconds"] * calls, timing["stack_seconds"] * calls, calls])
            sums[expert] = sums.get(expert, np.zeros(3)) + row
    return {
        expert: (float(call / calls), float(stack / calls))
        for expert, (call, stack, calls) in sorted(sums.items())
        if calls > 0 and 0 < stack <= call and np.isfinite(call)
    }


def _timings(folder: RunFolder) -> Iterator[dict[str, dict[str, float]]]:
    """Timing of each group. It is a convenience: what cannot be read is left out, not fatal."""
    names = ("calls", "call_seconds", "stack_seconds")
    for file in sorted((folder.path / "timing").glob("*.json")):
        try:
            experts = json.loads(file.read_text(encoding="utf-8"))
            yield {
                expert: {name: float(timing[name]) for name in names}
                for expert, timing in experts.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
