"""Strict reading of the small subset of YAML that entries use.

PyYAML alone reads ``4.98e02`` and ``1e-3`` as text, ``no`` as False, ``1:30`` as 90, an ISO date as a date, and lets a
duplicate key win silently. This reader works on the event stream, so nothing is ever constructed from a tag, and
refuses whatever a reader of the file could understand differently: anchors, aliases, tags, directives, duplicate keys,
unusual spellings of numbers and booleans. Size, depth and number of values are limited.
"""

import math
import re
from typing import Any

import yaml

from coeffs.entry.yamlio import MAX_BYTES
from coeffs.errors import EntryError

MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_KEY = 128

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVERS = yaml.SafeLoader.yaml_implicit_resolvers
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,400}\.[0-9]{0,400}([eE][-+][0-9]{1,4})?")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}

Path = tuple[str | int, ...]


def parse(text: str | bytes, lines: dict[Path, int] | None = None) -> Any:
    """Plain dicts, lists, text, numbers, booleans and None of one YAML document.

    Args:
        text: The document; bytes are read as UTF-8.
        lines: Filled with the line of every value, counted from 1 and keyed by its path, where given.

    Raises:
        EntryError: With the line, for everything that is not plain, unambiguous YAML within the limits.
    """
    return _Reader(_checked_text(text), lines).document()


def locate(text: str | bytes, path: Path) -> int | None:
    """Line of the value at ``path``, or of the nearest enclosing value; None where the text cannot be read."""
    lines: dict[Path, int] = {}
    try:
        parse(text, lines)
    except EntryError:
        return None
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def _checked_text(text: str | bytes) -> str:
    if len(text) > MAX_BYTES:
        raise EntryError(
            f"document of more than {MAX_BYTES} bytes: an entry has a few kilobytes; keep raw data in the run"
        )
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise EntryError(
                f"byte {error.start} is not UTF-8: save the file as UTF-8", line=line
            ) from None
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise EntryError(
            f"character {error.start} is a lone surrogate: save the file as UTF-8"
        ) from None
    if size > MAX_BYTES:
        raise EntryError(f"document of {size} bytes: at most {MAX_BYTES}; keep raw data in the run")
    return text


class _Reader:
    """Builds plain values from the events of one document."""

    def __init__(self, text: str, lines: dict[Path, int] | None):
        self.events = yaml.parse(text, Loader=_LOADER)
        self.lines = lines
        self.values = 0

    def document(self) -> Any:
        self.next()
        start = self.next()
        if isinstance(start, yaml.StreamEndEvent):
            raise EntryError("empty document: expected an entry", line=1)
        if start.version or start.tags:
            raise _at(start, "a %YAML or %TAG directive: remove it, entries are plain YAML 1.1")
        value = self.value(self.next(), (), 0)
        self.next()
        following = self.next()
        if not isinstance(following, yaml.StreamEndEvent):
            raise _at(following, "a second document: one entry per file")
        return value

    def next(self) -> yaml.Event:
        try:
            return next(self.events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = " ".join(filter(None, (error.context, error.problem)))
            raise EntryError(f"not YAML: {problem}", line=mark.line + 1 if mark else None) from None
        except yaml.YAMLError as error:
            raise EntryError("not YAML: " + " ".join(str(error).split())) from None

    def value(self, event: yaml.Event, path: Path, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _at(event, f"more than {MAX_VALUES} values: keep raw data in the run", path)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _at(event, "an anchor or alias (&, *): write the value out", path)
        if event.tag is not None:
            raise _at(
                event,
                f"the tag {event.tag[:60]!r}: tags are never followed, write a plain value",
                path,
            )
        if depth > MAX_DEPTH:
            raise _at(event, f"nested deeper than {MAX_DEPTH} levels", path)
        if self.lines is not None:
            self.lines.setdefault(path, event.start_mark.line + 1)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path, depth)
        return self.mapping(path, depth)

    def sequence(self, path: Path, depth: int) -> list:
        items: list = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            items.append(self.value(event, (*path, len(items)), depth + 1))
        return items

    def mapping(self, path: Path, depth: int) -> dict:
        items: dict = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = (
                self.value(event, (*path, "?"), depth + 1)
                if isinstance(event, yaml.ScalarEvent)
                else None
            )
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                raise _at(event, "an anchor or alias (&, *) as key: write it out", path)
            if not isinstance(key, str) or len(key) > MAX_KEY:
                raise _at(
                    event,
                    f"a key that is not text of at most {MAX_KEY} characters: put it in quotes",
                    path,
                )
            if key == "<<" and not event.style:
                raise _at(event, "a merge key (<<): write the values out", path)
            if key in items:
                raise _at(
                    event,
                    f"duplicate key {key!r}: the later value would win silently; keep one",
                    (*path, key),
                )
            if self.lines is not None:
                self.lines[(*path, key)] = event.start_mark.line + 1
            items[key] = self.value(self.next(), (*path, key), depth + 1)
        return items


def _at(event: yaml.Event, problem: str, path: Path = ()) -> EntryError:
    return EntryError(problem, path, line=event.start_mark.line + 1)


def _scalar(event: yaml.ScalarEvent, path: Path) -> Any:
    text = event.value
    if event.style:
        return text
    kind = resolve(text)
    if kind == "str" or kind == "merge":
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if kind == "int" and _INT.fullmatch(text):
        return int(text)
    if kind == "float" and _FLOAT.fullmatch(text):
        number = float(text)
        if math.isfinite(number):
            return number
    if kind in ("int", "float"):
        raise _at(
            event,
            f"number {text[:60]}: expected finite decimals, e.g. 50, 0.25 or 1.5e-07; quotes for text",
            path,
        )
    meaning = {"bool": "a boolean", "null": "nothing", "timestamp": "a date"}.get(
        kind, "something else"
    )
    raise _at(
        event,
        f"YAML reads {text[:60]} as {meaning}: write true, false or null, or put text in quotes",
        path,
    )


def resolve(text: str) -> str:
    """What YAML 1.1 takes an unquoted scalar for: str, int, float, bool, null, timestamp, merge or value."""
    if text == "":
        return "null"
    for tag, pattern in _RESOLVERS.get(text[0], ()):
        if pattern.match(text):
            return tag.rpartition(":")[2]
    return "str"
