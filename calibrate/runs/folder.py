"""The run folder: a manifest and one file of pairs per finished group, none of which is ever rewritten.

A group is one prompt with one seed, all its branches and experts. It is finished when its file of pairs exists and
can be read; everything else (what to record next, whether the run is complete) follows from that.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import CorruptShard, ProtocolMismatch, RunFolderError, one_line
from calibrate.model.prompts import Prompt, PromptSet
from calibrate.model.protocol import AnyPath, Settings
from calibrate.runs.files import (
    encode_pairs,
    read_pairs,
    write_arrays,
    write_atomically,
    write_json,
)
from calibrate.text import did_you_mean, siblings

# Of the whole folder, written as `format` into run.yaml; runs from before that line existed have the same format.
# A new column needs no new format: where an older run lacks it, it reads as NaN.
FORMAT = 1
_WRITTEN = (
    *("pairs", "timing", "gram", "failures", "corrupt", "inputs", "report"),
    "trajectories",
    *("run.yaml", "lock", "entry.yaml"),
)
_GROUP_NAME = re.compile(r"[0-9]{5,}-[A-Za-z0-9_.-]{1,64}-[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with one seed: the unit that is recorded, claimed by a rank, and kept."""

    index: int
    prompt: Prompt

    @property
    def ids(self) -> Settings:
        """Whose generation it is."""
        return {"prompt_id": self.prompt.prompt_id, "seed": self.prompt.seed}

    @property
    def name(self) -> str:
        """The stem of the group's files; refuses what a manifest from elsewhere could smuggle into a path."""
        name = f"{self.index:05d}-{self.prompt.prompt_id}-{self.prompt.seed}"
        if not _GROUP_NAME.fullmatch(name):
            raise RunFolderError(
                f"{name!r}: not the name of a group; expected such as 00000-0123456789ab-0"
            )
        return name


class RunFolder:
    """A run on disk. Reading needs `open`; recording uses `create`, which also continues a run."""

    def __init__(self, path: Path, manifest: Settings):
        self.path = path
        self.manifest = manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: AnyPath) -> "RunFolder":
        """An existing run, with its manifest read and checked."""
        path = Path(path)
        _refuse_links(path)
        return cls(path, _read_manifest(path / "run.yaml"))

    @classmethod
    def create(
        cls,
        path: AnyPath,
        identity: Settings,
        prompts: PromptSet,
        **notes: Any,
    ) -> "RunFolder":
        """Start a run, or continue the one in ``path`` when identity and prompt set are the same.

        ``identity`` is that of `calibrate.model.session.Session`; ``notes`` (created, versions, device, command, ...)
        are written at the start and kept afterwards. The caller holds the folder's lock.
        """
        path = Path(path)
        rows = [prompt.as_dict() for prompt in prompts.prompts]
        if (path / "run.yaml").exists():
            run = cls.open(path)
            run._refuse_other(identity, prompts)
            if len(rows) <= len(run.manifest["prompts"]):
                return run
            run.manifest["prompts"] = rows
        else:
            if any((path / "pairs").glob("*.parquet")):
                raise RunFolderError(
                    f"{path}: pairs but no run.yaml; put it back, or choose another folder with --out"
                )
            content = {"prompts_sha256": prompts.sha256, "prompts": rows, **notes}
            run = cls(path, {"format": FORMAT, **identity, **content})
            # Before the manifest, whose writing syncs them too.
            for name in ("pairs", "timing"):
                (path / name).mkdir(parents=True, exist_ok=True)
        run._write(prompts)
        return run

    @property
    def groups(self) -> list[Group]:
        """Every group that the run is to hold, in order."""
        return [
            Group(index=i, prompt=Prompt.from_dict(row))
            for i, row in enumerate(self.manifest["prompts"])
        ]

    def finished(self) -> set[str]:
        """Names of the groups whose pairs are on disk, by name only (`tidy` looks inside)."""
        return {path.stem for path in self.path.glob("pairs/*.parquet")}

    def with_gram(self) -> set[str]:
        """Names of the groups whose Gram matrices are on disk."""
        return {path.stem for path in self.path.glob("gram/*.npz")}

    def missing(self) -> set[str]:
        """Names of the groups that are still to be recorded."""
        return {group.name for group in self.groups} - self.finished()

    @property
    def is_complete(self) -> bool:
        """Whether every prompt of the manifest is recorded."""
        return not self.missing()

    def shard(self, name: str) -> Path:
        """Where the pairs of the group of this name are."""
        return self.path / "pairs" / f"{name}.parquet"

    def write_group(
        self,
        group: Group,
        rows: Sequence[Settings],
        timing: Settings,
        gram: Settings | None = None,
    ) -> None:
        """Keep a finished group. The pairs are written last: their file is what makes the group finished."""
        name = group.name
        payload = encode_pairs([row | group.ids for row in rows])
        if gram:
            write_arrays(self.path / "gram" / f"{name}.npz", gram)
        if not self.shard(name).exists():  # else recorded again for its Gram matrices alone
            write_json(self.path / "timing" / f"{name}.json", timing)
            write_atomically(self.shard(name), payload)
        self._failure_path(name).unlink(missing_ok=True)

    def write_failure(self, group: Group, kind: str, message: str, job: str) -> None:
        """Note that a group could not be recorded, by which job; the next start tries it again."""
        about = {"kind": kind, "message": message, "job": job}
        write_json(self._failure_path(group.name), group.ids | about)

    def failures(self) -> dict[str, Settings]:
        """Group name -> what went wrong, for groups that are not finished."""
        names = {path.stem for path in self.path.glob("failures/*.json")}
        return {name: self._failure(name) for name in sorted(names - self.finished())}

    def failed_in(self, group: Group) -> str | None:
        """The job in which the group failed last, or None."""
        return self._failure(group.name).get("job")

    def _failure_path(self, name: str) -> Path:
        return self.path / "failures" / f"{name}.json"

    def _failure(self, name: str) -> Settings:
        path = self._failure_path(name)
        with suppress(OSError, ValueError, TypeError):
            return {"kind": "unreadable", **json.loads(path.read_bytes())}
        return {"kind": "unreadable"} if path.exists() else {}

    @property
    def images(self) -> dict[str, Path]:
        """Name -> file of every image that the run's prompts name."""
        return {
            name: self.input_path(name)
            for group in self.groups
            for name in group.prompt.image
        }

    def input_path(self, name: str) -> Path:
        """The image of this name, which lies inside the run folder."""
        if Path(name).name != name or name.startswith("."):
            raise RunFolderError(
                f"{self.path}: run.yaml names the image {name!r}; expected the name of a file in inputs/"
            )
        return self.path / "inputs" / name

    def _write(self, prompts: PromptSet) -> None:
        import yaml

        for name, target in self.images.items():
            if not target.exists():
                write_atomically(target, prompts.images[name].read_bytes())
        text = yaml.safe_dump(self.manifest, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(self.path / "run.yaml", text.encode())

    def _refuse_other(self, identity: Settings, prompts: PromptSet) -> None:
        if self.manifest.get("protocol_sha256") != identity["protocol_sha256"]:
            other = f"another recording ({differences(self.manifest, identity)})"
        elif self.manifest.get("prompts_sha256") != prompts.sha256:
            other = "a recording of other prompts or seeds"
        else:
            return
        raise ProtocolMismatch(
            f"{self.path}: holds {other}; recordings are never mixed: repeat its settings, --prompts and --seed to "
            "continue it, or choose another folder with --out"
        )


def tidy(path: Path) -> list[str]:
    """Clean up after processes that were killed; nobody else may be in the folder.

    Removes half-written files, moves every damaged file of pairs to ``corrupt/`` (never deletes it), and returns the
    names of the groups whose pairs were moved. A run of a newer format is refused untouched.
    """
    if (path / "run.yaml").exists():
        RunFolder.open(path)
    _refuse_links(path)
    for depth in ("", "*/", "*/*/"):
        for leftover in path.glob(f"{depth}.*.????*.tmp"):
            leftover.unlink(missing_ok=True)
    moved = []
    for shard in sorted(path.glob("pairs/*.parquet")):
        try:
            read_pairs(shard)
        except CorruptShard:
            target = path / "corrupt"
            target.mkdir(exist_ok=True)
            number = len(list(target.glob(f"{shard.stem}.*")))
            shard.rename(target / f"{shard.stem}.{number}.parquet")
            moved.append(shard.stem)
    return moved


def _read_manifest(path: Path) -> Settings:
    import yaml

    try:
        manifest = yaml.safe_load(path.read_bytes())
        number = manifest.get("format", FORMAT)
        newer = number > FORMAT
        if not newer and not all("prompt_id" in row for row in manifest["prompts"]):
            raise ValueError("a prompt without an id")
    except FileNotFoundError:
        folder = path.parent
        hint = "" if folder.exists() else did_you_mean(str(folder), siblings(folder))
        raise RunFolderError(
            f"{folder}: no run.yaml in it; {hint or 'expected a folder written by `calibrate record`'}"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error.strerror}); check the rights to it"
        ) from None
    except (ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"{path}: not a manifest ({one_line(error)}); put the original back"
        ) from None
    if newer:
        raise RunFolderError(
            f"{path}: format {number!r}, and this version of teacal reads up to {FORMAT}; update teacal, or choose "
            "another folder with --out. Nothing was changed"
        )
    return manifest


def _refuse_links(path: Path) -> None:
    """A run folder from elsewhere must not lead what we write out of it."""
    for name in _WRITTEN:
        if (path / name).is_symlink():
            raise RunFolderError(
                f"{path / name}: a link inside a run folder, which could lead outside it; remove it"
            )


def differences(old: Settings, new: Settings) -> str:
    """The first few settings that differ, as ``name old -> new``."""
    import pandas as pd

    before, after = (pd.json_normalize(each).to_dict("records")[0] for each in (old, new))
    differing = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in after.items()
        if before.get(name) != value and name not in ("protocol_sha256", "run_id")
    ]
    return "; ".join(differing[:4]) or "another identity"
