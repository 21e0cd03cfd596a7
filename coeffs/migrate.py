"""Reading entries of older schema numbers. Released files stay as they are; only what was read changes."""

from collections.abc import Callable
from typing import Any

from coeffs.entry.schema import SCHEMA
from coeffs.errors import EntryError


def _from_0(data: dict) -> dict:
    """Schema 0 held one polynomial for the whole model at the top level, without branches and experts."""
    moved = {"coefficients_high_to_low", "degree", "method", "domain", "counts", "figures"}
    fit = {key: value for key, value in data.items() if key in moved}
    rest = {key: value for key, value in data.items() if key not in moved}
    return {
        **rest,
        "schema": 1,
        "experts": {"transformer": {"recommended": "pooled", "branches": {"pooled": fit}}},
    }


MIGRATIONS: dict[int, Callable[[dict], dict]] = {0: _from_0}


def migrate(data: Any) -> Any:
    """Plain data of any known schema as plain data of the present one.

    Raises:
        EntryError: If the schema number is missing or not one of the known ones.
    """
    if not isinstance(data, dict):
        raise EntryError(
            "expected a mapping with the keys of an entry (schema, model, status, ...)"
        )
    number = data.get("schema")
    if number is None:
        raise EntryError(f"missing key schema: expected schema: {SCHEMA} as first line")
    while isinstance(number, int) and not isinstance(number, bool) and number in MIGRATIONS:
        data = MIGRATIONS[number](data)
        number = data["schema"]
    if number != SCHEMA or isinstance(number, bool):
        known = f"{min(MIGRATIONS)} to {SCHEMA}"
        raise EntryError(
            f"{str(number)[:40]}: this version reads schema {known}; upgrade the toolkit",
            ("schema",),
        )
    return data
