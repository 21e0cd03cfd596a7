"""From a model's name to a loaded diffusers pipeline, without ever running code that a checkpoint brings along."""

import hashlib
import json
import os
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from calibrate.errors import InvalidCheckpoint, InvalidOption, ModelNotFound, UnsafeCheckpoint
from calibrate.model.table import ModelSpec, class_defaults, find_model, model_table

DTYPES = ("bfloat16", "float16", "float32")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete local folder in diffusers' format, or a loaded pipeline, and how it was named."""

    folder: Path | None  # None for a loaded pipeline
    repository: (
        str  # hub id, alias of an embedded model, or the folder's own name: never a machine's path
    )
    revision: str | None
    slug: str
    pipeline_class: str
    spec: ModelSpec | None  # defaults by name, or those of the pipeline's class
    pipeline: Any = None  # where it is loaded already

    def as_dict(self) -> dict[str, str | None]:
        """What the manifest and the entry say about the weights; content is hashed where no revision pins it."""
        hashed = self.revision is None and self.folder is not None
        digest = weights_sha256(self.folder) if hashed else None
        return {"repository": self.repository, "revision": self.revision, "sha256": digest}


def find_checkpoint(model: Any, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint behind an alias, a local folder or a hub id, or of a loaded diffusers pipeline.

    The hub is asked only when nothing else fits.
    """
    if hasattr(model, "components"):
        return _loaded(model)
    name = os.fspath(model)
    spec = find_model(name)
    folder = Path(name).expanduser()
    if spec is not None and spec.embedded:
        folder = Path(str(files("calibrate") / "embedded" / spec.embedded))
        if not folder.is_dir():
            raise ModelNotFound(
                f"{spec.alias}: its weights are missing from this installation; reinstall teacal"
            )
        return _checkpoint(folder, repository=spec.alias, revision=None, slug=spec.slug, spec=spec)
    if folder.is_dir():
        repository = folder.resolve().name
        checkpoint = _checkpoint(
            folder, repository=repository, revision=None, slug=slug_of(repository), spec=None
        )
    elif spec is not None or _REPOSITORY.fullmatch(name):
        repository = spec.repository if spec else name
        folder = _download(name, repository, allow_pickle)
        revision = folder.name if _HUB_SNAPSHOT.fullmatch(folder.name) else None
        slug = spec.slug if spec else slug_of(repository.rpartition("/")[2])
        checkpoint = _checkpoint(
            folder, repository=repository, revision=revision, slug=slug, spec=spec
        )
    else:
        aliases = ", ".join(row.alias for row in model_table())
        raise ModelNotFound(
            f"{name}: no model of that name; tried the embedded models, a folder here, and a hub id (owner/name). "
            f"Give a folder with a model_index.json, a hub id, or one of: {aliases}"
        )
    _refuse_code(checkpoint.folder)
    if not allow_pickle:
        _refuse_pickle(checkpoint.folder)
    return checkpoint


def _loaded(pipeline: Any) -> Checkpoint:
    from runtime.facts import repository_of

    pipeline_class = type(pipeline).__name__
    repository = repository_of(pipeline) or pipeline_class
    row = find_model(repository)
    return Checkpoint(
        folder=None,
        repository=repository,
        revision=None,
        slug=row.slug if row else slug_of(repository.rpartition("/")[2]),
        pipeline_class=pipeline_class,
        spec=class_defaults(pipeline_class),
        pipeline=pipeline,
    )


def pipeline_class_of(checkpoint: Checkpoint) -> type:
    """The pipeline's class, without its weights, so that a wrong option is refused before gigabytes are read."""
    import diffusers

    if checkpoint.pipeline is not None:
        return type(checkpoint.pipeline)
    found = getattr(diffusers, checkpoint.pipeline_class, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise InvalidCheckpoint(
            f"{checkpoint.repository}: diffusers {diffusers.__version__} has no pipeline {checkpoint.pipeline_class}; "
            "a newer diffusers may have it"
        )
    return found


def load_pipeline(
    checkpoint: Checkpoint,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    allow_pickle: bool = False,
    cpu_offload: bool = False,
):
    """The pipeline on its device, from safetensors and without code of the checkpoint."""
    import torch
    from diffusers import DiffusionPipeline

    device = pick_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # what is allocated without naming a device belongs there too
    quiet = _quiet if checkpoint.spec and checkpoint.spec.embedded else nullcontext
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                str(checkpoint.folder),
                dtype=getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                local_files_only=True,
                **_left_out(checkpoint.folder),
            )
        if cpu_offload:
            pipeline.enable_model_cpu_offload(device=device)
            return pipeline
        return pipeline.to(device)
    except torch.OutOfMemoryError as error:
        message = (
            f"{checkpoint.repository}: does not fit on {device} ({_line(error)}); try --cpu-offload"
        )
        raise InvalidOption(message) from None
    except (
        OSError,
        ValueError,
        AttributeError,
        ImportError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise InvalidCheckpoint(
            f"{checkpoint.repository}: diffusers cannot load it as {checkpoint.pipeline_class} "
            f"({type(error).__name__}: {_line(error)}); check that the folder is complete and diffusers new enough"
        ) from error


@contextmanager
def _quiet():
    """Load without bars and type hints: the embedded model takes a tokenizer where its class asks for a processor."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def pick_device(device: str = "auto") -> str:
    """``auto`` is this process's GPU (``LOCAL_RANK`` under torchrun) when there is one, else the CPU."""
    import torch

    if device != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise InvalidOption(f"--device {device}: expected auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidOption(f"--device {device}: torch sees no GPU here; use --device cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if (
        device.startswith("cuda:")
        and int(device.removeprefix("cuda:")) >= torch.cuda.device_count()
    ):
        raise InvalidOption(
            f"--device {device}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0"
        )
    return device


def weights_sha256(folder: Path) -> str:
    """One hash over names and contents of the denoisers' configuration and weights."""
    digest = hashlib.sha256()
    weights = {".json", ".safetensors", ".bin"}
    folders = (
        child for child in folder.iterdir() if re.match(r"transformer|denoiser|dit", child.name)
    )
    parts = sorted(path for child in folders for path in child.glob("*") if path.suffix in weights)
    for path in parts:
        with path.open("rb") as stream:
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _checkpoint(folder: Path, **fields: Any) -> Checkpoint:
    index = _model_index(folder)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UnsafeCheckpoint(
            f"{folder}: model_index.json names a pipeline from a Python file ({name!r}), which is never run; "
            "load it yourself and hand the pipeline to calibrate.record"
        )
    spec = fields.pop("spec") or class_defaults(name)
    return Checkpoint(folder=folder, pipeline_class=name, spec=spec, **fields)


def _model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(
            f"{folder}: no model_index.json in it; expected a checkpoint in diffusers' folder format, as written by "
            "pipeline.save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{path}: cannot be read ({_line(error)}); fetch the checkpoint again"
        ) from None
    if not isinstance(index, dict):
        raise InvalidCheckpoint(
            f"{path}: {type(index).__name__} found; expected an object naming the components"
        )
    return index


def _download(name: str, repository: str, allow_pickle: bool) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                repository, use_safetensors=None if allow_pickle else True, trust_remote_code=False
            )
        )
    except Exception as error:  # the hub client raises from four libraries; none of them is a programming error here
        raise ModelNotFound(
            f"{name}: tried the embedded models, a folder of that name, the local cache and the hub ({repository}): "
            f"{_line(error)}. Check the name and the connection, log in with `hf auth login` if it is gated, or give "
            "a local folder"
        ) from None


def _left_out(folder: Path) -> dict[str, None]:
    """Components that were saved as none (Stable Diffusion 3 without its T5), which diffusers wants to be told."""
    return {name: None for name, value in _model_index(folder).items() if value == [None, None]}


def _refuse_code(folder: Path) -> None:
    """Refuse a checkpoint whose configuration names anything but classes of diffusers and transformers."""
    from diffusers import pipelines

    for component, value in _model_index(folder).items():
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


def _line(error: BaseException) -> str:
    """An exception's text on one line, without the advice that libraries append."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."
