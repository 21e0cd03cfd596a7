"""What the solver saw of an uncached generation, kept in the run folder for planning.

``trajectories/<hash>/<group>.npy`` holds the latents before each step and after the last (float32), ``<group>.npz``
the inner products of the predictions and what each step made of them. Predictions are those that ``scheduler.step``
receives: after guidance and whatever the pipeline makes of it.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import CorruptShard, one_line
from calibrate.model.protocol import Settings, canonical_sha256, plain
from calibrate.runs.files import write_arrays, write_atomically

Array = NDArray[np.float64]
FORMAT = "what each step of the solver does"  # part of the folder's name: other formats are not read
# What reading a truncated or overwritten .npy or .npz raises.
DAMAGED = (OSError, EOFError, ValueError, TypeError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class Trajectory:
    """One uncached generation.

    Attributes:
        latents: Shape (T + 1, ...), float32; read from the file where they are used.
        gram: Inner products of the predictions, shape (T, T).
        solver: What each step multiplies the latents and the prediction with, shape (2, T); exact for Euler's method
            and DDIM, the part that the present prediction explains for multistep solvers.
        sigmas: Noise levels, shape (T + 1,); NaN where the scheduler tells none.
        experts: Name of the denoiser that ran at each step.
    """

    latents: NDArray[np.float32]
    gram: Array
    solver: Array
    sigmas: Array
    experts: NDArray[np.str_]

    @property
    def num_steps(self) -> int:
        return len(self.gram)

    @property
    def walls(self) -> tuple[int, ...]:
        """Steps at which another denoiser takes over, and 0."""
        changes = np.flatnonzero(self.experts[1:] != self.experts[:-1])
        return (0, *(changes + 1).tolist())

    def write(self, file: Path) -> None:
        """Keep it as ``file``, an .npz, and the latents beside it."""
        latents = io.BytesIO()
        np.save(latents, self.latents)
        write_atomically(file.with_suffix(".npy"), latents.getvalue())
        others = {name: value for name, value in vars(self).items() if name != "latents"}
        write_arrays(file, others)  # last: this file says that both are there

    @staticmethod
    def is_kept(file: Path) -> bool:
        """Whether both files are there."""
        return file.exists() and file.with_suffix(".npy").exists()

    @classmethod
    def read(cls, file: Path) -> Trajectory:
        """What :meth:`write` kept.

        Raises:
            CorruptShard: One of the files is damaged.
        """
        try:
            # Opened here, as numpy leaves a damaged file open.
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                return cls(np.load(file.with_suffix(".npy"), mmap_mode="c"), **arrays)
        except DAMAGED as error:
            raise CorruptShard(
                f"{file}: it or the .npy beside it is damaged ({one_line(error)}); delete it, and planning makes "
                "both anew"
            ) from None


def trajectory_folder(run: Path, identity: Settings, arguments: Settings) -> Path:
    """Where a run keeps trajectories, by what they depend on.

    Args:
        identity: Weights, and :attr:`calibrate.model.session.Session.deployed`.
        arguments: Those of every generation.
    """
    texts = {name: str(value) for name, value in plain(arguments).items()}
    key = canonical_sha256([FORMAT, identity, texts])[:12]
    return run / "trajectories" / key
