"""From a model's name to its checkpoint, without ever running code that the checkpoint brings along."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidCheckpoint, ModelNotFound, UnsafeCheckpoint, one_line
from calibrate.model.protocol import Settings
from calibrate.model.table import Configuration, ModelSpec, find_model, model_table, recognise
from calibrate.model.weights import as_recorded, calibrated, weights_sha256
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
        digest = None if self.revision or not self.folder else weights_sha256(self.folder)
        return {"repository": self.repository, "revision": self.revision, "sha256": digest}

    @property
    def weights_bytes(self) -> int:
        """Size of all weights on disk; 0 for a loaded pipeline."""
        files = self.folder.glob("*/*") if self.folder else ()
        return sum(
            file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin")
        )


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
        name, folder = row.alias, Path(str(files("calibrate") / "embedded" / row.embedded))
    elif name and folder.is_dir():
        name, row = folder.resolve().name, None
    elif row is not None or _REPOSITORY.fullmatch(name):
        name = (row and row.repository) or name
        folder = _download(name, allow_pickle)
    else:
        aliases = [row.alias for row in model_table()]
        hint = did_you_mean(name, aliases) or (
            "Give a folder with a model_index.json, a hub id, or one of:"
        )
        raise ModelNotFound(
            f"{name or '(empty name)'}: no model of that name; tried the embedded models, a folder here, and a hub id "
            f"(owner/name). {hint} {', '.join(aliases)}"
        )
    return _in_folder(folder, name, row, allow_pickle)


def pipeline_class_of(checkpoint: Checkpoint) -> type:
    """The pipeline's class, without its weights, so that a wrong option is refused before gigabytes are read."""
    import diffusers

    if checkpoint.pipeline is not None:
        return type(checkpoint.pipeline)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class, None)
    if isinstance(pipeline_class, type) and issubclass(
        pipeline_class, diffusers.DiffusionPipeline
    ):
        return pipeline_class
    raise InvalidCheckpoint(
        f"{checkpoint.repository}: diffusers {diffusers.__version__} has no pipeline {checkpoint.pipeline_class}; "
        "a newer diffusers may have it"
    )


def _loaded(pipeline: Any) -> Checkpoint:
    from runtime.facts import repository_of

    def config(component: str) -> Settings:
        holder = pipeline if component == "pipeline" else getattr(pipeline, component, None)
        return getattr(holder, "config", None) or {}

    kind = type(pipeline).__name__
    path = Path(config("pipeline").get("_name_or_path") or "")
    return _identified(repository_of(pipeline) or kind, path, kind, config, pipeline=pipeline)


def _in_folder(
    folder: Path, name: str, row: ModelSpec | None, allow_pickle: bool
) -> Checkpoint:
    index = model_index(folder)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise UnsafeCheckpoint(
            f"{folder}: model_index.json names a pipeline from a Python file ({pipeline_class!r}), which is never "
            "run; load it yourself and hand the pipeline to calibrate.record"
        )
    _refuse_code(folder, index)
    if not allow_pickle:
        _refuse_pickle(folder)

    def config(component: str) -> Settings:
        return index if component == "pipeline" else _config(folder / component)

    return _identified(name, folder.resolve(), pipeline_class, config, row, folder=folder)


def _identified(
    name: str,
    path: Path,
    pipeline_class: str,
    config: Configuration,
    row: ModelSpec | None = None,
    **source: Any,
) -> Checkpoint:
    """The checkpoint with its row of the table; a folder of the hub's cache is the repository it was fetched from."""
    snapshot = _SNAPSHOT.search(path.as_posix())
    if snapshot:
        name = f"{snapshot[1]}/{snapshot[2]}"
    spec, recognised = row, ""
    if row is None:
        row = find_model(name)
        spec, recognised = recognise(pipeline_class, name, config)
    slug = row.slug if row else slug_of(name.rpartition("/")[2])
    if "folder" in source and not (recognised or row or snapshot):
        entry = calibrated(source["folder"], pipeline_class)
        if entry is not None:
            name, slug = entry.checkpoint.repository or name, slug_of(entry.model)
            spec = as_recorded(entry, spec)
            recognised = f"{entry.label}, by the hash of its weights"
    return Checkpoint(
        repository=name,
        revision=snapshot[3] if snapshot else None,
        slug=slug,
        pipeline_class=pipeline_class,
        spec=spec,
        recognised=recognised,
        **source,
    )


def model_index(folder: Path) -> Settings:
    """The content of model_index.json: the pipeline's class, its components and settings."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict):
            raise ValueError(f"{type(index).__name__} found, not an object")
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder}: no model_index.json in it; expected a checkpoint in diffusers' folder format, as written by "
            "pipeline.save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)}); check the rights to it, "
            "or fetch the checkpoint again"
        ) from None
    return index


def _config(component: Path) -> Settings:
    """A component's configuration; empty where there is none that can be read."""
    for name in ("config.json", "scheduler_config.json"):
        with suppress(OSError, ValueError, TypeError):
            return dict(json.loads((component / name).read_bytes()))
    return {}


def _download(repository: str, allow_pickle: bool) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                repository,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
            )
        )
    except Exception as error:  # the hub client raises from four libraries; none of them is a programming error here
        raise ModelNotFound(
            f"{repository}: tried the embedded models, a folder of that name, the local cache and the hub "
            f"({one_line(error)}). Check the name and the connection, log in with `hf auth login` if it is gated, or "
            "give a local folder"
        ) from None


def _refuse_code(folder: Path, index: Settings) -> None:
    """Refuse a checkpoint whose configuration names anything but classes of diffusers and transformers."""
    from diffusers import pipelines

    for component, value in index.items():
        if component.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        library = value[0]
        known = isinstance(library, str) and (
            library in {"diffusers", "transformers"} or hasattr(pipelines, library)
        )
        path = folder / component
        if (
            not known
            or Path(component).name != component
            or (path / f"{library}.py").exists()
        ):
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
            if "auto_map" in json.loads(path.read_bytes()):
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
