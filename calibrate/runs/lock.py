"""Locks on a run folder: one job records into it, and each group of it is recorded by one process.

All are byte ranges of one file: byte 0 belongs to the job, byte 1 + i to group i. The kernel frees the ranges of a
process that ends in any way, SIGKILL and power loss included, so no lock is ever stale and no clock is compared. A
file system without locks costs at most work done twice: shards are written atomically and are the same whoever
writes them.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import coeffs
from calibrate.errors import RunFolderError, RunInUse
from calibrate.model.protocol import AnyPath, Settings
from calibrate.runs.files import make_folder
from coeffs import Entry

logger = logging.getLogger(__name__)

Source = AnyPath | Entry
P = ParamSpec("P")
R = TypeVar("R")

# Of this process, whose own locks never conflict with each other.
held: dict[Path, "RunLock"] = {}
_EXCLUSIVE, _SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
_JOB_BYTE = 0
_PATIENCE = 120.0  # seconds to wait for the first process of a job to write down whose it is and to clean up


@contextmanager
def hold(
    folder: AnyPath,
    work: str = "recording into",
    prepare: Callable[[], object] = lambda: None,
) -> Iterator["RunLock"]:
    """Hold a run folder for this job: ``with hold(run, "verifying"):``.

    Args:
        work: What the holder does with the run, for the message to others.
        prepare: Called when no other process holds the folder, and before any other can.
    """
    folder = Path(folder)
    make_folder(folder)
    if folder.resolve() in {other.resolve() for other in held}:
        raise RunInUse(
            f"{folder}: this process is recording into this run already, or using it"
        )
    with ExitStack() as stack:
        try:
            file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            stack.callback(os.close, file)
            lock = RunLock(folder, file, work)
            lock.join(prepare)
        except OSError as error:
            raise RunFolderError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); choose another folder with --out"
            ) from None
        held[folder] = lock
        stack.callback(held.pop, folder)
        yield lock


def _job_name() -> str:
    """Equal for the ranks of one torchrun or accelerate launch, restarts included; unique otherwise."""
    get = os.environ.get
    if int(get("WORLD_SIZE", 1)) > 1:
        run_id = get("TORCHELASTIC_RUN_ID", "none")
        return f"{get('MASTER_ADDR')}:{get('MASTER_PORT')}" if run_id == "none" else run_id
    return f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"


class RunLock:
    """The locks of this process in a run folder."""

    def __init__(self, folder: Path, file: int, work: str) -> None:
        self.folder, self._file, self.work = folder, file, work
        self.job = _job_name()
        self.supported = True

    def claim(self, index: int) -> bool:
        """Take group ``index`` unless another process has it."""
        return self._lock(_EXCLUSIVE, index + 1)

    def release(self, index: int) -> None:
        """Give group ``index`` back."""
        self._lock(fcntl.LOCK_UN, index + 1)

    def join(self, prepare: Callable[[], object]) -> None:
        """Take the folder alone, or beside other processes of the same job."""
        deadline = time.monotonic() + _PATIENCE
        while not self._lock(_EXCLUSIVE, _JOB_BYTE):
            holder = self._holder() if self._lock(_SHARED, _JOB_BYTE) else {}
            if holder.get("job") == self.job:
                return
            if holder or time.monotonic() > deadline:
                known = {"pid": "?", "host": "?", "work": "recording into"} | holder
                raise RunInUse(
                    f"{self.folder}: process {known['pid']} on {known['host']} is {known['work']} this run; wait for "
                    "it, stop it (the lock goes with its process), or choose another folder with --out"
                )
            time.sleep(0.05)
        if not self.supported:
            logger.warning(
                "%s: no file locks here; see to it that only one job uses the run",
                self.folder,
            )
            return
        holder = {"job": self.job, "pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({**holder, "work": self.work}).encode(), 0)
        prepare()
        self._lock(_SHARED, _JOB_BYTE)

    def _lock(self, kind: int, start: int) -> bool:
        try:
            fcntl.lockf(self._file, kind, 1, start)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no locks on this file system
            self.supported = False
        return True

    def _holder(self) -> Settings:
        # Through our own descriptor: closing a second one would drop every lock of this process on the file.
        try:
            return json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}


def folder_of(source: Source, registry: str | Path | None, out: AnyPath | None) -> Path:
    """Where the work on a run, or on an entry without one, goes."""
    if not isinstance(source, Entry):
        if (Path(source) / "run.yaml").exists():
            return Path(source)
        source = coeffs.load(os.fspath(source), registry)
    return Path(out or f"runs/verify-{source.label.replace('/', '-')}")


def rank() -> int:
    """This process's number under torchrun or accelerate, else 0."""
    return int(os.environ.get("RANK", 0))


def alone(work: str, shared: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates what runs a model for a run or an entry: no other process works in its folder meanwhile.

    ``shared`` work is for all ranks of a launch, other work for rank 0 alone.
    With ``runs=False`` nothing is run and nothing written, also where nothing can be.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def holding(*args: P.args, **options: P.kwargs) -> R:
            given: Settings = {"registry": None, "out": None, "runs": True, **options}
            source: Any = args[0] if args else given["source"]
            if not given["runs"]:
                return function(*args, **options)
            if not shared and rank() != 0:
                raise RunInUse(f"{work} a run is done by one process: call it on rank 0 only")
            with hold(folder_of(source, given["registry"], given["out"]), work):
                return function(*args, **options)

        return holding

    return decorate
