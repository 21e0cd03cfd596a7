"""Reading and writing entries, in files and in layered registry folders.

A registry is a folder of ``<model>/v<version>.yaml`` (``<engine>/<model>/v<version>.yaml`` for
published sets) with a ``CHECKSUMS`` file. Layers, first wins: the ``registry`` argument, the folders
in ``TEACAL_REGISTRY``, the user's own folder, the one shipped with the package. Released files never
change; a new calibration is a new version.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from coeffs.entry import strict_yaml
from coeffs.entry.fields import plain
from coeffs.entry.schema import Entry, from_plain
from coeffs.errors import (
    AmbiguousEntry,
    CoeffsError,
    EntryError,
    EntryNotFound,
    WriteError,
    did_you_mean,
)

ENVIRONMENT = "TEACAL_REGISTRY"
SHIPPED = Path(__file__).parent / "registry"

_VERSION_FILE = re.compile(r"v([1-9][0-9]{0,6})\.yaml")
_NAME = re.compile(r"(?P<model>[a-z0-9._/-]+?)(?:@v(?P<version>[0-9]{1,7}))?")


# --- files ----------------------------------------------------------------------------------------


def loads(text: str | bytes, file: str | None = None) -> Entry:
    """The entry in a YAML document.

    Raises:
        EntryError: With ``file``, the line and the key of what is wrong.
    """
    lines: dict[strict_yaml.Path, int] = {}
    try:
        return from_plain(strict_yaml.parse(text, lines))
    except EntryError as error:
        path = error.path
        while path and path not in lines:
            path = path[:-1]
        line = error.line or lines.get(path)
        raise EntryError(error.problem, error.path, file, line) from None


def load_file(path: str | Path) -> Entry:
    """The entry in a file (a run folder stands for its ``entry.yaml``)."""
    path = Path(path)
    if path.is_dir():
        path = path / "entry.yaml"
    try:
        with path.open("rb") as stream:
            content = stream.read(strict_yaml.MAX_BYTES + 1)
    except OSError as error:
        raise EntryNotFound(f"{path}: {error.strerror or error}; expected an entry file") from None
    return loads(content, str(path))


def dump(entry: Entry) -> str:
    """Canonical YAML of an entry: ``loads(dump(entry)) == entry``, to the last bit of a float."""
    return strict_yaml.write(plain(entry))


def save(entry: Entry, path: str | Path) -> Path:
    """Write an entry atomically: a reader sees the old file or the new one."""
    path = Path(path)
    text = dump(entry)
    if len(text.encode()) > strict_yaml.MAX_BYTES:
        problem = f"{entry.label} would take more than {strict_yaml.MAX_BYTES} bytes"
        raise EntryError(f"{problem}: leave out alternatives or plans")
    return write(text, path)


def write(text: str, path: Path) -> Path:
    """Write a file atomically, with its folder; ``WriteError`` where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or error}; nothing was changed") from None
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, flush to disk, move."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A registry folder and what it is called in messages; rank 0 is asked first."""

    name: str
    root: Path
    rank: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Released:
    """A released file: its place gives model and version, its content is read on demand."""

    layer: Layer
    model: str
    version: int

    @property
    def path(self) -> Path:
        return self.layer.root / self.model / f"v{self.version}.yaml"

    @property
    def label(self) -> str:
        return f"{self.model}@v{self.version}"

    def entry(self) -> Entry:
        """The entry; its model and version must be the ones of its folder and file name."""
        entry = load_file(self.path)
        if entry.label != self.label:
            problem = f"{entry.label} lies at {self.model}/v{self.version}.yaml: move or correct it"
            raise EntryError(problem, file=str(self.path))
        return entry


def user_registry() -> Path:
    """The user's own registry folder by the platform's convention; it need not exist."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "teacal" / "registry"


def layers(registry: str | Path | None = None) -> list[Layer]:
    """The registry folders in the order they are asked.

    Raises:
        EntryNotFound: If a folder that was named (argument or environment) is none.
    """
    folders = [] if registry is None else [Layer("--registry", Path(registry))]
    for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
        if part:
            folders.append(Layer(ENVIRONMENT, Path(part)))
    for layer in folders:
        if not layer.root.is_dir():
            problem = f"registry {layer.root} (from {layer.name}) is not a folder"
            raise EntryNotFound(f"{problem}: create it or correct the name")
    if user_registry().is_dir():
        folders.append(Layer("user", user_registry()))
    folders.append(Layer("shipped", SHIPPED))
    return [replace(layer, rank=rank) for rank, layer in enumerate(folders)]


def released(registry: str | Path | None = None) -> list[Released]:
    """Every released file, shadowed ones left out, by model and version; nothing is read."""
    files: dict[tuple[str, int], Released] = {}
    for layer in layers(registry):
        for item in in_layer(layer):
            files.setdefault((item.model, item.version), item)
    return [files[key] for key in sorted(files)]


def in_layer(layer: Layer, *models: str) -> Iterator[Released]:
    """The files of a layer, or only those of some models."""
    for folder in models or ("*", "*/*"):
        for path in layer.root.glob(f"{folder}/v*.yaml"):
            model = path.parent.relative_to(layer.root).as_posix()
            match = _VERSION_FILE.fullmatch(path.name)
            if match and not model.startswith("."):
                yield Released(layer, model, int(match[1]))


def entries(registry: str | Path | None = None) -> list[Entry]:
    """All entries of all layers, published and measured, sorted by model and version."""
    return [item.entry() for item in released(registry)]


def readable(registry: str | Path | None = None) -> tuple[list[Entry], list[CoeffsError]]:
    """The entries that can be read, and the errors of the others."""
    valid, errors = [], []
    for item in released(registry):
        try:
            valid.append(item.entry())
        except CoeffsError as error:
            errors.append(error)
    return valid, errors


# --- names ----------------------------------------------------------------------------------------


def load(name_or_path: str | Path, registry: str | Path | None = None) -> Entry:
    """The entry of a name (newest version), of ``name@v2``, or of a file or run folder.

    A short name (``longcat-image``) means an own measured entry. Where there is none, it means a
    published set if exactly one has this name and was not copied from another model's.

    Raises:
        EntryNotFound: Nothing has this name, version or path.
        AmbiguousEntry: Several published sets answer to the name, or only a copied one.
        EntryError: The file is not a valid entry.
    """
    name = str(name_or_path)
    looks_like_path = name.endswith((".yaml", ".yml")) or name.startswith((".", os.sep))
    if isinstance(name_or_path, Path) or looks_like_path or "\\" in name:
        return load_file(name_or_path)
    match = _NAME.fullmatch(name.lower())
    if match is None:
        expected = "expected model, model@v2 or a path to a YAML file"
        raise EntryNotFound(f"{name!r} is no entry name: {expected}")
    model, version = match["model"], match["version"]
    files = released(registry)
    own = [item for item in files if item.model == model]
    if own:
        return _version(own, version).entry()
    if Path(name).is_dir():
        return load_file(name)
    return _published(files, model, version)


def _version(files: list[Released], version: str | None) -> Released:
    """The wanted version of a model, or the newest one of the first layer that has any."""
    if version is None:
        return min(files, key=lambda item: (item.layer.rank, -item.version))
    for item in files:
        if item.version == int(version):
            return item
    known = ", ".join(f"v{item.version}" for item in files)
    model = files[0].model
    raise EntryNotFound(f"{model} has no version {version}: expected one of {known}")


def _published(files: list[Released], model: str, version: str | None) -> Entry:
    """The only set under somebody's name that a short name can mean."""
    candidates: dict[str, list[Released]] = {}
    for item in files:
        owner, _, name = item.model.rpartition("/")
        if owner and name.startswith(model):
            candidates.setdefault(item.model, []).append(item)
    same_name = [group for name, group in candidates.items() if name.endswith(f"/{model}")]
    sets = [_version(group, version).entry() for group in same_name]
    measured = [entry for entry in sets if entry.status == "measured"]
    if len(measured) == 1:
        return measured[0]
    names = ", ".join(candidates)
    if len(candidates) == 1 and sets:
        if sets[0].status != "copied":
            return sets[0]
        problem = f"the only set of this name, {sets[0].label}, was copied from"
        advice = f"ask for {names} by its full name if you want it"
        raise AmbiguousEntry(f"{model}: {problem} {sets[0].copied_from}; {advice}")
    if candidates:
        problem = f"no measured entry, and published sets differ: {names}; name one of them in full"
        raise AmbiguousEntry(f"{model}: {problem}")
    raise EntryNotFound(_no_such(model, files))


def _no_such(model: str, files: list[Released]) -> str:
    stem = model.rpartition("/")[2]
    known = sorted({item.model for item in files})
    hint = did_you_mean(model, known, closeness=0.5)  # owner's prefix: mochi-2, alivilab/mochi-1
    similar = [name for name in known if stem in name][:3]
    if not hint and similar:
        hint = f"did you mean {' or '.join(similar)}?"
    asked = ", ".join(dict.fromkeys(item.layer.name for item in files))
    return f"no entry {model!r} in {asked}: {hint or 'see `calibrate list`'}"
