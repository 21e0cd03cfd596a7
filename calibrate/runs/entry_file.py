"""The entry of a run: commands that take hours change it beside each other, and none undoes what another wrote."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np

import coeffs
from calibrate.model.protocol import AnyPath
from coeffs import Entry

PLAN_WARNING = "plan: "  # begins a warning that belongs to the plans
VERIFIED_WARNING = (
    "on real cached runs: "  # begins one that belongs to the verified thresholds
)
SAME = 1e-9  # relative: what two versions of numpy may make of the same pairs
# What a user writes into an entry by hand, and no fit knows.
BY_HAND = ("title", "notes", "max_skips", "start", "end")
# Besides the polynomials, what a gate's decisions depend on.
_gate = attrgetter(
    "signal",
    "target",
    "forecast",
    "forecast_of",
    "sign_rule",
    "max_skips",
    "start",
    "end",
)


def update_entry(path: AnyPath, change: Callable[[Entry | None], Entry]) -> Entry:
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


def carried_over(new: Entry, old: Entry | None, say: Callable[[str], None]) -> Entry:
    """A new fit with everything of an earlier entry that is still true; says what was kept and dropped.

    Plans do not depend on the polynomial. Verified thresholds are true while the gate is the same.
    """
    if old is None:
        return new
    if (old.model, old.transformer_class) != (new.model, new.transformer_class):
        say(f"replaced an entry of another model, {old.label} ({old.transformer_class})")
        return new
    new = replace(new, plans=old.plans, **{name: getattr(old, name) for name in BY_HAND})
    kept = []  # beginnings of the warnings that stay true
    if old.plans:
        say(f"kept {_count(old.plans, 'plan')}")
        kept.append(PLAN_WARNING)
    same = same_gate(new, old)
    certificates = tuple(row for row in old.certificates if same or row.policy != "gate")
    if old.certificates:
        say(f"kept {len(certificates)} of {_count(old.certificates, 'certificate')}")
        new = replace(new, certificates=certificates)
    verified = tuple(row for row in old.thresholds if row.kind != "replay")
    count = _count(verified, "verified threshold")
    if verified and same:
        say(f"kept {count}: the coefficients are the same")
        kept.append(VERIFIED_WARNING)
        new = replace(new, thresholds=new.thresholds + verified)
    elif verified:
        say(
            f"dropped {count}: they belong to other coefficients; `calibrate verify` measures these"
        )
    warnings = (text for text in old.warnings if text.startswith(tuple(kept)))
    return replace(new, warnings=(*new.warnings, *warnings))


def same_gate(one: Entry, other: Entry) -> bool:
    """Whether two entries decide alike at every threshold: what was verified of one is true of the other."""
    ours, theirs = _polynomials(one), _polynomials(other)
    return (_gate(one), ours.keys()) == (_gate(other), theirs.keys()) and all(
        len(numbers) == len(theirs[key]) and np.allclose(numbers, theirs[key], SAME, 0)
        for key, numbers in ours.items()
    )


def _polynomials(entry: Entry) -> dict[tuple[str, str], tuple[float, ...]]:
    """Expert and branch -> coefficients and domain."""
    return {
        (name, branch): (*fit.coefficients_high_to_low, *(fit.domain or ()))
        for name, expert in entry.experts.items()
        for branch, fit in expert.branches.items()
    }


def _count(rows: Sized, noun: str) -> str:
    return f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder against other updates; without locks on this file system, two at once may lose one."""
    with ExitStack() as stack:
        with suppress(OSError):
            # Of the folder itself: `lock` in it belongs to recording, and closing that file would free it.
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
