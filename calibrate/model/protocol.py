"""Settings in the form that the manifest holds, and a hash that is equal for equal content."""

import hashlib
import json
import os
from typing import Any

from calibrate.errors import InvalidOption

AnyPath = str | os.PathLike
Settings = dict[str, Any]  # by name


def plain(value: Any) -> Any:
    """The value with only what YAML and JSON both write: tuples as lists, anything foreign as its text."""
    return json.loads(json.dumps(value, default=str))


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
