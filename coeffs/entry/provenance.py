"""The records of an entry that say where its numbers come from."""

from dataclasses import dataclass, field

from coeffs.entry.fields import (
    Count,
    Name,
    Number,
    Pixels,
    Record,
    Scalar,
    Sha256,
    Steps,
    Text,
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """Which weights: hub repository or folder name, revision, and the SHA-256 of the weights where known."""

    repository: Text = None
    revision: Text = None
    sha256: Sha256 | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol(Record):
    """How images were generated while measuring; ``None`` means not stated by the source."""

    scheduler: Text = None
    num_steps: Steps | None = None
    shift: float | str | None = None
    guidance_scale: Number = None
    height: Pixels = None
    width: Pixels = None
    num_frames: Pixels = None
    dtype: Text = None
    quantization: Text = None
    lora: Text = None
    call_arguments: dict[Name, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Counts(Record):
    """What the fit saw."""

    prompts: Count | None = None
    trajectories: Count | None = None
    pairs: Count | None = None
    excluded_non_finite: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """Where the numbers come from; free of machine paths."""

    run_id: Text = None
    log_sha256: Sha256 | None = None
    toolkit: Text = None
    torch: Text = None
    diffusers: Text = None
    device: Text = None
    command: Text = None
    created: Text = None
    url: Text = None
    reference: Text = None
