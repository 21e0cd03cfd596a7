"""Finding the entry for a loaded pipeline from facts about it; every difference is listed."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coeffs.entry.fields import Names
from coeffs.entry.provenance import Protocol
from coeffs.entry.schema import Entry
from coeffs.errors import AmbiguousEntry, EntryError, EntryMismatch, EntryNotFound
from coeffs.store import Folder, entries

_STATUS_ORDER = ("measured", "published", "copied")
_ABOUT = ("transformer_class", "pipeline_class", "checkpoint", "revision")
_FACTS = (*_ABOUT, *(name for name in vars(Protocol()) if name != "call_arguments"))
_ALIASES = {"steps": "num_steps", "guidance": "guidance_scale"}
_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """The entry for a pipeline, and in what they differ.

    ``mismatches`` are the settings in which they differ, in words; ``unknown`` those that the entry does not state;
    ``others`` further entries.
    """

    entry: Entry
    mismatches: Names
    unknown: Names
    others: Names

    def __str__(self) -> str:
        parts = [f"{self.entry.label} ({self.entry.status})", *self.mismatches]
        if self.unknown:
            parts.append(f"not stated by the entry: {', '.join(self.unknown)}")
        if self.others:
            parts.append(f"also for this model: {', '.join(self.others)}")
        return "; ".join(parts)


def find(facts: Facts, registry: Folder = None, *, strict: bool = False) -> Match:
    """The best entry for a pipeline, and the settings in which they differ.

    Entries of its transformer class are compared. Never chosen are the numbers of another
    checkpoint, copied ones, and fits on a signal that the runtime cannot read: those have to be
    named. Own measurements come before published sets, then an entry for this number of steps,
    then fewer settings that differ or are not stated, then the newer version.

    Args:
        facts: ``transformer_class`` and what else is known: ``pipeline_class``, ``checkpoint`` (a
            hub repository or a local folder), ``revision`` and the fields of a protocol, where
            ``steps``, ``guidance`` and ``size`` (height, width) also do. ``lora`` and
            ``quantization`` are ``None`` for none.

    Raises:
        EntryNotFound: No entry of this class and checkpoint.
        AmbiguousEntry: Several equally good ones, or copied ones only.
        EntryMismatch: With ``strict``, if any setting differs.
    """
    facts = _complete(facts)
    same = _of_checkpoint(facts, registry)
    best = _best(same, facts)
    mismatches, unknown = compare(best, facts)
    if mismatches and strict:
        raise EntryMismatch(
            f"{best.label} was not measured like this: {'; '.join(mismatches)}; "
            "change the settings, measure them, or leave strict out"
        )
    others = tuple(entry.label for entry in same if entry is not best)
    return Match(best, mismatches, unknown, others)


def _of_checkpoint(facts: Facts, registry: Folder) -> list[Entry]:
    """Entries of the pipeline's class that may be of its checkpoint."""
    name = facts["transformer_class"]
    of_class = [entry for entry in entries(registry) if entry.transformer_class == name]
    if not of_class:
        raise EntryNotFound(
            f"no entry for {name}: measure one with `calibrate --model ...`, "
            "or pass an entry or coefficients of your own"
        )
    same = [entry for entry in of_class if _same_checkpoint(entry, facts) is not False]
    if not same:
        known = ", ".join(entry.label for entry in of_class)
        raise EntryNotFound(
            f"no entry for {facts['checkpoint']}: {name} has entries of other checkpoints "
            f"({known}); name one if you mean to use it"
        )
    return same


def _best(same: list[Entry], facts: Facts) -> Entry:
    subject = facts["checkpoint"] or facts["transformer_class"]
    usable = [
        entry
        for entry in same
        if entry.status != "copied" and entry.signal != "other" and entry.has_polynomials
    ]
    if not usable:
        known = ", ".join(f"{entry.label} ({entry.origin})" for entry in same)
        raise AmbiguousEntry(
            f"nothing was measured on {subject}: only {known}; name one to use it"
        )
    ranks = [_rank(entry, facts) for entry in usable]
    best = [entry for entry, rank in zip(usable, ranks, strict=True) if rank == min(ranks)]
    newest = {entry.model: entry for entry in best}  # entries come by model and version
    if len(newest) > 1:
        raise AmbiguousEntry(
            f"{len(newest)} sets fit {subject} equally well: {', '.join(newest)}; name one of them"
        )
    return best[-1]


def _rank(entry: Entry, facts: Facts) -> tuple[bool, int, bool, int]:
    """How far an entry is from the facts: the smallest is the best."""
    mismatches, unknown = compare(entry, facts)
    return (
        _same_checkpoint(entry, facts) is not True,
        _STATUS_ORDER.index(entry.status),
        facts["num_steps"] is None or entry.protocol.num_steps != facts["num_steps"],
        len(mismatches) + len(unknown),  # what is not stated is no better than what differs
    )


def _complete(given: Facts) -> Facts:
    """Every fact by the name that entries have for it, ``None`` where nothing is known."""
    facts = {_ALIASES.get(name, name): value for name, value in given.items()}
    if "size" in facts:
        facts["height"], facts["width"] = facts.pop("size") or (None, None)
    unknown = sorted(set(facts) - set(_FACTS))
    if unknown or not facts.get("transformer_class"):
        wrong = f"unknown {', '.join(unknown)}" if unknown else "transformer_class is missing"
        raise EntryError(f"facts: {wrong}; expected {', '.join(_FACTS)}")
    return dict.fromkeys(_FACTS) | facts


# --- comparing ------------------------------------------------------------------------------------


def compare(entry: Entry, facts: Facts) -> tuple[Names, Names]:
    """Settings in which a pipeline differs from an entry, in words, and those the entry does not state."""
    facts = _complete(facts)
    stated = vars(entry.protocol) | {
        "pipeline_class": entry.pipeline_class,
        "revision": entry.checkpoint.revision,
    }
    if not _same_checkpoint(entry, facts):
        stated["checkpoint"] = entry.checkpoint.repository
    mismatches, unknown = [], []
    for name, here in facts.items():
        absent_means_none = name in ("quantization", "lora") and entry.status == "measured"
        if name not in stated or (here is None and not absent_means_none):
            continue
        if stated[name] is None and not absent_means_none:
            unknown.append(name)
        elif not _same(name, stated[name], here):
            first, second = (
                "none" if value is None else value for value in (stated[name], here)
            )
            mismatches.append(f"{name}: {first} in the entry, {second} here")
    return tuple(mismatches), tuple(unknown)


def _same_checkpoint(entry: Entry, facts: Facts) -> bool | None:
    """Whether both name the same checkpoint; None where one side does not say."""
    stated, here = entry.checkpoint.repository, facts["checkpoint"]
    if stated is None or here is None:
        return None
    return _checkpoint_name(stated) == _checkpoint_name(here)


def _checkpoint_name(name: str) -> str:
    """Last part of a repository or folder, without the mark of a mere conversion.

    A folder of the hub's cache (``.../models--org--name/snapshots/<hash>``) is its repository.
    """
    path = name.lower().replace("\\", "/").rstrip("/")
    cached = re.search(r"(?:^|/)models--(?:[^/]*--)?([^/]+)", path)
    last = cached[1] if cached else path.rpartition("/")[2]
    return last.removesuffix("-diffusers")


def _same(name: str, stated: Any, here: Any) -> bool:
    if stated is None or here is None:
        return stated is here
    if isinstance(stated, int | float) and isinstance(here, int | float):
        return math.isclose(stated, here)
    first, second = (str(value).lower().removeprefix("torch.") for value in (stated, here))
    if name == "scheduler":  # some sources write only a part of the class's name
        return first in second or second in first
    return _DTYPES.get(first, first) == _DTYPES.get(second, second)
