"""Dataclasses whose annotations are the format: they check values and decide what is written."""

import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from coeffs.entry.strict_yaml import number_hint
from coeffs.errors import EntryError, did_you_mean

# No calibration has larger numbers; powers of such coefficients still fit a float.
MAX_NUMBER = 1e30
MAX_TEXT = 8000
# Bounds refuse slips such as a width in the place of a step count; no real model comes near them.
MAX_STEPS = 10_000

# Written even where they hold their default: a reader of the file needs them.
_ALWAYS_WRITTEN = ("schema", "version", "sign_rule")

Check = Callable[[Any], Any]


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
Pixels = Annotated[int, Limits(1, 10**6)]
Positive = Annotated[float, Limits(0)]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Record:
    """Base of the dataclasses: checks and normalises every field (lists become tuples)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            annotation: Any = field.type
            try:
                object.__setattr__(self, field.name, _checker(annotation)(value))
            except EntryError as error:
                raise error.under(field.name) from None
        self._check()

    def _check(self) -> None:
        """Rules that span several fields."""


def plain(value: Any) -> Any:
    """Records as plain dicts, lists and scalars; fields that hold their default are left out."""
    if isinstance(value, Record):
        items = {}
        record: Any = type(value)
        for name, default in _defaults(record).items():
            item = getattr(value, name)
            if item != default or name in _ALWAYS_WRITTEN:
                items[name] = plain(item)
        return items
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def from_plain(data: Any, record: Any) -> Any:
    """The record that plain data describes.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or
            out of range.
    """
    return _checker(record)(data)


@functools.cache
def _defaults(cls: Any) -> dict[str, Any]:
    """Every field with its default, ``MISSING`` where it has none; for comparison only."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
    }


# --- checks compiled from the annotations ---------------------------------------------------------


@functools.cache
def _checker(annotation: Any) -> Check:
    """Checks and normalises a value of this annotation, or raises ``EntryError``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return functools.partial(_record, annotation)
    if origin is Annotated:
        return functools.partial(_constrained, _checker(arguments[0]), arguments[1])
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin in (Union, types.UnionType):
        return functools.partial(_union, arguments)
    if origin is dict:
        return functools.partial(_dict, _checker(arguments[0]), _checker(arguments[1]))
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        return functools.partial(_tuple, _checker(arguments[0]), length)
    return _SCALARS[annotation][1]


def _record(cls: Any, value: Any) -> Any:
    if type(value) is cls:
        return value
    fields = _defaults(cls)
    if not isinstance(value, dict):
        known = ", ".join(list(fields)[:4])
        raise EntryError(f"{_shown(value)}: expected a mapping of {known}, ...")
    for key in value:
        if key not in fields:
            raise EntryError(f"unknown key: {_advice(str(key), fields)}", (str(key),))
    given = {}
    for name, default in fields.items():
        if default is MISSING and name not in value:
            raise EntryError(f"missing key {name}")
        if default is MISSING or value.get(name) is not None:
            given[name] = value[name]
    return cls(**given)


def _advice(key: str, fields: dict[str, Any]) -> str:
    if "coefficients" in key:
        order = "coefficients_high_to_low, highest power first (numpy.polyfit's order)"
        return f"coefficients are given as {order}"
    return did_you_mean(key, fields, most=1) or f"expected one of {', '.join(fields)}"


def _constrained(check: Check, limits: Limits | Pattern, value: Any) -> Any:
    value = check(value)
    if isinstance(limits, Pattern):
        if not re.fullmatch(limits.regex, value):
            raise EntryError(f"{_shown(value)}: expected {limits.words}")
    elif not limits.low <= value <= limits.high:
        raise EntryError(f"{value}: expected {limits.low:g} to {limits.high:g}")
    return value


def _choice(choices: tuple[str, ...], value: Any) -> str:
    if not isinstance(value, str) or value not in choices:
        raise EntryError(f"{_shown(value)}: expected {', '.join(choices)}")
    return value


def _union(arguments: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    if len(kinds) == 1:
        return _checker(kinds[0])(value)
    # Several kinds are scalars only. True is an int to Python; an int is a number to a file.
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if kind is int and int not in kinds:
        kind = float
    if kind not in kinds:
        expected = " or ".join(_SCALARS[kind][0] for kind in kinds)
        raise EntryError(f"{_shown(value)}: expected {expected}")
    return _checker(kind)(value)


def _dict(check_key: Check, check: Check, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EntryError(f"{_shown(value)}: expected a mapping")
    items = {}
    for key, item in value.items():
        try:
            items[check_key(key)] = check(item)
        except EntryError as error:
            raise error.under(str(key)) from None
    return items


def _tuple(check: Check, length: int | None, value: Any) -> tuple[Any, ...]:
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise EntryError(f"{_shown(value)}: expected a list")
    items = []
    for position, item in enumerate(value):
        try:
            items.append(check(item))
        except EntryError as error:
            raise error.under(position) from None
    if length is not None and len(items) != length:
        raise EntryError(f"{len(items)} values: expected {length}")
    return tuple(items)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise EntryError(f"{_shown(value)}: expected text; put it in quotes")
    if len(value) > MAX_TEXT:
        raise EntryError(f"text of {len(value)} characters: expected at most {MAX_TEXT}")
    if re.search("[\ud800-\udfff]", value):
        raise EntryError("text with a lone surrogate: expected valid Unicode")
    return value


def finite_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = number_hint(value) if isinstance(value, str) else ""
        raise EntryError(f"{_shown(value)}: expected a number{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_NUMBER:
        raise EntryError(f"{number}: expected a finite number of at most {MAX_NUMBER:g}")
    return number


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise EntryError(f"{_shown(value)}: expected a whole number")
    number = int(value)
    if abs(number) > 2**53:
        raise EntryError("whole number beyond 2**53: not every reader stores it exactly")
    return number


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise EntryError(f"{_shown(value)}: expected true or false")
    return value


_SCALARS: dict[Any, tuple[str, Check]] = {
    str: ("text", _text),
    int: ("a whole number", _integer),
    float: ("a number", finite_number),
    bool: ("true or false", _boolean),
}


def _shown(value: Any) -> str:
    """Short words for a value in an error."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
