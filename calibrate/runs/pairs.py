"""The log of a run as one table: reading, checking, excluding, hashing. One row is one pair of consecutive steps.

A run is a folder with ``run.yaml`` and ``pairs/*.parquet``, one file per finished prompt and seed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.errors import RunFolderError, one_line
from calibrate.model.protocol import AnyPath, Settings
from calibrate.runs.files import PAIR_COLUMNS, PAIR_TYPES, read_pairs
from calibrate.runs.folder import RunFolder, differences
from coeffs.entry.signals import SIGNALS

ALWAYS_MEASURED = ("x", "y_output")
DISTANCES = (*ALWAYS_MEASURED, "y_hidden", "y_residual")
TRAJECTORY = ["prompt_id", "seed", "expert", "branch"]
SIGNAL_COLUMNS = {signal.name: signal.column for signal in SIGNALS.values()}
TARGET_COLUMNS = {"output": "y_output", "hidden": "y_hidden", "residual": "y_residual"}
# The type in a file -> the type in memory, and how a message calls it.
_KINDS: dict[str, tuple[Any, str]] = {
    "string": (str, "text"),
    "int32": ("int64", "whole numbers"),
    "int64": ("int64", "whole numbers"),
    "float64": ("float64", "numbers"),
}
_TIMES = ["call_seconds", "stack_seconds"]


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
    """

    frame: pd.DataFrame
    manifest: Settings
    excluded: dict[str, int]
    path: Path | None
    rows: pd.DataFrame
    timing: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        return sorted(self.frame["expert"].unique())

    @property
    def prompts(self) -> list[str]:
        return sorted(self.frame["prompt_id"].unique())

    def branches(self, expert: str = "transformer") -> list[str]:
        """CFG branches recorded for ``expert``, the conditional one first."""
        names = self.frame.loc[self.frame["expert"] == expert, "branch"].unique()
        return sorted(names, key=lambda branch: (branch != "cond", branch))

    def pairs(
        self, signal: str = "modulated_input", target: str = "output", expert: str | None = None,
        branch: str | None = None,
    ) -> pd.DataFrame:  # fmt: skip
        """Usable pairs with the chosen signal and target as columns ``x`` and ``y``, and the others as they are.

        ``branch`` ``None`` or ``"pooled"`` takes all branches, ``expert`` ``None`` all experts.
        """
        rows = self.frame.assign(
            x=self.frame[column_of(signal, SIGNAL_COLUMNS, "signal")],
            y=self.frame[column_of(target, TARGET_COLUMNS, "target")],
        )
        wanted = np.isfinite(rows["x"]) & np.isfinite(rows["y"])
        if expert is not None:
            wanted &= rows["expert"] == expert
        if branch not in (None, "pooled"):
            wanted &= rows["branch"] == branch
        return rows[wanted].reset_index(drop=True)

    @property
    def log_sha256(self) -> str:
        """Hash of all recorded rows in canonical order and byte form: independent of files, row order and pandas."""
        digest = hashlib.sha256()
        for column, kind in PAIR_TYPES.items():
            digest.update(f"{column}\n".encode())
            values = self.rows[column]
            if kind == "string":
                # A length before each text, so that moving a character between rows changes the hash.
                digest.update("".join(f"{len(text)}:{text}" for text in values).encode())
            elif kind == "float64":
                # One bit pattern for all NaN, and -0.0 as 0.0.
                digest.update(
                    np.where(values.isna(), np.nan, values + 0.0).astype("<f8").tobytes()
                )
            else:
                digest.update(values.to_numpy("<i8").tobytes())
        return digest.hexdigest()


def load_run(source: AnyPath | pd.DataFrame | Iterable[AnyPath]) -> Run:
    """Read one run folder, several of the same protocol as one, or a table with the log's columns.

    Raises:
        RunFolderError: For a folder that is no run, or a damaged file (``CorruptShard``, names it).
        InvalidRun: For a missing column, no pairs, no usable pairs, folders of different protocols, or a trajectory
            that occurs twice.
    """
    if isinstance(source, pd.DataFrame):
        return _run(_checked(source, "the table"), {}, None, {})
    paths = [source] if isinstance(source, AnyPath) else source
    folders = [RunFolder.open(path) for path in paths]
    if not folders:
        raise InvalidRun("no run folder given: name at least one")
    first, tables = folders[0], []
    for folder in folders:
        for key in ("model", "protocol", "protocol_sha256", "checkpoint"):
            ours, theirs = ({key: run.manifest.get(key)} for run in (first, folder))
            if ours != theirs:
                raise InvalidRun(
                    f"{first.path} and {folder.path}: different {key} ({differences(ours, theirs)}); fit runs of one "
                    "protocol together"
                )
        files = sorted(folder.path.glob("pairs/*.parquet"))
        if not files:
            raise InvalidRun(
                f"{folder.path}: no finished prompt in pairs/; record at least one with `calibrate record`"
            )
        tables += [_checked(read_pairs(file).to_pandas(), str(file)) for file in files]
    return _run(
        pd.concat(tables, ignore_index=True), first.manifest, first.path, _timing(folders)
    )


def column_of(name: str, columns: Mapping[str, str], kind: str) -> str:
    """Column of a signal or target, by its name in an entry."""
    if name not in columns:
        raise InvalidRun(f"{kind} {name!r}: the log has {', '.join(columns)}")
    return columns[name]


def _checked(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with the log's columns in their types; those of another version stay as they are."""
    missing = [column for column in PAIR_COLUMNS if column not in table]
    if missing:
        raise InvalidRun(
            f"{name}: missing column {', '.join(missing)}; expected {', '.join(PAIR_COLUMNS)}"
        )
    table = table.copy()
    for column, stored in PAIR_TYPES.items():
        kind, expected = _KINDS[stored]
        try:
            if kind is str and table[column].isna().any():
                raise ValueError("empty values")
            table[column] = table[column].astype(kind)
        except (ValueError, TypeError) as error:
            raise InvalidRun(
                f"{name}: column {column} should hold {expected} ({one_line(error)})"
            ) from None
    if (table["step"] < 1).any():
        raise InvalidRun(
            f"{name}: step {table['step'].min()} in the log; pairs start at step 1"
        )
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
    excluded = {}
    usable = np.ones(len(rows), bool)
    for column in DISTANCES:
        finite = np.isfinite(rows[column].to_numpy())
        # A column that was never recorded excludes nothing; a step that went wrong does.
        if column in ALWAYS_MEASURED or finite.any():
            if lost := int((usable & ~finite).sum()):
                excluded[f"non-finite {column}"] = lost
            usable &= finite
    if not usable.any():
        raise InvalidRun(
            f"none of the {len(rows)} pairs is finite, the model produced NaN or infinity; try --dtype float32"
        )
    return Run(rows[usable].reset_index(drop=True), manifest, excluded, path, rows, timing)


def seconds_per_prompt(folder: RunFolder) -> float | None:
    """Mean seconds that the denoiser took for a whole generation; None where nothing was timed."""
    table = _timings([folder])
    return float(table.groupby("group")["call_seconds"].sum().mean()) if len(table) else None


def _timing(folders: list[RunFolder]) -> dict[str, tuple[float, float]]:
    """Mean seconds of a call and of its stack, over all calls of all groups, by expert."""
    sums = _timings(folders).groupby("expert")[["calls", *_TIMES]].sum()
    means = sums[_TIMES].div(sums["calls"], axis=0)
    call, stack = means["call_seconds"], means["stack_seconds"]
    return {
        str(expert): (call, stack)
        for expert, call, stack in means[(stack > 0) & (stack <= call)].itertuples()
    }


def _timings(folders: list[RunFolder]) -> pd.DataFrame:
    """Calls and seconds of each group and expert. It is a convenience: what cannot be read is left out, not fatal."""
    rows = []
    files = (file for folder in folders for file in sorted(folder.path.glob("timing/*.json")))
    for file in files:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for expert, timing in json.loads(file.read_bytes()).items():
                calls = float(timing["calls"])
                times = (timing[name] * calls for name in _TIMES)
                rows.append((file.stem, expert, calls, *times))
    return pd.DataFrame(rows, columns=["group", "expert", "calls", *_TIMES])
