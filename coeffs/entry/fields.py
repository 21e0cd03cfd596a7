"""Dataclasses whose annotations are the format: they check values and decide what is written."""

import functools
import numbers
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from coeffs.entry.strict_yaml import Plain, number_hint
from coeffs.errors import EntryError, did_you_mean

# No calibration has larger numbers; powers of such coefficients still fit a float.
MAX_NUMBER = 1e30
MAX_TEXT = 8000
# Bounds refuse slips such as a width in the place of a step count; no real model comes near them.
MAX_STEPS = 10_000

# Written even where they hold their default: a reader of the file needs them.
_ALWAYS_WRITTEN = ("schema", "version", "sign_rule")


@dataclass(frozen=True)
class Limits:
    """Bounds of a number (both included), used inside ``Annotated``."""

    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER


@dataclass(frozen=True)
class Pattern:
    """A regular expression that the whole text must match, and its words for errors."""

    regex: str
    words: str


_SEGMENT = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_SLUG = Pattern(
    f"{_SEGMENT}(?:/{_SEGMENT})?", "a name such as longcat-image or vllm-omni/longcat-image"
)
Slug = Annotated[str, _SLUG]
Name = Annotated[
    str, Pattern(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}", "a name of letters, digits and _.-")
]
Sha256 = Annotated[str, Pattern(r"[0-9a-f]{64}", "64 hexadecimal digits")]
Schedule = Annotated[
    str, Pattern(r"[CS]{1,10000}", "letters C (compute) and S (skip), one per step")
]
Count = Annotated[int, Limits(0, 10**12)]
Steps = Annotated[int, Limits(1, MAX_STEPS)]
Positive = Annotated[float, Limits(0)]
Scalar = str | int | float | bool | None
# What a source may leave open: the field's default is then None, "not stated".
Text = str | None
Number = float | None
Edge = int | float | None
Pixels = Annotated[int, Limits(1, 10**6)] | None
Figures = dict[Name, Number] | None
Numbers = tuple[float, ...]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """Base of the dataclasses: checks and normalises every field (lists become tuples)."""

    def __post_init__(self) -> None:
        given = (
            (field.name, field.type, getattr(self, field.name))
            for field in fields(self)
            if field.default is not None or getattr(self, field.name) is not None
        )
        for name, value in _each(given):
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        """Rules that span several fields."""


def plain(value: Any) -> Any:
    """Records as plain dicts, lists and scalars; fields that hold their default are left out."""
    if isinstance(value, Record):
        record: Any = type(value)
        defaults = _defaults(record)
        return {
            name: plain(item)
            for name, item in vars(value).items()
            if item != defaults[name] or name in _ALWAYS_WRITTEN
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def stated(values: Plain) -> Plain:
    """Without what is None."""
    return {name: value for name, value in values.items() if value is not None}


@functools.cache
def _defaults(cls: Any) -> Plain:
    """Every field with its default, ``MISSING`` where it has none; for comparison only."""
    return {
        field.name: field.default
        if field.default_factory is MISSING
        else field.default_factory()
        for field in fields(cls)
    }


# --- values checked against annotations -----------------------------------------------------------


def checked(annotation: Any, value: Any) -> Any:
    """The value of a field with this annotation, normalised.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or
            out of range.
    """
    if annotation in _SCALARS:
        return _scalar(annotation, value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _within(arguments[1], checked(arguments[0], value))
    if origin is Literal:
        return value if value in arguments else _refuse(value, ", ".join(arguments))
    if origin in (Union, types.UnionType):
        return _union(arguments, value)
    if origin is tuple:
        return _tuple(arguments, value)
    if type(value) is annotation:
        return value
    if not isinstance(value, dict):
        known = [] if origin is dict else list(_defaults(annotation))[:4]
        _refuse(value, f"a mapping of {', '.join(known)}, ..." if known else "a mapping")
    if origin is not dict:
        return _record(annotation, value)
    items = _each((str(key), arguments[1], item) for key, item in value.items())
    return {checked(arguments[0], key): item for key, item in items}


def _each(items: Iterable[tuple[str | int, Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Key and checked value of ``(key, annotation, value)``; an error names the key."""
    for key, annotation, value in items:
        try:
            yield key, checked(annotation, value)
        except EntryError as error:
            raise EntryError(error.problem, key, *error.path) from None


def _record(cls: Any, given: Plain) -> Any:
    """The record of a mapping; ``null`` stands for a key that is not there."""
    defaults = _defaults(cls)
    for key in given:
        if key not in defaults:
            raise EntryError(f"unknown key: {_advice(str(key), defaults)}", str(key))
    values = stated(given)
    for name, default in defaults.items():
        if default is MISSING and name not in values:
            raise EntryError(f"missing key {name}")
    return cls(**values)


def _advice(key: str, known: Iterable[str]) -> str:
    if "coefficients" in key:
        return "write coefficients_high_to_low, highest power first (numpy.polyfit's order)"
    return did_you_mean(key, known, most=1) or f"expected one of {', '.join(known)}"


def _within(limits: Limits | Pattern, value: Any) -> Any:
    if isinstance(limits, Pattern):
        if not re.fullmatch(limits.regex, value):
            _refuse(value, limits.words)
    elif not limits.low <= value <= limits.high:
        _refuse(value, f"{limits.low:g} to {limits.high:g}")
    return value


def _union(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if len(kinds) == 1:
        return checked(kinds[0], value)
    # Several kinds are scalars only; a whole number stays one where both it and a number may stand.
    for kind in (bool, int, float, str):
        if kind in kinds and _is(kind, value):
            return _scalar(kind, value)
    _refuse(value, " or ".join(_SCALARS[kind][1] for kind in kinds))


def _tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if not isinstance(value, list | tuple):
        _refuse(value, "a list")
    items = _each((place, kinds[0], item) for place, item in enumerate(value))
    values = tuple(item for _, item in items)
    if Ellipsis not in kinds and len(values) != len(kinds):
        raise EntryError(f"{len(values)} values: expected {len(kinds)}")
    return values


_SCALARS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
}


def _is(kind: Any, value: Any) -> bool:
    """Whether a file's value is of the kind: True is an int to Python only."""
    return isinstance(value, _SCALARS[kind][0]) and isinstance(value, bool) == (kind is bool)


def _scalar(kind: Any, value: Any) -> Any:
    if not _is(kind, value):
        hints = {str: "; put it in quotes", float: number_hint(str(value))}
        _refuse(value, _SCALARS[kind][1] + hints.get(kind, ""))
    if kind is float and not abs(value) <= MAX_NUMBER:
        _refuse(value, f"a finite number of at most {MAX_NUMBER:g}")
    if kind is int and abs(value) > 2**53:
        raise EntryError("whole number beyond 2**53: not every reader stores it exactly")
    if kind is str and len(value) > MAX_TEXT:
        raise EntryError(f"text of {len(value)} characters: expected at most {MAX_TEXT}")
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise EntryError("text with a lone surrogate: expected valid Unicode")
    return kind(value)


def _refuse(value: Any, expected: str) -> NoReturn:
    names = {dict: "a mapping", list: "a list", tuple: "a list", types.NoneType: "nothing"}
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    shown = names.get(type(value), text if len(text) <= 80 else f"{text[:77]}...")
    raise EntryError(f"{shown}: expected {expected}")
