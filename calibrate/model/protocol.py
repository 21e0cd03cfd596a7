"""Settings in the form that the manifest holds, and a hash that is equal for equal content."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from calibrate.errors import InvalidOption


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
