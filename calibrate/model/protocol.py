"""The protocol of a recording: everything that a coefficient depends on besides the weights and the prompt."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from calibrate.errors import InvalidOption


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the denoiser was driven; None where the pipeline has no such setting."""

    scheduler: str | None = None
    num_steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    lora: str | None = None
    call_arguments: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The protocol in the form that the manifest and the registry entry hold."""
        return asdict(self)


def canonical_sha256(value: Any) -> str:
    """SHA-256 over JSON with sorted keys and no spaces, so that equal content has equal hashes everywhere."""
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise InvalidOption(
            f"a setting that cannot be written down: {error}; expected numbers, text, lists and mappings"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """The value with only what YAML and JSON both write: tuples as lists, anything foreign as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):  # subclasses too: NumPy's numbers are no YAML
        if isinstance(value, kind):
            return kind(value)
    return str(value)
