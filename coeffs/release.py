"""Releasing entries into a registry folder, and proving that released files are as they were."""

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from coeffs.entry.schema import Entry
from coeffs.errors import CoeffsError, EntryError, PublishError
from coeffs.store import Layer, dump, in_folder, in_layer, layers, user_registry, write_atomically

CHECKSUMS = "CHECKSUMS"


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(entry: Entry, registry: str | Path | None = None) -> Path:
    """Release an entry as the next version of its model in ``registry`` (the user's own folder by default).

    The version is one above every version of that model in any layer, so that a label never names two things. The
    file appears whole or not at all, is never overwritten, and its checksum is recorded; safe with many processes.

    Raises:
        PublishError: If the newest version already says the same, or the folder cannot be written.
    """
    root = Path(registry) if registry is not None else user_registry()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            known = [item for layer in layers(root) for item in in_folder(layer, entry.model)]
            newest = max(known, key=lambda item: item.version, default=None)
            if newest is not None and newest.entry() == replace(entry, version=newest.version):
                raise PublishError(f"{newest.label} already says exactly this: nothing to publish")
            version = newest.version + 1 if newest else 1
            path = root / entry.model / f"v{version}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, dump(replace(entry, version=version)), exclusive=True)
            try:
                write_checksums(
                    root, read_checksums(root) | {path.relative_to(root).as_posix(): checksum(path)}
                )
            except (OSError, CoeffsError):
                path.unlink()
                raise
    except OSError as error:
        raise PublishError(f"{root}: {error.strerror or error}; nothing was published") from None
    return path


def read_checksums(root: Path) -> dict[str, str]:
    """``CHECKSUMS`` of a registry folder: path relative to it -> SHA-256. Empty where there is no such file."""
    path = root / CHECKSUMS
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if not match:
            raise EntryError(
                f"{line[:60]!r}: expected '<sha256>  <path>'", file=str(path), line=number
            )
        found[match[2]] = match[1]
    return found


def write_checksums(root: Path, checksums: dict[str, str]) -> None:
    write_atomically(
        root / CHECKSUMS, "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums))
    )


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One publisher at a time; the operating system releases the lock when its holder dies, so it never goes stale."""
    with (root / ".lock").open("a+b") as stream:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def problems(registry: str | Path | None = None) -> list[str]:
    """What is wrong in the registry's files: unreadable entries, missing or differing checksums. Empty when sound."""
    found: list[str] = []
    for layer in layers(registry):
        found += _layer_problems(layer)
    return found


def _layer_problems(layer: Layer) -> list[str]:
    found = []
    recorded = read_checksums(layer.root)
    for item in in_layer(layer):
        name = item.path.relative_to(layer.root).as_posix()
        expected = recorded.pop(name, None)
        if expected is None:
            found.append(
                f"{item.path}: not in {CHECKSUMS}; publish entries with `calibrate publish`"
            )
        elif checksum(item.path) != expected:
            found.append(
                f"{item.path}: changed after its release; restore it and publish a new version instead"
            )
        try:
            item.entry()
        except CoeffsError as error:
            found.append(str(error))
    return found + [
        f"{layer.root / name}: listed in {CHECKSUMS} but missing; restore it"
        for name in sorted(recorded)
    ]
