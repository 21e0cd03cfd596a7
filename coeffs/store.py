"""Reading and writing entries, in files and in layered registry folders.

A registry is a folder of ``<model>/v<version>.yaml`` (``<engine>/<model>/v<version>.yaml`` for
published sets) with a ``CHECKSUMS`` file. Layers, first wins: the ``registry`` argument, the folders
in ``TEACAL_REGISTRY``, the user's own folder, the one shipped with the package. Released files never
change; a new calibration is a new version.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coeffs.entry import strict_yaml
from coeffs.entry.fields import Text, plain
from coeffs.entry.schema import Entry, from_plain
from coeffs.errors import (
    AmbiguousEntry,
    CoeffsError,
    EntryError,
    EntryNotFound,
    WriteError,
    did_you_mean,
)
from coeffs.files import put

ENVIRONMENT = "TEACAL_REGISTRY"
SHIPPED = Path(__file__).parent / "registry"

Folder = str | Path | None  # a registry that is asked first

_VERSION_FILE = re.compile(r"v([1-9][0-9]{0,6})\.yaml")
_NAME = re.compile(r"([a-z0-9._/-]+?)(?:@v([0-9]{1,7}))?")


# --- files ----------------------------------------------------------------------------------------


def loads(text: str | bytes, file: Text = None) -> Entry:
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
        raise EntryError(error.problem, *error.path, file=file, line=line) from None


def load_file(path: str | Path) -> Entry:
    """The entry in a file (a run folder stands for its ``entry.yaml``)."""
    path = Path(path)
    if path.is_dir():
        path = path / "entry.yaml"
    try:
        with path.open("rb") as stream:
            content = stream.read(strict_yaml.MAX_BYTES + 1)
    except OSError as error:
        raise EntryNotFound(
            f"{path}: {error.strerror or error}; expected an entry file"
        ) from None
    return loads(content, str(path))


def dump(entry: Entry) -> str:
    """Canonical YAML of an entry: ``loads(dump(entry)) == entry``, to the last bit of a float."""
    return strict_yaml.write(plain(entry))


def save(entry: Entry, path: str | Path) -> Path:
    """Write an entry atomically: a reader sees the old file or the new one."""
    text = dump(entry)
    if len(text.encode()) > strict_yaml.MAX_BYTES:
        raise EntryError(
            f"{entry.label} would take more than {strict_yaml.MAX_BYTES} bytes"
            ": leave out alternatives or plans"
        )
    return write(text, Path(path))


def write(text: str, path: Path) -> Path:
    """Write atomically; ``WriteError`` where that is not possible."""
    try:
        put(path, text.encode())
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or error}; nothing was changed") from None
    return path


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
            raise EntryError(
                f"{entry.label} lies at {self.model}/v{self.version}.yaml: move or correct it",
                file=str(self.path),
            )
        return entry


def user_registry() -> Path:
    """The user's own registry folder by the platform's convention; it need not exist."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "teacal" / "registry"


def layers(registry: Folder = None) -> list[Layer]:
    """The registry folders in the order they are asked.

    Raises:
        EntryNotFound: If a folder that was named (argument or environment) is none.
    """
    folders = [] if registry is None else [("--registry", Path(registry))]
    named = filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep))
    folders += [(ENVIRONMENT, Path(part)) for part in named]
    for name, root in folders:
        if not root.is_dir():
            raise EntryNotFound(
                f"registry {root} (from {name}) is not a folder: create it or correct the name"
            )
    if user_registry().is_dir():
        folders.append(("user", user_registry()))
    folders.append(("shipped", SHIPPED))
    return [Layer(name, root, rank) for rank, (name, root) in enumerate(folders)]


def released(registry: Folder = None) -> list[Released]:
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


def entries(registry: Folder = None) -> list[Entry]:
    """All entries of all layers, published and measured, sorted by model and version."""
    return [item.entry() for item in released(registry)]


def readable(registry: Folder = None) -> tuple[list[Entry], list[CoeffsError]]:
    """The entries that can be read, and the errors of the others."""
    valid, errors = [], []
    for item in released(registry):
        try:
            valid.append(item.entry())
        except CoeffsError as error:
            errors.append(error)
    return valid, errors


# --- names ----------------------------------------------------------------------------------------


def load(name_or_path: str | Path, registry: Folder = None) -> Entry:
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
        return load_file(name)
    match = _NAME.fullmatch(name.lower())
    if not match:
        raise EntryNotFound(
            f"{name!r} is no entry name: expected model, model@v2 or a path to a YAML file"
        )
    model, version = match.groups()
    files = released(registry)
    if any(item.model == model for item in files):
        return _version(files, model, version)
    if Path(name).is_dir():
        return load_file(name)
    return _published(files, model, version)


def _version(files: list[Released], model: str, version: Text) -> Entry:
    """The wanted version of a model, or the newest one of the first layer that has any."""
    of_model = [item for item in files if item.model == model]
    if version is None:
        return min(of_model, key=lambda item: (item.layer.rank, -item.version)).entry()
    for item in of_model:
        if item.version == int(version):
            return item.entry()
    known = ", ".join(f"v{item.version}" for item in of_model)
    raise EntryNotFound(f"{model} has no version {version}: expected one of {known}")


def _published(files: list[Released], model: str, version: Text) -> Entry:
    """The only set under somebody's name that a short name can mean."""
    names = dict.fromkeys(
        item.model for item in files if item.model.partition("/")[2].startswith(model)
    )
    same = [_version(files, name, version) for name in names if name.endswith(f"/{model}")]
    measured = [entry for entry in same if entry.status == "measured"]
    listed = ", ".join(names)
    if len(measured) == 1:
        return measured[0]
    if not names:
        raise EntryNotFound(_no_such(model, files))
    if len(names) > 1 or not same:
        raise AmbiguousEntry(
            f"{model}: no measured entry, and published sets differ: {listed}; "
            "name one of them in full"
        )
    if same[0].status == "copied":
        raise AmbiguousEntry(
            f"{model}: the only set of this name, {same[0].label}, was {same[0].origin}; "
            f"ask for {listed} by its full name if you want it"
        )
    return same[0]


def _no_such(model: str, files: list[Released]) -> str:
    known = sorted({item.model for item in files})
    hint = did_you_mean(model, known, closeness=0.5)  # mochi-2: alivilab/mochi-1 has a prefix
    similar = [name for name in known if model.rpartition("/")[2] in name][:3]
    if not hint and similar:
        hint = f"did you mean {' or '.join(similar)}?"
    asked = ", ".join(dict.fromkeys(item.layer.name for item in files))
    return f"no entry {model!r} in {asked}: {hint or 'see `calibrate list`'}"
