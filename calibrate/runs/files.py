"""Files of a run: written whole or not at all, and the Parquet form of the pairs."""

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from calibrate.errors import CorruptShard, RunFolderError, one_line
from calibrate.model.protocol import Settings
from coeffs.entry.signals import SIGNALS
from coeffs.files import put

MEASURED_COLUMNS = (
    *("timestep", "sigma", *(signal.column for signal in SIGNALS.values())),
    *("y_output", "y_hidden", "y_residual", "mag_ratio", "mag_ratio_std", "cos_distance"),
)
# Column -> its type in a file, in the order of the file.
PAIR_TYPES = {
    "prompt_id": "string",
    "seed": "int64",
    "branch": "string",
    "expert": "string",
    "step": "int32",
    "num_steps": "int32",
    **dict.fromkeys(MEASURED_COLUMNS, "float64"),
}
PAIR_COLUMNS = tuple(PAIR_TYPES)


def encode_pairs(rows: Sequence[Settings]) -> bytes:
    """Parquet bytes of pair rows, ordered by expert, branch and step: the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda row: (row["expert"], row["branch"], row["step"]))
    table = pa.Table.from_pylist(ordered, schema=pa.schema(list(PAIR_TYPES.items())))
    stream = BytesIO()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def read_pairs(path: Path):
    """The pyarrow table in a file of pairs; a truncated or damaged file raises `CorruptShard` naming it.

    A measured column that the version which wrote the file did not have yet is null (NaN in pandas); one that only
    another version has is kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
    except OSError as error:  # says nothing about the content: the file may be whole
        raise RunFolderError(
            f"{path}: cannot be read ({error.strerror}); check the rights to it and the disk"
        ) from None
    try:
        table = pq.ParquetFile(BytesIO(content), page_checksum_verification=True).read()
        absent = [name for name in PAIR_COLUMNS if name not in table.column_names]
        if set(absent) - set(MEASURED_COLUMNS):
            raise ValueError(f"it has no column {', '.join(absent)}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShard(
            f"{path}: not a readable file of pairs ({one_line(error)}); run the same "
            "`calibrate record` again, which sets it aside and records it anew"
        ) from None
    for name in absent:
        table = table.append_column(name, pa.nulls(len(table), pa.float64()))
    return table


def make_folder(path: Path) -> None:
    """Create a run folder, or say why that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be created ({error.strerror}); choose another folder with --out"
        ) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` under ``path`` so that after a crash or power loss the file is whole or absent, never a part."""
    try:
        put(path, data)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name itself, which a power loss could undo
        os.close(folder)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); nothing finished is lost: make room or choose another "
            "folder with --out, then run the same command again"
        ) from None


def write_json(path: Path, value: Settings) -> None:
    """Write a mapping atomically, with sorted keys."""
    write_atomically(path, f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode())


def write_arrays(path: Path, arrays: Settings) -> None:
    """Write named arrays atomically, as a compressed .npz file."""
    import numpy as np

    stream = BytesIO()
    np.savez_compressed(stream, **arrays)
    write_atomically(path, stream.getvalue())
