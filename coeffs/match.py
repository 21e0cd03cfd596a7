"""Finding the entry for a loaded pipeline from facts about it; every difference is listed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from coeffs.entry.schema import Entry
from coeffs.errors import AmbiguousEntry, EntryError, EntryMismatch, EntryNotFound
from coeffs.store import entries

_STATUS_ORDER = ("measured", "published", "copied")
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

    ``checkpoint`` is a hub repository or a local folder, ``lora`` and ``quantization`` are ``None``
    for none.
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
        """Facts from a mapping; ``steps``, ``guidance`` and ``size`` (height, width) also do."""
        if isinstance(facts, Facts):
            return facts
        values = {_ALIASES.get(key, key): value for key, value in facts.items()}
        size = values.pop("size", None)
        if size is not None:
            values["height"], values["width"] = size
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            problem = f"unknown {', '.join(unknown)}"
        elif not values.get("transformer_class"):
            problem = "transformer_class is missing"
        else:
            return cls(**values)
        raise EntryError(f"facts: {problem}; expected {', '.join(known)}")


@dataclass(frozen=True)
class Mismatch:
    """A setting in which the pipeline differs from the entry."""

    field: str
    entry: Any
    here: Any

    def __str__(self) -> str:
        stated = "none" if self.entry is None else self.entry
        here = "none" if self.here is None else self.here
        return f"{self.field}: {stated} in the entry, {here} here"


@dataclass(frozen=True)
class Match:
    """The entry for a pipeline, and in what they differ.

    ``unknown`` are settings that the entry does not state; ``others`` further entries.
    """

    entry: Entry
    mismatches: tuple[Mismatch, ...]
    unknown: tuple[str, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.entry.label} ({self.entry.status})", *map(str, self.mismatches)]
        if self.unknown:
            parts.append(f"not stated by the entry: {', '.join(self.unknown)}")
        if self.others:
            parts.append(f"also for this model: {', '.join(self.others)}")
        return "; ".join(parts)


def find(
    facts: Facts | Mapping[str, Any], registry: str | Path | None = None, *, strict: bool = False
) -> Match:
    """The best entry for a pipeline, and the settings in which they differ.

    Entries of its transformer class are compared. Never chosen are the numbers of another
    checkpoint, copied ones, and fits on a signal that the runtime cannot read: those have to be
    named. Own measurements come before published sets, then an entry for this number of steps,
    then fewer settings that differ or are not stated, then the newer version.

    Raises:
        EntryNotFound: No entry of this class and checkpoint.
        AmbiguousEntry: Several equally good ones, or copied ones only.
        EntryMismatch: With ``strict``, if any setting differs.
    """
    facts = Facts.of(facts)
    same = _of_checkpoint(facts, registry)
    usable = [entry for entry in same if _usable(entry)]
    if not usable:
        known = ", ".join(_origin(entry) for entry in same)
        subject = facts.checkpoint or facts.transformer_class
        problem = f"nothing was measured on {subject}: only {known}; name one to use it"
        raise AmbiguousEntry(problem)
    best = _best(usable, facts)
    mismatches, unknown = compare(best, facts)
    if mismatches and strict:
        differences = "; ".join(map(str, mismatches))
        advice = "change the settings, measure them, or leave strict out"
        raise EntryMismatch(f"{best.label} was not measured like this: {differences}; {advice}")
    others = tuple(entry.label for entry in same if entry is not best)
    return Match(best, mismatches, unknown, others)


def _of_checkpoint(facts: Facts, registry: str | Path | None) -> list[Entry]:
    """Entries of the pipeline's class that may be of its checkpoint."""
    of_class = [
        entry for entry in entries(registry) if entry.transformer_class == facts.transformer_class
    ]
    if not of_class:
        advice = "measure one with `calibrate --model ...`, or pass an entry or coefficients"
        raise EntryNotFound(f"no entry for {facts.transformer_class}: {advice} of your own")
    same = [entry for entry in of_class if _same_checkpoint(entry, facts) is not False]
    if not same:
        known = ", ".join(sorted(entry.label for entry in of_class))
        problem = f"{facts.transformer_class} has entries of other checkpoints ({known})"
        advice = "name one if you mean to use it"
        raise EntryNotFound(f"no entry for {facts.checkpoint}: {problem}; {advice}")
    return same


def _usable(entry: Entry) -> bool:
    has_fit = any(expert.branches for expert in entry.experts.values())
    return entry.status != "copied" and entry.signal != "other" and has_fit


def _origin(entry: Entry) -> str:
    if entry.status == "copied":
        return f"{entry.label} (copied from {entry.copied_from})"
    return entry.label


def _best(usable: list[Entry], facts: Facts) -> Entry:
    def rank(entry: Entry) -> tuple[bool, int, bool, int]:
        mismatches, unknown = compare(entry, facts)
        return (
            _same_checkpoint(entry, facts) is not True,
            _STATUS_ORDER.index(entry.status),
            facts.num_steps is None or entry.protocol.num_steps != facts.num_steps,
            len(mismatches) + len(unknown),  # what is not stated is no better than what differs
        )

    first = min(map(rank, usable))
    best = [entry for entry in usable if rank(entry) == first]
    models = sorted({entry.model for entry in best})
    if len(models) > 1:
        subject = facts.checkpoint or facts.transformer_class
        problem = f"{len(models)} sets fit {subject} equally well: {', '.join(models)}"
        raise AmbiguousEntry(f"{problem}; name one of them")
    return max(best, key=lambda entry: entry.version)


# --- comparing ------------------------------------------------------------------------------------


def compare(
    entry: Entry, facts: Facts | Mapping[str, Any]
) -> tuple[tuple[Mismatch, ...], tuple[str, ...]]:
    """Settings in which a pipeline differs from an entry, and those the entry does not state."""
    facts = Facts.of(facts)
    stated = vars(entry.protocol) | {
        "pipeline_class": entry.pipeline_class,
        "revision": entry.checkpoint.revision,
    }
    if _same_checkpoint(entry, facts) is not True:
        stated["checkpoint"] = entry.checkpoint.repository
    mismatches, unknown = [], []
    for name, here in vars(facts).items():
        if name not in stated:
            continue
        there = stated[name]
        absent_means_none = name in ("quantization", "lora") and entry.status == "measured"
        if here is None and not absent_means_none:
            continue
        if there is None and not absent_means_none:
            unknown.append(name)
        elif not _same(name, there, here):
            mismatches.append(Mismatch(name, there, here))
    return tuple(mismatches), tuple(unknown)


def _same_checkpoint(entry: Entry, facts: Facts) -> bool | None:
    """Whether both name the same checkpoint; None where one side does not say."""
    if entry.checkpoint.repository is None or facts.checkpoint is None:
        return None
    return _checkpoint_name(entry.checkpoint.repository) == _checkpoint_name(facts.checkpoint)


def _checkpoint_name(name: str) -> str:
    """Last part of a repository or folder, without the mark of a mere conversion.

    A folder of the hub's cache (``.../models--org--name/snapshots/<hash>``) is its repository.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part] or [name]
    last = parts[-1]
    for part in parts:
        if part.startswith("models--"):
            last = part.rpartition("--")[2]
            break
    return last.lower().removesuffix("-diffusers")


def _same(name: str, stated: Any, here: Any) -> bool:
    if stated is None or here is None:
        return stated is here
    if isinstance(stated, int | float) and isinstance(here, int | float):
        return abs(stated - here) <= 1e-9 * max(abs(stated), abs(here))
    first, second = str(stated).lower(), str(here).lower()
    if name == "dtype":
        first, second = first.removeprefix("torch."), second.removeprefix("torch.")
        return _DTYPES.get(first, first) == _DTYPES.get(second, second)
    if name == "scheduler":  # some sources write only a part of the class's name
        return first in second or second in first
    return first == second
