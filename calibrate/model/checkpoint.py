"""From a model's name to its checkpoint, without ever running code that the checkpoint brings along."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidCheckpoint, ModelNotFound, UnsafeCheckpoint, one_line
from calibrate.model.table import ModelSpec, class_defaults, find_model, model_table, recognise
from calibrate.text import did_you_mean

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The hub's cache keeps a repository as models--owner--name/snapshots/<commit>.
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete local folder in diffusers' format, or a loaded pipeline, and how it was named.

    Attributes:
        folder: None for a loaded pipeline.
        repository: Hub id, alias of an embedded model, or the folder's own name: never a machine's path.
        spec: The table's row, or what any checkpoint of the pipeline's class needs.
        recognised: By what the row was found where the name given was not the row's; else empty.
        pipeline: Where it is loaded already.
    """

    repository: str
    slug: str
    pipeline_class: str
    spec: ModelSpec | None
    folder: Path | None = None
    revision: str | None = None
    recognised: str = ""
    pipeline: Any = None

    def as_dict(self) -> dict[str, str | None]:
        """What the manifest and the entry say about the weights; content is hashed where no revision pins it."""
        hashed = self.revision is None and self.folder is not None
        digest = weights_sha256(self.folder) if hashed and self.folder else None
        return {"repository": self.repository, "revision": self.revision, "sha256": digest}

    @property
    def weights_bytes(self) -> int:
        """Size of all weights on disk; 0 for a loaded pipeline."""
        files = self.folder.glob("*/*") if self.folder else ()
        return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin"))


def find_checkpoint(model: Any, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint behind an alias, a local folder or a hub id, or of a loaded diffusers pipeline.

    The hub is asked only when nothing else fits.
    """
    if hasattr(model, "components"):
        return _loaded(model)
    name = os.fspath(model)
    row = find_model(name)
    folder = Path(name).expanduser()
    if row is not None and row.embedded:
        folder = Path(str(files("calibrate") / "embedded" / row.embedded))
        if not folder.is_dir():
            raise ModelNotFound(
                f"{row.alias}: its weights are missing from this installation; reinstall teacal"
            )
        checkpoint = _in_folder(folder, row.alias, row)
    elif name and folder.is_dir():
        checkpoint = _in_folder(folder, folder.resolve().name, None)
    elif row is not None or _REPOSITORY.fullmatch(name):
        repository = (row and row.repository) or name
        checkpoint = _in_folder(_download(name, repository, allow_pickle), repository, row)
    else:
        aliases = [row.alias for row in model_table()]
        hint = (
            did_you_mean(name, aliases)
            or "Give a folder with a model_index.json, a hub id, or one of:"
        )
        raise ModelNotFound(
            f"{name or '(empty name)'}: no model of that name; tried the embedded models, a folder here, and a hub id "
            f"(owner/name). {hint} {', '.join(aliases)}"
        )
    assert checkpoint.folder is not None
    _refuse_code(checkpoint.folder)
    if not allow_pickle:
        _refuse_pickle(checkpoint.folder)
    return checkpoint


def pipeline_class_of(checkpoint: Checkpoint) -> type:
    """The pipeline's class, without its weights, so that a wrong option is refused before gigabytes are read."""
    import diffusers

    if checkpoint.pipeline is not None:
        return type(checkpoint.pipeline)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class, None)
    if isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline):
        return pipeline_class
    raise InvalidCheckpoint(
        f"{checkpoint.repository}: diffusers {diffusers.__version__} has no pipeline {checkpoint.pipeline_class}; "
        "a newer diffusers may have it"
    )


def weights_sha256(folder: Path) -> str:
    """One hash over names and contents of the denoisers' configuration and weights."""
    parts = [part for part in folder.iterdir() if re.match(r"transformer|denoiser|dit", part.name)]
    suffixes = {".json", ".safetensors", ".bin"}
    paths = sorted(path for part in parts for path in part.glob("*") if path.suffix in suffixes)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(_file_digest(path, path.stat().st_mtime_ns))
    return digest.hexdigest()


@cache  # tens of gigabytes, asked for more than once
def _file_digest(path: Path, changed: int) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _loaded(pipeline: Any) -> Checkpoint:
    from runtime.facts import repository_of

    def setting(key: str) -> Any:
        component, _, name = key.partition(".")
        holder = pipeline if component == "pipeline" else getattr(pipeline, component, None)
        return (getattr(holder, "config", None) or {}).get(name)

    path = str(setting("pipeline._name_or_path") or "")
    snapshot = _SNAPSHOT.search(Path(path).as_posix())
    pipeline_class = type(pipeline).__name__
    repository = repository_of(pipeline) or pipeline_class
    if snapshot:
        repository = f"{snapshot[1]}/{snapshot[2]}"
    spec, recognised = _row_of(pipeline_class, [repository], setting)
    row = find_model(repository)
    return Checkpoint(
        repository=repository,
        revision=snapshot[3] if snapshot else None,
        slug=row.slug if row else slug_of(repository.rpartition("/")[2]),
        pipeline_class=pipeline_class,
        spec=spec,
        recognised=recognised,
        pipeline=pipeline,
    )


def _in_folder(folder: Path, repository: str, row: ModelSpec | None) -> Checkpoint:
    """The checkpoint in a folder; a folder of the hub's cache is the repository that it was fetched from."""
    index = model_index(folder)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise UnsafeCheckpoint(
            f"{folder}: model_index.json names a pipeline from a Python file ({pipeline_class!r}), which is never "
            "run; load it yourself and hand the pipeline to calibrate.record"
        )

    def setting(key: str) -> Any:
        component, _, name = key.partition(".")
        return index.get(name) if component == "pipeline" else _config(folder / component).get(name)

    snapshot = _SNAPSHOT.search(folder.resolve().as_posix())
    if snapshot:
        repository = f"{snapshot[1]}/{snapshot[2]}"
    spec, recognised = row, ""
    if row is None:
        names = [repository, str(index.get("_name_or_path") or "")]
        spec, recognised = _row_of(pipeline_class, names, setting)
        row = find_model(repository)
    return Checkpoint(
        folder=folder,
        repository=repository,
        revision=snapshot[3] if snapshot else None,
        slug=row.slug if row else slug_of(repository.rpartition("/")[2]),
        pipeline_class=pipeline_class,
        spec=spec,
        recognised=recognised,
    )


def _row_of(
    pipeline_class: str, names: list[str], setting: Callable[[str], Any]
) -> tuple[ModelSpec | None, str]:
    return recognise(pipeline_class, names, setting) or (class_defaults(pipeline_class), "")


def model_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json: the pipeline's class, its components and settings."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder}: no model_index.json in it; expected a checkpoint in diffusers' folder format, as written by "
            "pipeline.save_pretrained"
        ) from None
    except OSError as error:
        raise InvalidCheckpoint(
            f"{path}: cannot be read ({error.strerror}); check the rights to it"
        ) from None
    except ValueError as error:
        raise InvalidCheckpoint(
            f"{path}: cannot be read ({one_line(error)}); fetch the checkpoint again"
        ) from None
    if not isinstance(index, dict):
        raise InvalidCheckpoint(
            f"{path}: {type(index).__name__} found; expected an object naming the components"
        )
    return index


def _config(component: Path) -> dict[str, Any]:
    """A component's configuration; empty where there is none that can be read."""
    names = ("config.json", "scheduler_config.json")
    path = next((component / name for name in names if (component / name).exists()), None)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _download(name: str, repository: str, allow_pickle: bool) -> Path:
    from diffusers import DiffusionPipeline

    safetensors = None if allow_pickle else True
    try:
        folder = DiffusionPipeline.download(
            repository, use_safetensors=safetensors, trust_remote_code=False
        )
    except Exception as error:  # the hub client raises from four libraries; none of them is a programming error here
        raise ModelNotFound(
            f"{name}: tried the embedded models, a folder of that name, the local cache and the hub ({repository}): "
            f"{one_line(error)}. Check the name and the connection, log in with `hf auth login` if it is gated, or "
            "give a local folder"
        ) from None
    return Path(folder)


def _refuse_code(folder: Path) -> None:
    """Refuse a checkpoint whose configuration names anything but classes of diffusers and transformers."""
    from diffusers import pipelines

    for component, value in model_index(folder).items():
        if component.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        library = value[0]
        known = isinstance(library, str) and (
            library in {"diffusers", "transformers"} or hasattr(pipelines, library)
        )
        path = folder / component
        if not known or Path(component).name != component or (path / f"{library}.py").exists():
            raise UnsafeCheckpoint(
                f"{folder}: model_index.json takes {component} from {library!r}; expected diffusers or transformers. "
                "Code from a checkpoint is never run: load it yourself and hand the pipeline to calibrate.record"
            )
        if str(value[1]).startswith("Auto") and _names_remote_code(path):
            raise UnsafeCheckpoint(
                f"{path}: its configuration names Python files (auto_map), which are never run"
            )


def _names_remote_code(folder: Path) -> bool:
    for path in folder.glob("*config.json"):
        try:
            if "auto_map" in json.loads(path.read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            return True  # unreadable: from_pretrained would not get further either
    return False


def _refuse_pickle(folder: Path) -> None:
    """Refuse a component whose only weights are pickled, before anything is read from it."""
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = [path.name for path in component.iterdir()]
        pickled = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise UnsafeCheckpoint(
                f"{component / pickled[0]}: pickled weights can run code and are refused; convert the checkpoint to "
                "safetensors (pipeline.save_pretrained does), or pass --allow-pickle if you trust its author"
            )


def slug_of(name: str) -> str:
    """A name that can be a folder everywhere."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-_") or "model"
