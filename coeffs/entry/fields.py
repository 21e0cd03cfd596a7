"""Dataclasses whose annotations are the format: they check values and decide what is written."""

import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from coeffs.entry.strict_yaml import number_hint
from coeffs.errors import EntryError

MAX_NUMBER = 1e30
MAX_TEXT = 8000


@dataclass(frozen=True)
class Limits:
    """Bounds of a number (both included), used inside ``Annotated``."""

    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER


@dataclass(frozen=True)
class Pattern:
    """A regular expression that the whole text must match, with the words that an error uses for it."""

    regex: str
    words: str


class Record:
    """Base of the dataclasses: checks and normalises every field on construction (lists become tuples)."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            try:
                object.__setattr__(self, spec.name, _checker(spec.type)(value))
            except EntryError as error:
                raise error.under(spec.name) from None
        self._check()

    def _check(self) -> None:
        """Rules that span several fields."""


_ALWAYS_WRITTEN = ("schema", "version", "sign_rule")


def plain(record: Any) -> Any:
    """A record as plain dicts, lists and scalars; fields that hold their default are left out."""
    if isinstance(record, Record):
        return {
            name: plain(value)
            for name, default in _defaults(type(record)).items()
            if (value := getattr(record, name)) != default or name in _ALWAYS_WRITTEN
        }
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [plain(value) for value in record]
    return record


def from_plain(data: Any, record: type[Record]) -> Any:
    """The record that plain data describes.

    Raises:
        EntryError: With the path of the first value that is unknown, missing, of a wrong type or out of range.
    """
    return _checker(record)(data)


@functools.cache
def _defaults(cls: type[Record]) -> dict[str, Any]:
    """Every field with its default, ``MISSING`` where it has none; for comparison only."""
    return {
        spec.name: spec.default
        if spec.default_factory is dataclasses.MISSING
        else spec.default_factory()
        for spec in dataclasses.fields(cls)
    }


# --- checks compiled from the annotations ---------------------------------------------------------------------------

Check = Callable[[Any], Any]


@functools.cache
def _checker(annotation: Any) -> Check:
    """The function that checks and normalises a value of this annotation, raising ``EntryError``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return functools.partial(_record, annotation)
    if origin is Annotated:
        return functools.partial(_constrained, _checker(arguments[0]), arguments[1])
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin in (Union, types.UnionType):
        return _union_checker(arguments)
    if origin is dict:
        return functools.partial(_dict, _checker(arguments[0]), _checker(arguments[1]))
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        return functools.partial(_tuple, _checker(arguments[0]), length)
    return {str: _text, float: finite_number, int: _integer, bool: _boolean}[annotation]


def _record(cls: type[Record], value: Any) -> Record:
    if type(value) is cls:
        return value
    if not isinstance(value, dict):
        raise EntryError(
            f"{_found(value)}: expected a mapping of {', '.join(list(_defaults(cls))[:4])}, ..."
        )
    for key in value:
        if key not in _defaults(cls):
            raise EntryError(f"unknown key: {_advice(key, cls)}", (str(key),))
    for name in _required(cls):
        if name not in value:
            raise EntryError(f"missing key {name}")
    return cls(
        **{key: item for key, item in value.items() if item is not None or key in _required(cls)}
    )


@functools.cache
def _required(cls: type[Record]) -> tuple[str, ...]:
    return tuple(name for name, default in _defaults(cls).items() if default is dataclasses.MISSING)


def _advice(key: Any, cls: type[Record]) -> str:
    import difflib

    if "coefficients" in str(key):
        return "coefficients are given as coefficients_high_to_low, highest power first (numpy.polyfit's order)"
    close = difflib.get_close_matches(str(key), _defaults(cls), 1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_defaults(cls))}"


def _constrained(check: Check, limits: Limits | Pattern, value: Any) -> Any:
    value = check(value)
    if isinstance(limits, Pattern):
        if not _compiled(limits.regex).fullmatch(value):
            raise EntryError(f"{_found(value)}: expected {limits.words}")
    elif not limits.low <= value <= limits.high:
        raise EntryError(f"{value}: expected {limits.low:g} to {limits.high:g}")
    return value


_compiled = functools.cache(re.compile)


def _choice(choices: tuple[str, ...], value: Any) -> str:
    if value not in choices or not isinstance(value, str):
        raise EntryError(f"{_found(value)}: expected {', '.join(choices)}")
    return value


def _union_checker(arguments: tuple) -> Check:
    nullable = type(None) in arguments
    checks = [_checker(argument) for argument in arguments if argument is not type(None)]
    if len(checks) == 1:
        check = checks[0]
        return lambda value: None if nullable and value is None else check(value)
    scalars = tuple(argument for argument in arguments if argument is not type(None))

    def one_of(value: Any) -> Any:
        if nullable and value is None:
            return None
        kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
        if kind is int and int not in scalars and float in scalars:
            kind = float
        if kind not in scalars:
            raise EntryError(
                f"{_found(value)}: expected {' or '.join(_WORDS[kind] for kind in scalars)}"
            )
        return _checker(kind)(value)

    return one_of


def _dict(check_key: Check, check: Check, value: Any) -> dict:
    if not isinstance(value, dict):
        raise EntryError(f"{_found(value)}: expected a mapping")
    items = {}
    for key, item in value.items():
        try:
            items[check_key(key)] = check(item)
        except EntryError as error:
            raise error.under(str(key)) from None
    return items


def _tuple(check: Check, length: int | None, value: Any) -> tuple:
    value = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors
    if not isinstance(value, list | tuple):
        raise EntryError(f"{_found(value)}: expected a list")
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
        raise EntryError(f"{_found(value)}: expected text; put it in quotes")
    if len(value) > MAX_TEXT:
        raise EntryError(f"text of {len(value)} characters: expected at most {MAX_TEXT}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise EntryError("text with a lone surrogate: expected valid Unicode")
    return value


def finite_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = number_hint(value) if isinstance(value, str) else ""
        raise EntryError(f"{_found(value)}: expected a number{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_NUMBER:
        raise EntryError(f"{number}: expected a finite number of at most {MAX_NUMBER:g}")
    return number


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise EntryError(f"{_found(value)}: expected a whole number")
    if abs(value) > 2**53:
        raise EntryError("whole number beyond 2**53: expected one that every reader stores exactly")
    return int(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise EntryError(f"{_found(value)}: expected true or false")
    return value


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _found(value: Any) -> str:
    """Short words for a value in an error."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
