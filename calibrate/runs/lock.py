"""Locks on a run folder: one job records into it, and each group of it is recorded by one process.

All are byte ranges of one file: byte 0 belongs to the job, byte 1 + i to group i. The kernel frees the ranges of a
process that ends in any way, SIGKILL and power loss included, so no lock is ever stale and no clock is compared. A
file system without locks costs at most work done twice: shards are written atomically and are the same whoever
writes them.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from calibrate.errors import RunFolderError, RunInUse
from calibrate.runs.files import make_folder

try:
    import fcntl
except ImportError:  # Windows: one process at a time is then up to the user
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_JOB_BYTE = 0
held: list[Path] = []  # folders of this process, whose own locks never conflict with each other
_PATIENCE = 120.0  # seconds to wait for the first process of a job to write down whose it is and to clean up


def job_name() -> str:
    """Equal for the ranks of one torchrun or accelerate launch, restarts included; unique otherwise."""
    environment = os.environ
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
        address = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
        return address if run_id == "none" else run_id
    return f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"


def hold(folder: str | os.PathLike, work: str) -> "RunLock":
    """The lock of a run for a command that works on it: ``with hold(run, "verifying"):``."""
    path = Path(folder)
    make_folder(path)
    return RunLock(path / "lock", job_name(), work=work)


class RunLock:
    """Holds a run folder for one job; a context manager.

    Args:
        path: The lock file.
        job: Processes of the same job share the lock, see :func:`job_name`.
        prepare: Called when no other process holds the folder, and before any other can.
        work: What the holder does with the run, for the message to others.
    """

    def __init__(
        self,
        path: Path,
        job: str,
        prepare: Callable[[], object] = lambda: None,
        work: str = "recording into",
    ):
        self.path, self.job, self.prepare, self.work = path, job, prepare, work
        self.supported = fcntl is not None
        self._file = -1

    def __enter__(self) -> "RunLock":
        folder = self.path.parent
        if folder.resolve() in {other.resolve() for other in held}:
            raise RunInUse(
                f"{folder}: this process is recording into this run already, or using it"
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.open(self.path, flags, 0o644)
            self._join()
        except BaseException as error:
            if self._file >= 0:
                os.close(self._file)
            if isinstance(error, OSError):
                message = f"{error.filename or self.path}: cannot be written ({error.strerror}); choose another folder"
                raise RunFolderError(f"{message} with --out") from None
            raise
        held.append(folder)
        return self

    def __exit__(self, *exc_info: object) -> None:
        held.remove(self.path.parent)
        os.close(self._file)

    def claim(self, index: int) -> bool:
        """Take group ``index`` unless another process has it."""
        return self._lock(fcntl.LOCK_EX, index + 1) if self.supported else True

    def release(self, index: int) -> None:
        """Give group ``index`` back."""
        if self.supported:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index + 1)

    def _join(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self.supported:
            if self._lock(fcntl.LOCK_EX, _JOB_BYTE):
                if not self.supported:
                    logger.warning(
                        "%s: no file locks here; see to it that only one job uses the run",
                        self.path.parent,
                    )
                    return
                self._write_holder()
                self.prepare()
                self._lock(fcntl.LOCK_SH, _JOB_BYTE)
                return
            holder = self._holder() if self._lock(fcntl.LOCK_SH, _JOB_BYTE) else None
            if holder is not None and holder.get("job") == self.job:
                return
            if holder is not None or time.monotonic() > deadline:
                known = {"pid": "?", "host": "?", "work": "recording into", **(holder or {})}
                raise RunInUse(
                    f"{self.path.parent}: process {known['pid']} on {known['host']} is {known['work']} this run; wait "
                    "for it, stop it (the lock goes with its process), or choose another folder with --out"
                )
            time.sleep(0.05)

    def _lock(self, kind: int, start: int) -> bool:
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, start)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no locks on this file system
            self.supported = False
        return True

    def _write_holder(self) -> None:
        holder = {
            "job": self.job,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "work": self.work,
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(holder).encode(), 0)

    def _holder(self) -> dict:
        # Through our own descriptor: closing a second one would drop every lock of this process on the file.
        try:
            return json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}
