"""Reading, writing and publishing entries in layered registry folders.

A registry is a folder ``<model>/v<version>.yaml`` (or ``<engine>/<model>/v<version>.yaml`` for published sets) with a
``CHECKSUMS`` file. Layers, first wins: the ``registry`` argument, the folders in ``TEACAL_REGISTRY``, the user's own
folder, the one shipped with the package. Released files never change; a new calibration is a new version.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coeffs.entry import strict_yaml
from coeffs.entry.fields import plain
from coeffs.entry.schema import Entry, from_plain
from coeffs.errors import AmbiguousEntry, CoeffsError, EntryError, EntryNotFound, PublishError

ENVIRONMENT = "TEACAL_REGISTRY"
SHIPPED = Path(__file__).parent / "registry"

_VERSION_FILE = re.compile(r"v([1-9][0-9]{0,6})\.yaml")
_NAME = re.compile(r"(?P<model>[a-z0-9._/-]+?)(?:@v(?P<version>[0-9]{1,7}))?")


@dataclass(frozen=True)
class Layer:
    """One registry folder and what it is called in messages."""

    name: str
    root: Path


@dataclass(frozen=True)
class Released:
    """One released file: its model and version come from its place, the content is read on demand."""

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


def loads(text: str | bytes, file: str | None = None) -> Entry:
    """The entry in a YAML document.

    Raises:
        EntryError: With ``file``, the line and the key of what is wrong.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        return from_plain(strict_yaml.parse(text, lines))
    except EntryError as error:
        path = error.path
        while path and path not in lines:
            path = path[:-1]
        line = error.line or lines.get(path)
        raise EntryError(error.problem, error.path, file, line) from None


def load_file(path: str | Path) -> Entry:
    """The entry in one file (a run folder stands for its ``entry.yaml``)."""
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
    """Canonical YAML of an entry: ``loads(dump(entry)) == entry``, and every float comes back exactly."""
    return strict_yaml.write(plain(entry))


def save(entry: Entry, path: str | Path) -> Path:
    """Write an entry atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    text = dump(entry)
    if len(text.encode()) > strict_yaml.MAX_BYTES:
        raise EntryError(
            f"{entry.label} would take more than {strict_yaml.MAX_BYTES} bytes: leave out alternatives or plans"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise PublishError(f"{path}: {error.strerror or error}; nothing was changed") from None
    return path


def write_atomically(path: Path, text: str, *, exclusive: bool = False) -> None:
    """Temporary file beside the target, flushed to disk, then moved; ``exclusive`` raises FileExistsError instead."""
    import tempfile

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        if exclusive and not _linked(temporary, path):
            raise FileExistsError(f"{path} exists")
        if not exclusive:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _linked(source: str, target: Path) -> bool:
    """Give a file its final name unless that is taken; some file systems have no links, there the lock must do."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        if target.exists():
            return False
        os.replace(source, target)
    return True


# --- layers ---------------------------------------------------------------------------------------------------------


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
    named = [("--registry", Path(registry))] if registry is not None else []
    named += [
        (ENVIRONMENT, Path(part))
        for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep)
        if part
    ]
    for origin, root in named:
        if not root.is_dir():
            raise EntryNotFound(
                f"registry {root} (from {origin}) is not a folder: create it or correct the name"
            )
    user = user_registry()
    return [
        Layer(*part)
        for part in (*named, *([("user", user)] if user.is_dir() else []), ("shipped", SHIPPED))
    ]


def released(registry: str | Path | None = None) -> list[Released]:
    """Every released file of all layers, shadowed ones left out, sorted by model and version; nothing is read."""
    found: dict[tuple[str, int], Released] = {}
    for layer in layers(registry):
        for item in in_layer(layer):
            found.setdefault((item.model, item.version), item)
    return [found[key] for key in sorted(found)]


def in_layer(layer: Layer) -> Iterator[Released]:
    for outer in _subfolders(layer.root):
        yield from in_folder(layer, outer)
        for inner in _subfolders(layer.root / outer):
            yield from in_folder(layer, f"{outer}/{inner}")


def in_folder(layer: Layer, model: str) -> Iterator[Released]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in os.listdir(layer.root / model):
            if match := _VERSION_FILE.fullmatch(file):
                yield Released(layer, model, int(match[1]))


def _subfolders(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [
            item.name
            for item in os.scandir(folder)
            if item.is_dir() and not item.name.startswith(".")
        ]
    return []


# --- lookup ---------------------------------------------------------------------------------------------------------


def load(name_or_path: str | Path, registry: str | Path | None = None) -> Entry:
    """The entry of a name (newest version), of ``name@v2``, or of a file or run folder.

    A short name (``longcat-image``) means one's own measured entry; where there is none, it stands for a published set
    only if exactly one carries it and that set is not a copy of another model's.

    Raises:
        EntryNotFound: Nothing has this name, version or path.
        AmbiguousEntry: Several published sets answer to the name, or only a copied one.
        EntryError: The file is not a valid entry.
    """
    if isinstance(name_or_path, Path) or _looks_like_path(name_or_path):
        return load_file(name_or_path)
    match = _NAME.fullmatch(name_or_path.lower())
    if match is None:
        raise EntryNotFound(
            f"{name_or_path!r} is no entry name: expected model, model@v2 or a path to a YAML file"
        )
    model, version = match["model"], match["version"]
    files = released(registry)
    exact = _of_model(files, model, version)
    if exact is not None:
        return exact.entry()
    if any(item.model == model for item in files):
        known = ", ".join(f"v{item.version}" for item in files if item.model == model)
        raise EntryNotFound(f"{model} has no version {version}: expected one of {known}")
    if Path(name_or_path).is_dir():
        return load_file(name_or_path)
    return _published(files, model, version)


def _looks_like_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or name.startswith((".", os.sep)) or "\\" in name


def _of_model(files: list[Released], model: str, version: str | None) -> Released | None:
    mine = [item for item in files if item.model == model]
    if version is not None:
        return next((item for item in mine if item.version == int(version)), None)
    order = [layer.root for layer in dict.fromkeys(item.layer for item in mine)]
    first = min(mine, key=lambda item: order.index(item.layer.root), default=None)
    return (
        max((item for item in mine if item.layer == first.layer), key=lambda item: item.version)
        if first
        else None
    )


def _published(files: list[Released], model: str, version: str | None) -> Entry:
    """The only published set that a short name can mean, or an error that names the candidates."""
    stem = model.rpartition("/")[2]
    names = sorted({item.model for item in files if "/" in item.model})
    candidates = (
        [name for name in names if name.rpartition("/")[2].startswith(stem)]
        if "/" not in model
        else []
    )
    own = [
        entry for entry in _newest(files, candidates, model, version) if entry.status == "measured"
    ]
    if len(own) == 1:
        return own[0]
    if len(candidates) == 1 and candidates[0].endswith(f"/{model}"):
        found = _of_model(files, candidates[0], version)
        if found is None:
            raise EntryNotFound(f"{candidates[0]} has no version {version}")
        entry = found.entry()
        if entry.status != "copied":
            return entry
        raise AmbiguousEntry(
            f"{model}: the only set of this name, {entry.label}, was copied from {entry.copied_from}; "
            f"ask for {candidates[0]} by its full name if you want it"
        )
    if candidates:
        raise AmbiguousEntry(
            f"{model}: no measured entry, and published sets differ: {', '.join(candidates)}; name one of them in full"
        )
    import difflib

    every = sorted({item.model for item in files})
    close = (
        difflib.get_close_matches(model, every, 3, 0.5)
        or [name for name in every if stem in name][:3]
    )
    hint = f"did you mean {', '.join(close)}?" if close else "see `calibrate list`"
    raise EntryNotFound(
        f"no entry {model!r} in {', '.join(dict.fromkeys(item.layer.name for item in files))}: {hint}"
    )


def _newest(
    files: list[Released], candidates: list[str], model: str, version: str | None
) -> list[Entry]:
    found = [_of_model(files, name, version) for name in candidates if name.endswith(f"/{model}")]
    return [item.entry() for item in found if item is not None]


def entries(registry: str | Path | None = None) -> list[Entry]:
    """All entries of all layers, published and measured, sorted by model and version."""
    return [item.entry() for item in released(registry)]


def readable(registry: str | Path | None = None) -> tuple[list[Entry], list[CoeffsError]]:
    """All entries that can be read, and the errors of those that cannot: one broken file hides no other."""
    found, broken = [], []
    for item in released(registry):
        try:
            found.append(item.entry())
        except CoeffsError as error:
            broken.append(error)
    return found, broken
