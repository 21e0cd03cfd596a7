"""Weights by their content: a checkpoint that was calibrated before is known under any path and name."""

import hashlib
import re
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import coeffs
from calibrate.model.call import recorded_arguments
from calibrate.model.protocol import Settings
from calibrate.model.table import EMBEDDED_MODEL, ModelSpec
from coeffs import Entry
from coeffs.errors import CoeffsError

# What an entry's protocol and a row of the table both say.
PROTOCOL = ("num_steps", "guidance_scale", "height", "width", "num_frames")


def weights_sha256(folder: Path) -> str:
    """One hash over names and contents of the denoisers' configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        denoiser = re.match(r"transformer|denoiser|dit", path.parent.name)
        if denoiser and path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(_file_digest(path, path.stat().st_mtime_ns))
    return digest.hexdigest()


@cache  # tens of gigabytes, asked for more than once
def _file_digest(path: Path, changed: int) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def calibrated(folder: Path, pipeline_class: str) -> Entry | None:
    """The entry of the registry, or of a run in ``runs/``, that was made with these weights under whatever name."""
    entries: list[Entry] = []
    drafts = Path("runs").glob("*/entry.yaml")
    for file in sorted(drafts, key=lambda file: file.stat().st_mtime):
        with suppress(CoeffsError):
            entries.append(coeffs.load(file))
    with suppress(CoeffsError):  # a registry that is not there is no reason not to record
        entries += coeffs.entries()
    # The last one counts: what was released, else the newest run. Other weights of the class are not read for nothing:
    # the embedded model's are known by their configuration.
    hashed = {
        entry.checkpoint.sha256: entry
        for entry in entries
        if entry.pipeline_class == pipeline_class
        and entry.checkpoint.sha256
        and entry.model != EMBEDDED_MODEL
    }
    return hashed.get(weights_sha256(folder)) if hashed else None


def as_recorded(entry: Entry, spec: ModelSpec | None) -> ModelSpec:
    """What the class needs, with the protocol that the entry was recorded at."""
    spec = spec or ModelSpec(alias=entry.model, pipeline_class=entry.pipeline_class or "")
    protocol: Settings = {name: getattr(entry.protocol, name) for name in PROTOCOL}
    arguments = {**spec.call_arguments, **recorded_arguments(vars(entry.protocol))}
    return replace(spec, **protocol, call_arguments=arguments)
