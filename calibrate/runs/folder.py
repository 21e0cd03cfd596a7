"""The run folder: a manifest and one file of pairs per finished trajectory group, nothing of which is ever rewritten.

A group is one prompt with one seed, all its branches and experts. It is finished when its file of pairs exists and
can be read; everything else (what to record next, whether the run is complete) follows from that.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from calibrate.errors import CorruptShard, ProtocolMismatch, RunFolderError
from calibrate.model.prompts import Prompt, PromptSet

TEXT_COLUMNS = ("prompt_id", "branch", "expert")
INTEGER_COLUMNS = {"seed": "int64", "step": "int32", "num_steps": "int32"}
PAIR_COLUMNS = (
    *("prompt_id", "seed", "branch", "expert", "step", "num_steps", "timestep", "sigma", "x", "x_time_embedding"),
    *("y_output", "y_hidden", "y_residual", "mag_ratio", "mag_ratio_std", "cos_distance"),
)
_FOLDERS = ("pairs", "timing", "gram", "failures", "corrupt", "inputs", "report")
_FILES = ("run.yaml", "lock", "entry.yaml")
_GROUP_NAME = re.compile(r"[0-9]{5,}-[A-Za-z0-9_.-]{1,64}-[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with one seed: the unit that is recorded, claimed by a rank, and kept."""

    index: int
    prompt: Prompt

    @property
    def name(self) -> str:
        """The stem of the group's files; refuses what a manifest from elsewhere could smuggle into a path."""
        name = f"{self.index:05d}-{self.prompt.prompt_id}-{self.prompt.seed}"
        if not _GROUP_NAME.fullmatch(name):
            raise RunFolderError(f"{name!r}: not the name of a group; expected such as 00000-0123456789ab-0")
        return name


class RunFolder:
    """A run on disk. Reading needs `open`; recording goes through `create`, which also continues an existing run."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "RunFolder":
        """An existing run, with its manifest read and checked."""
        path = Path(path)
        _refuse_links(path)
        return cls(path, _read_manifest(path / "run.yaml"))

    @classmethod
    def create(
        cls, path: str | os.PathLike, identity: Mapping[str, Any], prompts: PromptSet, **notes: Any
    ) -> "RunFolder":
        """Start a run, or continue the one in ``path`` when identity and prompt set are the same.

        ``identity`` is what `calibrate.model.session.Session` has; ``notes`` (created, versions, device, command, ...) are
        written at the start and kept afterwards. The caller holds the folder's lock.
        """
        path = Path(path)
        rows = [prompt.as_dict() for prompt in prompts.prompts]
        if not (path / "run.yaml").exists():
            if any((path / "pairs").glob("*.parquet")):
                raise RunFolderError(
                    f"{path}: pairs but no run.yaml; put it back, or choose another folder with --out"
                )
            run = cls(path, {**identity, "prompts_sha256": prompts.sha256, "prompts": rows, **notes})
            for name in ("pairs", "timing"):  # before the manifest, whose writing makes them durable too
                (path / name).mkdir(parents=True, exist_ok=True)
            run._write_inputs(prompts)
            run._write_manifest()
            return run
        run = cls.open(path)
        run._refuse_other(identity, prompts)
        if len(rows) > len(run.manifest["prompts"]):
            run.manifest["prompts"] = rows
            run._write_inputs(prompts)
            run._write_manifest()
        return run

    @property
    def groups(self) -> list[Group]:
        """Every group that the run is to hold, in order."""
        return [Group(index=i, prompt=_prompt_of(row)) for i, row in enumerate(self.manifest["prompts"])]

    def finished(self) -> set[str]:
        """Names of the groups whose pairs are on disk, by name only (`tidy` looks inside)."""
        return {path.stem for path in (self.path / "pairs").glob("*.parquet")}

    def is_finished(self, group: Group) -> bool:
        return self.shard(group.name).exists()

    def shard(self, name: str) -> Path:
        """Where the pairs of the group of this name are."""
        return self.path / "pairs" / f"{name}.parquet"

    def write_group(
        self,
        group: Group,
        rows: Sequence[Mapping[str, Any]],
        timing: Mapping[str, Any],
        gram: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep a finished group. The pairs are written last: their file is what makes the group finished."""
        ids = {"prompt_id": group.prompt.prompt_id, "seed": group.prompt.seed}
        payload = encode_pairs([{**row, **ids} for row in rows])
        shard = self.shard(group.name)
        write_atomically(self.path / "timing" / f"{group.name}.json", _json_bytes(timing))
        if gram:
            write_atomically(self.path / "gram" / f"{group.name}.npz", _npz_bytes(gram))
        write_atomically(shard, payload)
        (self.path / "failures" / f"{group.name}.json").unlink(missing_ok=True)

    def write_failure(self, group: Group, kind: str, message: str, job: str) -> None:
        """Note that a group could not be recorded, by which job; the next start tries it again."""
        failure = {"prompt_id": group.prompt.prompt_id, "seed": group.prompt.seed, "kind": kind, "message": message}
        failure["job"] = job
        write_atomically(self.path / "failures" / f"{group.name}.json", _json_bytes(failure))

    def failures(self) -> dict[str, dict[str, Any]]:
        """Group name -> what went wrong, for groups that are not finished."""
        found = {}
        for path in sorted((self.path / "failures").glob("*.json")):
            if not self.shard(path.stem).exists():
                try:
                    found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError):
                    found[path.stem] = {"kind": "unreadable", "message": f"{path.name} cannot be read", "job": None}
        return found

    def failed_in(self, group: Group) -> str | None:
        """The job in which the group failed last, or None."""
        path = self.path / "failures" / f"{group.name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["job"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_complete(self) -> bool:
        """Whether every prompt of the manifest is recorded."""
        return not {group.name for group in self.groups} - self.finished()

    def input_path(self, name: str) -> Path:
        """The image of this name, which lies inside the run folder."""
        if Path(name).name != name or name.startswith("."):
            raise RunFolderError(
                f"{self.path}: run.yaml names the image {name!r}; expected the name of a file in inputs/"
            )
        return self.path / "inputs" / name

    @property
    def images(self) -> dict[str, Path]:
        """Name -> file of every image that the run's prompts name."""
        names = {name for group in self.groups for name in group.prompt.image}
        return {name: self.input_path(name) for name in names}

    def _write_manifest(self) -> None:
        import yaml

        text = yaml.safe_dump(self.manifest, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(self.path / "run.yaml", text.encode())

    def _write_inputs(self, prompts: PromptSet) -> None:
        for prompt in prompts.prompts:
            for name in prompt.image:
                if not self.input_path(name).exists():
                    write_atomically(self.input_path(name), prompts.images[name].read_bytes())

    def _refuse_other(self, identity: Mapping[str, Any], prompts: PromptSet) -> None:
        if self.manifest.get("protocol_sha256") != identity["protocol_sha256"]:
            raise ProtocolMismatch(
                f"{self.path}: holds another recording ({_difference(self.manifest, identity)}); recordings are never "
                "mixed: repeat the old settings to continue it, or choose another folder with --out"
            )
        if self.manifest.get("prompts_sha256") != prompts.sha256:
            raise ProtocolMismatch(
                f"{self.path}: holds a recording of other prompts or seeds; recordings are never mixed: repeat the "
                "old --prompts and --seed to continue it, or choose another folder with --out"
            )


def tidy(path: Path) -> list[str]:
    """Clean up after processes that were killed; nobody else may be in the folder.

    Removes half-written files, moves every unreadable file of pairs to ``corrupt/`` (never deletes it), and returns
    the names of the groups whose pairs were moved.
    """
    _refuse_links(path)
    for folder in ("", *_FOLDERS):
        for leftover in (path / folder).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    moved = []
    for shard in sorted((path / "pairs").glob("*.parquet")):
        try:
            read_pairs(shard)
        except CorruptShard:
            target = path / "corrupt"
            target.mkdir(exist_ok=True)
            number = sum(1 for _ in target.glob(f"{shard.stem}.*"))
            os.replace(shard, target / f"{shard.stem}.{number}.parquet")
            moved.append(shard.stem)
    return moved


def encode_pairs(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Parquet bytes of pair rows, ordered by expert, branch and step: the same rows always give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(rows, key=lambda row: (row["expert"], row["branch"], row["step"]))
    columns = {name: pa.array([row[name] for row in rows], type=_column_type(name)) for name in PAIR_COLUMNS}
    stream = BytesIO()
    pq.write_table(pa.table(columns), stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def read_pairs(path: Path):
    """The pyarrow table in a file of pairs; a truncated or damaged file raises `CorruptShard` naming it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShard(
            f"{path}: not a readable file of pairs ({' '.join(str(error).split())[:160]}); run the same "
            "`calibrate record` again, which sets it aside and records it anew"
        ) from None
    missing = [name for name in PAIR_COLUMNS if name not in table.column_names]
    if missing:
        raise CorruptShard(f"{path}: no column {', '.join(missing)}; expected a file written by `calibrate record`")
    return table


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` under ``path`` so that after a crash or power loss the file is whole or absent, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); nothing finished is lost: make room or choose another "
            "folder with --out, then run the same command again"
        ) from None


def _column_type(name: str):
    import pyarrow as pa

    return pa.string() if name in TEXT_COLUMNS else pa.type_for_alias(INTEGER_COLUMNS.get(name, "float64"))


def _npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    import numpy as np

    stream = BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    import yaml

    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{path.parent}: no run.yaml in it; expected a folder written by `calibrate record`"
        raise RunFolderError(message) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    rows = manifest.get("prompts") if isinstance(manifest, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "prompt_id" in row for row in rows):
        raise RunFolderError(f"{path}: no list of prompts in it; expected a manifest written by `calibrate record`")
    return manifest


def _prompt_of(row: Mapping[str, Any]) -> Prompt:
    image = row.get("image")
    return Prompt(
        prompt_id=str(row["prompt_id"]),
        prompt=row.get("prompt", ""),
        negative_prompt=row.get("negative_prompt"),
        image=(image,) if isinstance(image, str) else tuple(image or ()),
        seed=row.get("seed", 0),
    )


def _refuse_links(path: Path) -> None:
    """A run folder from elsewhere must not lead what we write out of it."""
    for name in (*_FOLDERS, *_FILES):
        if (path / name).is_symlink():
            raise RunFolderError(f"{path / name}: a link inside a run folder, which could lead outside it; remove it")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first few settings that differ, as ``name old -> new``."""
    old, new = dict(_flat(old)), dict(_flat(new))
    names = [name for name in new if name != "protocol_sha256" and old.get(name) != new[name] and name != "run_id"]
    return "; ".join(f"{name} {old.get(name)!r} -> {new[name]!r}" for name in names[:4]) or "another identity"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
