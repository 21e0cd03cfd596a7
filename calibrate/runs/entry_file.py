"""The entry of a run: commands that take hours change it beside each other, and none undoes what another wrote."""

import os
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import isclose
from pathlib import Path

import coeffs
from coeffs import Entry, Fit

try:
    import fcntl
except ImportError:  # Windows: one process at a time is then up to the user
    fcntl = None  # type: ignore[assignment]

PLAN_WARNING = "plan: "  # begins a warning that belongs to the plans
VERIFIED_WARNING = "on real cached runs: "  # begins one that belongs to the verified thresholds
SAME = 1e-9  # relative: what two versions of numpy may make of the same pairs
# What a user writes into an entry by hand, and no fit knows.
BY_HAND = ("title", "notes", "max_skips", "start", "end")


def update_entry(path: str | os.PathLike, change: Callable[[Entry | None], Entry]) -> Entry:
    """Replace the entry at ``path`` by what ``change`` makes of it, or of None where there is none yet.

    No other process changes the file in between: hours may have passed since the caller read it last.

    Raises:
        CoeffsError: The file there is no entry, or nothing can be written.
    """
    path = Path(path)
    with suppress(OSError):  # coeffs.save says what is wrong with the folder
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        entry = change(coeffs.load(path) if path.is_file() else None)
        coeffs.save(entry, path)
    return entry


def carried_over(new: Entry, old: Entry | None) -> tuple[Entry, list[str]]:
    """A new fit with everything of an earlier entry that is still true, and in words what was kept and dropped.

    Plans do not depend on the polynomial. Verified thresholds are true while the gate is the same.
    """
    if old is None:
        return new, []
    if (old.model, old.transformer_class) != (new.model, new.transformer_class):
        return new, [f"replaced an entry of another model, {old.label} ({old.transformer_class})"]
    by_hand = {name: getattr(old, name) for name in BY_HAND}
    warnings = [text for text in old.warnings if text.startswith(PLAN_WARNING) and old.plans]
    verified = [row for row in old.thresholds if row.kind != "replay"]
    said = [f"kept {_count(old.plans, 'plan')}"] if old.plans else []
    new = replace(new, plans=old.plans, **by_hand)
    same = same_gate(new, old)
    certificates = tuple(one for one in old.certificates if same or one.policy != "gate")
    if old.certificates:
        said.append(f"kept {len(certificates)} of {_count(old.certificates, 'certificate')}")
    new = replace(new, certificates=certificates)
    if verified and same:
        said.append(f"kept {_count(verified, 'verified threshold')}: the coefficients are the same")
        warnings += [text for text in old.warnings if text.startswith(VERIFIED_WARNING)]
    elif verified:
        said.append(
            f"dropped {_count(verified, 'verified threshold')}: they belong to other coefficients; "
            "`calibrate verify` measures these"
        )
        verified = []
    thresholds = (*new.thresholds, *verified)
    return replace(new, thresholds=thresholds, warnings=(*new.warnings, *warnings)), said


def same_gate(one: Entry, other: Entry) -> bool:
    """Whether two entries decide alike at every threshold: what was verified of one is true of the other."""
    names = (
        "signal",
        "target",
        "forecast",
        "forecast_of",
        "sign_rule",
        "max_skips",
        "start",
        "end",
    )
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    fits, others = _fits(one), _fits(other)
    return fits.keys() == others.keys() and all(_alike(fits[key], others[key]) for key in fits)


def _fits(entry: Entry) -> dict[tuple[str, str], Fit]:
    experts = entry.experts.items()
    return {(name, branch): fit for name, own in experts for branch, fit in own.branches.items()}


def _alike(one: Fit, other: Fit) -> bool:
    numbers = (*one.coefficients_high_to_low, *(one.domain or ()))
    others = (*other.coefficients_high_to_low, *(other.domain or ()))
    return len(numbers) == len(others) and all(
        isclose(a, b, rel_tol=SAME) for a, b in zip(numbers, others, strict=True)
    )


def _count(rows: Sized, noun: str) -> str:
    number = len(rows)
    return f"{number} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder against other updates; without locks on this file system, two at once may lose one."""
    handle = -1
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            # Of the folder itself: `lock` in it belongs to recording, and closing that file would free it.
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)
