"""Strict reading and canonical writing of the small subset of YAML that entries use.

PyYAML alone reads ``4.98e02`` and ``1e-3`` as text, ``no`` as False, ``1:30`` as 90, an ISO date as
a date, and lets a duplicate key win silently. Whatever readers of a file could understand
differently is refused here: anchors, aliases, tags, directives, duplicate keys, unusual spellings
of numbers and booleans. Nothing is ever constructed from a tag.

Reading goes through PyYAML's events, one pass with every limit in it: ``yaml.compose`` would build
nodes without any. Writing does not use ``yaml.dump``: it cannot break a long list of numbers between
brackets and escapes characters above U+FFFF, and the bytes of released files must not change.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NoReturn

import yaml

from coeffs.errors import EntryError

# Far above any entry (the largest shipped one has 27 KiB), low enough to be read in a second.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_KEY = 128
LINE_WIDTH = 115

Path = tuple[str | int, ...]
Lines = dict[Path, int]
Plain = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBERS = {
    "int": (int, re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")),
    "float": (float, re.compile(r"[-+]?[0-9]{1,400}\.[0-9]{0,400}([eE][-+][0-9]{1,4})?")),
}
_NUMBER_AS_TEXT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"[A-Za-z][\w./@+()-]*(?: [\w./@+()-]+)*", re.ASCII)
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_DECIMALS = "a number: expected finite decimals, e.g. 50, 0.25 or 1.5e-07; quotes for text"
_CONSTANT = "write true, false or null, or put text in quotes"
_READ_AS = {
    "int": _DECIMALS,
    "float": _DECIMALS,
    "bool": f"a boolean: {_CONSTANT}",
    "null": f"nothing: {_CONSTANT}",
    "timestamp": "a date: put text in quotes",
    "merge": "a merge key: write the values out",
}


# --- reading --------------------------------------------------------------------------------------


def parse(text: str | bytes, lines: Lines | None = None) -> Any:
    """Plain dicts, lists, text, numbers, booleans and None of one YAML document.

    Args:
        text: The document; bytes are read as UTF-8.
        lines: Filled with the line of every value, counted from 1 and keyed by its path.

    Raises:
        EntryError: With the line, for everything but plain, unambiguous YAML within the limits.
    """
    if len(text) > MAX_BYTES:
        raise EntryError(f"document of more than {MAX_BYTES} bytes: keep raw data in the run")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return _document(yaml.parse(decoded, Loader=_LOADER), {} if lines is None else lines)
    except UnicodeDecodeError as error:
        raise EntryError(
            f"byte {error.start} is not UTF-8: save the file as UTF-8",
            line=error.object.count(b"\n", 0, error.start) + 1,
        ) from None
    except UnicodeEncodeError:
        raise EntryError("text with a lone surrogate: save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise EntryError(f"not YAML: {problem}", line=mark and mark.line + 1) from None


def _document(events: Iterator[Any], lines: Lines) -> Any:
    next(events)  # the stream's start
    start = next(events)
    if not isinstance(start, yaml.DocumentStartEvent):
        raise EntryError("empty document: expected an entry", line=1)
    if start.version or start.tags:
        _refuse(start, "a %YAML or %TAG directive: remove it, entries are plain YAML 1.1")
    value = _value(events, (), lines)
    next(events)  # the document's end
    after = next(events)
    if isinstance(after, yaml.DocumentStartEvent):
        _refuse(after, "a second document: one entry per file")
    return value


def _value(events: Iterator[Any], path: Path, lines: Lines, first: Any = None) -> Any:
    """The value that begins with the event ``first``, or with the next one."""
    event = first or next(events)
    lines.setdefault(path, event.start_mark.line + 1)
    if event.anchor is not None:
        _refuse(event, "an anchor or alias (&, *): write the value out", path)
    if event.tag is not None:
        problem = f"the tag {event.tag[:60]!r}: tags are never followed, write a plain value"
        _refuse(event, problem, path)
    if len(path) > MAX_DEPTH:
        _refuse(event, f"nested deeper than {MAX_DEPTH} levels")
    if len(lines) > MAX_VALUES:
        _refuse(event, f"more than {MAX_VALUES} values: keep raw data in the run")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, path)
    parts = takewhile(lambda part: not isinstance(part, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [
            _value(events, (*path, place), lines, part) for place, part in enumerate(parts)
        ]
    items: Plain = {}
    for part in parts:
        key = _value(events, (*path, "?"), lines, part)
        if not isinstance(key, str) or len(key) > MAX_KEY:
            _refuse(
                part,
                f"a key that is not text of at most {MAX_KEY} characters: put it in quotes",
                path,
            )
        inner = (*path, key)
        if key in items:
            _refuse(
                part,
                f"duplicate key {key!r}: the later value would win silently; keep one",
                inner,
            )
        lines[inner] = part.start_mark.line + 1
        items[key] = _value(events, inner, lines)
    return items


def _scalar(event: yaml.ScalarEvent, path: Path) -> Any:
    text = event.value
    kind = "str" if event.style else _kind(text)
    if kind == "str":
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if kind in _NUMBERS:
        number, spelling = _NUMBERS[kind]
        if spelling.fullmatch(text) and math.isfinite(number(text)):
            return number(text)
    read_as = _READ_AS.get(kind, "something else: put text in quotes")
    _refuse(event, f"YAML reads {text[:60]} as {read_as}", path)


def _kind(text: str) -> str:
    """What YAML 1.1 takes an unquoted scalar for."""
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if pattern.match(text):
            return str(tag).rpartition(":")[2]
    return "str"


def _refuse(event: Any, problem: str, path: Path = ()) -> NoReturn:
    raise EntryError(problem, *path, line=event.start_mark.line + 1)


def number_hint(text: str) -> str:
    """Advice for text that a person meant as a number, e.g. ``4.98e02``; empty for other text."""
    if (
        not _NUMBER_AS_TEXT.fullmatch(text)
        or len(text) > 60
        or not math.isfinite(float(text))
    ):
        return ""
    return (
        f" (YAML 1.1 reads {text} as text; write {format_float(float(text))} without quotes)"
    )


# --- writing --------------------------------------------------------------------------------------


def write(value: Plain) -> str:
    """Canonical text of a plain mapping: block style, lists of scalars in brackets."""
    return "".join(f"{line}\n" for line in _block(value, ""))


def format_float(value: float) -> str:
    """Shortest decimal that gives the same float back and that YAML 1.1 reads as a float."""
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text


def _block(mapping: Plain, indent: str) -> list[str]:
    lines = []
    inner = indent + "  "
    for key, value in mapping.items():
        head = f"{indent}{_flow(key)}:"
        line = f"{head} {_flow(value)}"
        if value and isinstance(value, dict):
            lines += [head, *_block(value, inner)]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines.append(head)
            for item in value:
                lines += _list_item(item, inner)
        elif isinstance(value, list) and len(line) > LINE_WIDTH:
            lines += [f"{head} [", *_wrapped(value, inner), f"{indent}]"]
        else:
            lines.append(line)
    return lines


def _list_item(item: Plain, indent: str) -> list[str]:
    line = f"{indent}- {_flow(item)}"
    nested = any(isinstance(value, dict | list) for value in item.values())
    if len(line) <= LINE_WIDTH and not nested:
        return [line]
    first, *others = _block(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *others]


def _wrapped(items: list[Any], indent: str) -> list[str]:
    """Lines of a long list, broken between its items only: spaces inside them are set aside."""
    filled = textwrap.fill(
        ", ".join(_flow(item).replace(" ", "\0") for item in items) + ",",
        LINE_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.removesuffix(",").replace("\0", " ").splitlines()


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items())
        return f"{{{items}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        # Plain where no reader could take it for something else.
        return value if _PLAIN.fullmatch(value) and _kind(value) == "str" else _quoted(value)
    if isinstance(value, float):
        return format_float(value)
    return "null" if value is None else str(value).lower()  # true, false, and integers


def _quoted(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)  # YAML knows all of JSON's escapes
    return "".join(char if char.isprintable() else _code(ord(char)) for char in escaped)


def _code(number: int) -> str:
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
