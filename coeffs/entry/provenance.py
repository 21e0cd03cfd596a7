"""The records of an entry that say where its numbers come from."""

from dataclasses import dataclass, field

from coeffs.entry.fields import Count, Name, Pixels, Record, Scalar, Sha256, Steps


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """Which weights: hub repository or folder name, revision, and the SHA-256 of the weights where known."""

    repository: str | None = None
    revision: str | None = None
    sha256: Sha256 | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol(Record):
    """How images were generated while measuring; ``None`` means not stated by the source."""

    scheduler: str | None = None
    num_steps: Steps | None = None
    shift: float | str | None = None
    guidance_scale: float | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    num_frames: Pixels | None = None
    dtype: str | None = None
    quantization: str | None = None
    lora: str | None = None
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

    run_id: str | None = None
    log_sha256: Sha256 | None = None
    toolkit: str | None = None
    torch: str | None = None
    diffusers: str | None = None
    device: str | None = None
    command: str | None = None
    created: str | None = None
    url: str | None = None
    reference: str | None = None
