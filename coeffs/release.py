"""Releasing entries into a registry folder, and checking that released files are as they were."""

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from coeffs.entry.polynomial import falling_ranges, negative_ranges
from coeffs.entry.schema import Candidate, Entry
from coeffs.errors import CoeffsError, EntryError, PublishError, WriteError
from coeffs.store import Layer, dump, in_layer, layers, user_registry, write_atomically

CHECKSUMS = "CHECKSUMS"

_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_MACHINE_PATH = re.compile(r"(?:^|[\s=\"'])(?:/(?:home|root|Users|tmp|mnt|work)/|[A-Za-z]:\\|~/)")
_HELD_OUT = ("r2_held_out", "rmse_held_out")
# Below it `calibrate fit` calls its own held-out figures and intervals rough.
FEW_PROMPTS = 8
# The words with which `calibrate fit` advises against its own polynomial.
_USELESS = "skip uniformly instead"


def publish(entry: Entry, registry: str | Path | None = None) -> Path:
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
        raise WriteError(f"{root}: {error.strerror or error}; nothing was published") from None


def _publish(entry: Entry, root: Path) -> Path:
    known = [item for layer in layers(root) for item in in_layer(layer, entry.model)]
    newest = max(known, key=lambda item: item.version, default=None)
    if newest is not None and newest.entry() == replace(entry, version=newest.version):
        raise PublishError(f"{newest.label} already says exactly this: nothing to publish")
    version = newest.version + 1 if newest else 1
    path = root / entry.model / f"v{version}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump(replace(entry, version=version)))
    try:
        name = path.relative_to(root).as_posix()
        write_checksums(root, read_checksums(root) | {name: checksum(path)})
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
    if not path.is_file():
        return {}
    checksums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = _CHECKSUM_LINE.fullmatch(line)
        if not match:
            problem = f"{line[:60]!r}: expected '<sha256>  <path>'"
            raise EntryError(problem, file=str(path), line=number)
        checksums[match[2]] = match[1]
    return checksums


def write_checksums(root: Path, checksums: dict[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums.items())]
    write_atomically(root / CHECKSUMS, "".join(lines))


def problems(registry: str | Path | None = None) -> list[str]:
    """Unreadable entries and missing or differing checksums of all layers; empty when sound."""
    return [problem for layer in layers(registry) for problem in _layer_problems(layer)]


def _layer_problems(layer: Layer) -> Iterator[str]:
    recorded = read_checksums(layer.root)
    for item in in_layer(layer):
        expected = recorded.pop(item.path.relative_to(layer.root).as_posix(), None)
        if expected is None:
            yield f"{item.path}: not in {CHECKSUMS}; publish entries with `calibrate publish`"
        elif checksum(item.path) != expected:
            advice = "restore it and publish a new version instead"
            yield f"{item.path}: changed after its release; {advice}"
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
    fatal: bool
    forcible: bool = False

    def __str__(self) -> str:
        advice = "; --force releases it all the same" if self.forcible else ""
        return f"{'error' if self.fatal else 'warning'}: {self.text}{advice}"


def entry_problems(entry: Entry) -> list[Problem]:
    """Problems of an entry, fatal ones first; other people's sets may lack what we measure."""
    problems = [Problem(f"a machine's path in {name}: remove it", True) for name in _paths(entry)]
    for name, expert in entry.experts.items():
        for branch, fit in expert.branches.items():
            problems += _fit_problems(f"{name}/{branch}", fit, entry.status == "measured")
    if entry.status == "measured":
        problems += _measured_problems(entry)
        problems += _doubts(entry)
    return sorted(problems, key=lambda problem: not problem.fatal)


def _measured_problems(entry: Entry) -> Iterator[Problem]:
    required = {
        "source.run_id": entry.source.run_id,
        "source.log_sha256": entry.source.log_sha256,
        "transformer_class": entry.transformer_class,
        "protocol.num_steps": entry.protocol.num_steps,
    }
    for name, value in required.items():
        if value is None:
            yield Problem(f"{name} is missing: draft the entry with `calibrate fit RUN`", True)
    if not any(expert.branches or expert.mag_ratios for expert in entry.experts.values()):
        yield Problem("no coefficients and no mag_ratios", True)
    if not entry.thresholds:
        yield Problem("no thresholds: nobody can tell what the coefficients are worth", True)
    elif all(row.kind != "verified" for row in entry.thresholds):
        yield Problem("no verified threshold: run `calibrate verify`", False)


def _doubts(entry: Entry) -> Iterator[Problem]:
    """What makes the entry worthless although it is complete."""
    useless = [warning for warning in entry.warnings if _USELESS in warning]
    for name, expert in entry.experts.items():
        for branch, fit in expert.branches.items():
            if branch == "pooled" and branch != expert.recommended:
                continue  # nothing uses it
            r2 = (fit.figures or {}).get("r2_held_out")
            label = f"{name}/{branch}"
            if r2 is not None and r2 <= 0 and not useless:
                useless.append(f"{label}: no better than a constant (held-out R² {r2:.2f})")
            prompts = fit.counts.prompts if fit.counts else None
            if prompts is not None and prompts < FEW_PROMPTS:
                text = f"{label}: {prompts} prompts, expected at least {FEW_PROMPTS}; record more"
                yield Problem(text, True, forcible=True)
    for text in useless:
        yield Problem(text, True, forcible=True)


def _fit_problems(name: str, fit: Candidate, measured: bool) -> Iterator[Problem]:
    if fit.domain is None:
        yield Problem(f"{name}: no domain", measured)
        return
    for low, high in negative_ranges(fit.polynomial(), fit.domain)[:1]:
        text = f"{name}: negative on its domain (x {low:.3g} to {high:.3g})"
        text += ", so that engines' sign rules disagree"
        if measured:
            text += ": fit with `calibrate fit RUN --constrained`"
        yield Problem(text, measured)
    for low, high in falling_ranges(fit.polynomial(), fit.domain)[:1]:
        yield Problem(f"{name}: falls with x from {low:.3g} to {high:.3g}", False)
    if measured and (fit.counts is None or not fit.counts.pairs):
        yield Problem(f"{name}: no count of pairs", True)
    figures = fit.figures or {}
    if measured and all(figures.get(figure) is None for figure in _HELD_OUT):
        yield Problem(f"{name}: no held-out figure (needs at least two prompts)", True)


def _paths(entry: Entry) -> list[str]:
    """Names of the texts that hold a path of some machine."""
    texts: dict[str, object] = {
        "notes": entry.notes,
        "checkpoint.repository": entry.checkpoint.repository,
    }
    texts |= {f"source.{name}": value for name, value in vars(entry.source).items()}
    texts |= {f"warnings[{place}]": text for place, text in enumerate(entry.warnings)}
    for name, value in entry.protocol.call_arguments.items():
        texts[f"protocol.call_arguments.{name}"] = value
    return [name for name, text in texts.items() if _MACHINE_PATH.search(str(text))]
