"""Finding the entry for a loaded pipeline from plain facts about it; every difference is listed, nothing guessed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffs.entry.schema import Entry
from coeffs.errors import AmbiguousEntry, EntryError, EntryMismatch, EntryNotFound
from coeffs.store import entries

_STATUS_ORDER = ("measured", "published", "copied")
_PROTOCOL = (
    *("scheduler", "num_steps", "shift", "guidance_scale", "height", "width"),
    *("num_frames", "dtype", "quantization", "lora"),
)
_ALIASES = {"steps": "num_steps", "guidance": "guidance_scale"}
_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a pipeline; ``None`` where nothing is known.

    ``checkpoint`` is a hub repository or a local folder, ``lora`` and ``quantization`` are ``None`` for none.
    """

    transformer_class: str
    pipeline_class: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    scheduler: str | None = None
    num_steps: int | None = None
    shift: float | str | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    lora: str | None = None

    @classmethod
    def of(cls, facts: "Facts | Mapping[str, Any]") -> "Facts":
        """Facts from a mapping; ``steps``, ``guidance`` and ``size`` (height, width) are understood too."""
        if isinstance(facts, cls):
            return facts
        values = {_ALIASES.get(key, key): value for key, value in dict(facts).items()}
        if (size := values.pop("size", None)) is not None:
            values["height"], values["width"] = size
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown or not values.get("transformer_class"):
            problem = (
                f"unknown {', '.join(sorted(unknown))}"
                if unknown
                else "transformer_class is missing"
            )
            raise EntryError(
                f"facts: {problem}; expected {', '.join(field.name for field in dataclasses.fields(cls))}"
            )
        return cls(**values)


@dataclass(frozen=True)
class Mismatch:
    """One setting in which the pipeline differs from what the entry was measured on."""

    field: str
    entry: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field}: {_words(self.entry)} in the entry, {_words(self.here)} here"


@dataclass(frozen=True)
class Match:
    """The best entry, in what the pipeline differs from it, what the entry does not state, and what else would fit."""

    entry: Entry
    mismatches: tuple[Mismatch, ...]
    unknown: tuple[str, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.entry.label} ({self.entry.status})", *map(str, self.mismatches)]
        lines += [f"not stated by the entry: {', '.join(self.unknown)}"] if self.unknown else []
        lines += [f"also for this model: {', '.join(self.others)}"] if self.others else []
        return "; ".join(lines)


def find(
    facts: Facts | Mapping[str, Any], registry: str | Path | None = None, *, strict: bool = False
) -> Match:
    """The best entry for a pipeline.

    Entries of its transformer class are compared. Another checkpoint's numbers are never chosen, nor are numbers
    copied from another model, nor fits on a signal that the runtime cannot read: those have to be named. Own
    measurements come before published sets, then fewer settings that differ or are
    not stated, then the newer version.

    Raises:
        EntryNotFound: No entry of this class and checkpoint.
        AmbiguousEntry: Several equally good ones, or copied ones only.
        EntryMismatch: With ``strict``, if any setting differs.
    """
    facts = Facts.of(facts)
    of_class = [
        entry for entry in entries(registry) if entry.transformer_class == facts.transformer_class
    ]
    if not of_class:
        raise EntryNotFound(
            f"no entry for {facts.transformer_class}: measure one with `calibrate --model ...`, or pass an entry or "
            "coefficients of your own"
        )
    same = [entry for entry in of_class if _same_checkpoint(entry, facts) is not False]
    if not same:
        known = ", ".join(sorted({entry.label for entry in of_class}))
        raise EntryNotFound(
            f"no entry for {facts.checkpoint}: {facts.transformer_class} has entries of other checkpoints ({known}); "
            "name one if you mean to use it"
        )
    usable = [
        entry
        for entry in same
        if entry.status != "copied" and entry.signal != "other" and _has_fit(entry)
    ]
    if not usable:
        said = ", ".join(
            f"{entry.label} (copied from {entry.copied_from})"
            if entry.status == "copied"
            else entry.label
            for entry in same
        )
        raise AmbiguousEntry(
            f"nothing was measured on {facts.checkpoint or facts.transformer_class}: only {said}; name one to use it"
        )
    best = _unambiguous(usable, facts)
    mismatches, unknown = compare(best, facts)
    others = tuple(entry.label for entry in same if entry is not best)
    if strict and mismatches:
        raise EntryMismatch(
            f"{best.label} was not measured like this: {'; '.join(map(str, mismatches))}; change the settings, "
            "measure them, or leave strict out"
        )
    return Match(best, mismatches, unknown, others)


def compare(
    entry: Entry, facts: Facts | Mapping[str, Any]
) -> tuple[tuple[Mismatch, ...], tuple[str, ...]]:
    """The settings in which a pipeline differs from an entry, and those that the entry does not state."""
    facts = Facts.of(facts)
    pairs = [("pipeline_class", entry.pipeline_class, facts.pipeline_class)]
    pairs += [("revision", entry.checkpoint.revision, facts.revision)]
    pairs += [(name, getattr(entry.protocol, name), getattr(facts, name)) for name in _PROTOCOL]
    mismatches, unknown = [], []
    if _same_checkpoint(entry, facts) is not True:
        pairs.insert(0, ("checkpoint", entry.checkpoint.repository, facts.checkpoint))
    for name, stated, here in pairs:
        absent_means_none = name in ("quantization", "lora") and entry.status == "measured"
        if stated is None and here is not None and not absent_means_none:
            unknown.append(name)
        elif (here is not None or absent_means_none) and not _same(name, stated, here):
            mismatches.append(Mismatch(name, stated, here))
    return tuple(mismatches), tuple(unknown)


def _unambiguous(usable: list[Entry], facts: Facts) -> Entry:
    def rank(entry: Entry) -> tuple:
        return (
            _same_checkpoint(entry, facts) is not True,
            _STATUS_ORDER.index(entry.status),
            sum(
                map(len, compare(entry, facts))
            ),  # what is not stated is no better than what differs
        )

    first = min(map(rank, usable))
    best = [entry for entry in usable if rank(entry) == first]
    models = sorted({entry.model for entry in best})
    if len(models) > 1:
        raise AmbiguousEntry(
            f"{len(models)} sets fit {facts.checkpoint or facts.transformer_class} equally well: {', '.join(models)}; "
            "name one of them"
        )
    return max(best, key=lambda entry: entry.version)


def _same_checkpoint(entry: Entry, facts: Facts) -> bool | None:
    """Whether both name the same checkpoint; None where one side does not say."""
    if entry.checkpoint.repository is None or facts.checkpoint is None:
        return None
    return _checkpoint_name(entry.checkpoint.repository) == _checkpoint_name(facts.checkpoint)


def _checkpoint_name(name: str) -> str:
    """Last part of a repository or folder, without the marks of a mere conversion.

    A folder of the hub's cache (``.../models--org--name/snapshots/<hash>``) stands for its repository.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    last = cached.split("--")[-1] if cached else (parts[-1] if parts else name)
    return last.lower().removesuffix("-diffusers")


def _has_fit(entry: Entry) -> bool:
    return any(expert.branches for expert in entry.experts.values())


def _same(name: str, stated: Any, here: Any) -> bool:
    if stated is None or here is None:
        return stated is here
    if isinstance(stated, int | float) and isinstance(here, int | float):
        return abs(stated - here) <= 1e-9 * max(abs(stated), abs(here))
    first, second = str(stated).lower(), str(here).lower()
    if name == "dtype":
        first, second = (value.removeprefix("torch.") for value in (first, second))
        return _DTYPES.get(first, first) == _DTYPES.get(second, second)
    if name == "scheduler":
        return first in second or second in first
    return first == second


def _words(value: Any) -> str:
    return "none" if value is None else str(value)
