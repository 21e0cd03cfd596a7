"""Releasing entries into a registry folder, and checking that released files are as they were."""

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from coeffs.entry.fields import plain
from coeffs.entry.polynomial import falling_ranges, negative_ranges
from coeffs.entry.schema import Entry, Fit
from coeffs.errors import CoeffsError, EntryError, PublishError, WriteError
from coeffs.store import Folder, Layer, dump, in_layer, layers, user_registry, write

CHECKSUMS = "CHECKSUMS"

_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_MACHINE_PATH = re.compile(
    r"(?:^|[\s=\"'])(?:/(?:home|root|Users|tmp|mnt|work)/|[A-Za-z]:\\|~/)"
)
# What a measured entry must state.
_REQUIRED = (
    "source.run_id",
    "source.log_sha256",
    "transformer_class",
    "protocol.num_steps",
)
# Below it `calibrate fit` calls its own held-out figures and intervals rough.
FEW_PROMPTS = 8
# The words with which `calibrate fit` advises against its own polynomial.
_USELESS = "skip uniformly instead"


def publish(entry: Entry, registry: Folder = None) -> Path:
    """Release an entry as the next version of its model, by default in the user's own registry.

    The version is one above every version of that model in any layer, so that a label never names
    two things. The file is written atomically, never overwritten, and its checksum is recorded;
    processes may publish at the same time.

    Raises:
        PublishError: If the newest version already says the same.
        WriteError: If the folder cannot be written.
    """
    root = Path(registry) if registry is not None else user_registry()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            return _publish(entry, root)
    except OSError as error:
        raise WriteError(
            f"{root}: {error.strerror or error}; nothing was published"
        ) from None


def _publish(entry: Entry, root: Path) -> Path:
    known = [item for layer in layers(root) for item in in_layer(layer, entry.model)]
    newest = max(known, key=lambda item: item.version, default=None)
    if newest is not None and newest.entry() == replace(entry, version=newest.version):
        raise PublishError(f"{newest.label} already says exactly this: nothing to publish")
    entry = replace(entry, version=newest.version + 1 if newest else 1)
    path = write(dump(entry), root / entry.model / f"v{entry.version}.yaml")
    try:
        released = {path.relative_to(root).as_posix(): checksum(path)}
        write_checksums(root, read_checksums(root) | released)
    except (OSError, CoeffsError):
        path.unlink()
        raise
    return path


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One publisher at a time, so that no version is given twice; the lock dies with its holder."""
    with (root / ".lock").open("a+b") as stream:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --- checksums ------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_checksums(root: Path) -> dict[str, str]:
    """``CHECKSUMS`` of a registry folder: relative path -> SHA-256. Empty without such a file."""
    path = root / CHECKSUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    checksums = {}
    for number, line in enumerate(lines, 1):
        if not (match := _CHECKSUM_LINE.fullmatch(line)):
            raise EntryError(
                f"{line[:60]!r}: expected '<sha256>  <path>'", file=str(path), line=number
            )
        checksums[match[2]] = match[1]
    return checksums


def write_checksums(root: Path, checksums: dict[str, str]) -> None:
    lines = (f"{digest}  {name}\n" for name, digest in sorted(checksums.items()))
    write("".join(lines), root / CHECKSUMS)


def problems(registry: Folder = None) -> list[str]:
    """Unreadable entries and missing or differing checksums of all layers; empty when sound."""
    return [problem for layer in layers(registry) for problem in _layer_problems(layer)]


def _layer_problems(layer: Layer) -> Iterator[str]:
    recorded = read_checksums(layer.root)
    for item in in_layer(layer):
        expected = recorded.pop(item.path.relative_to(layer.root).as_posix(), None)
        if expected is None:
            yield f"{item.path}: not in {CHECKSUMS}; publish entries with `calibrate publish`"
        elif checksum(item.path) != expected:
            yield (
                f"{item.path}: changed after its release; "
                "restore it and publish a new version instead"
            )
        try:
            item.entry()
        except CoeffsError as error:
            yield str(error)
    for name in sorted(recorded):
        yield f"{layer.root / name}: listed in {CHECKSUMS} but missing; restore it"


# --- is an entry fit for release ------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What speaks against a release.

    ``fatal`` ones forbid it; those that are also ``forcible`` doubt the entry's worth, not its
    form, and the owner may release it all the same.
    """

    text: str
    fatal: bool = True
    forcible: bool = False

    def __str__(self) -> str:
        advice = "; --force releases it all the same" if self.forcible else ""
        return f"{'error' if self.fatal else 'warning'}: {self.text}{advice}"


def entry_problems(entry: Entry) -> list[Problem]:
    """Problems of an entry, fatal ones first, its own warnings last; other people's sets may lack what we measure."""
    measured = entry.status == "measured"
    problems = [
        Problem(f"a machine's path in {name}: remove it") for name in _paths(plain(entry))
    ]
    doubts = [warning for warning in entry.warnings if _USELESS in warning]
    few = []
    for name, expert in entry.experts.items():
        for branch, fit in expert.branches.items():
            label = f"{name}/{branch}"
            problems += _fit_problems(label, fit, measured)
            if branch == "pooled" and branch != expert.recommended:
                continue  # nothing uses it
            r2 = (fit.figures or {}).get("r2_held_out")
            if r2 is not None and r2 <= 0 and not doubts:
                doubts.append(f"{label}: no better than a constant (held-out R² {r2:.2f})")
            prompts = fit.counts.prompts if fit.counts else None
            if prompts is not None and prompts < FEW_PROMPTS:
                few.append(
                    f"{label}: {prompts} prompts, expected at least {FEW_PROMPTS}; record more"
                )
    if measured:
        problems += _measured_problems(entry)
        problems += [Problem(text, forcible=True) for text in [*few, *doubts]]
    known = {problem.text for problem in problems}
    problems += [Problem(text, fatal=False) for text in entry.warnings if text not in known]
    return sorted(problems, key=lambda problem: not problem.fatal)


def _measured_problems(entry: Entry) -> Iterator[Problem]:
    for name in _REQUIRED:
        if attrgetter(name)(entry) is None:
            yield Problem(f"{name} is missing: draft the entry with `calibrate fit RUN`")
    if not any(expert.branches or expert.mag_ratios for expert in entry.experts.values()):
        yield Problem("no coefficients and no mag_ratios")
    if not entry.thresholds:
        yield Problem("no thresholds: nobody can tell what the coefficients are worth")
    elif all(row.kind != "verified" for row in entry.thresholds):
        yield Problem("no verified threshold: run `calibrate verify`", fatal=False)


def _fit_problems(name: str, fit: Fit, measured: bool) -> Iterator[Problem]:
    if fit.domain is None:
        yield Problem(f"{name}: no domain", measured)
        return
    polynomial = fit.polynomial()
    for low, high in negative_ranges(polynomial, fit.domain)[:1]:
        again = ": fit with `calibrate fit RUN --constrained`" if measured else ""
        yield Problem(
            f"{name}: negative on its domain (x {low:.3g} to {high:.3g}), "
            f"so that engines' sign rules disagree{again}",
            measured,
        )
    for low, high in falling_ranges(polynomial, fit.domain)[:1]:
        yield Problem(f"{name}: falls with x from {low:.3g} to {high:.3g}", fatal=False)
    if measured and (fit.counts is None or not fit.counts.pairs):
        yield Problem(f"{name}: no count of pairs")
    held_out = map((fit.figures or {}).get, ("r2_held_out", "rmse_held_out"))
    if measured and set(held_out) == {None}:
        yield Problem(f"{name}: no held-out figure (needs at least two prompts)")


def _paths(value: Any, name: str = "") -> Iterator[str]:
    """Keys of the texts that hold a path of some machine."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, f"{name}.{key}".lstrip("."))
    elif _MACHINE_PATH.search(str(value)):
        yield name
