"""Strict reading and canonical writing of the small subset of YAML that entries use.

PyYAML alone reads ``4.98e02`` and ``1e-3`` as text, ``no`` as False, ``1:30`` as 90, an ISO date as
a date, and lets a duplicate key win silently. Whatever readers of a file could understand
differently is refused here: anchors, aliases, tags, directives, duplicate keys, unusual spellings
of numbers and booleans. Nothing is ever constructed from a tag.

Writing does not use ``yaml.dump``: it cannot break a long list of numbers between brackets and
escapes characters above U+FFFF, and the bytes of released files must not change.
"""

import math
import re
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

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?[0-9]{1,400}\.[0-9]{0,400}([eE][-+][0-9]{1,4})?")
_NUMBER_AS_TEXT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"[A-Za-z][\w./@+()-]*(?: [\w./@+()-]+)*", re.ASCII)
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WORDS = {"bool": "a boolean", "null": "nothing", "timestamp": "a date"}


# --- reading --------------------------------------------------------------------------------------


def parse(text: str | bytes, lines: dict[Path, int] | None = None) -> Any:
    """Plain dicts, lists, text, numbers, booleans and None of one YAML document.

    Args:
        text: The document; bytes are read as UTF-8.
        lines: Filled with the line of every value, counted from 1 and keyed by its path.

    Raises:
        EntryError: With the line, for everything but plain, unambiguous YAML within the limits.
    """
    text = _checked_text(text)
    try:
        _check_events(text)  # before composing, whose recursion has no limit
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise EntryError(f"not YAML: {problem}", line=mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise EntryError("not YAML: " + " ".join(str(error).split())) from None
    if root is None:
        raise EntryError("empty document: expected an entry", line=1)
    return _plain(root, (), {} if lines is None else lines)


def _checked_text(text: str | bytes) -> str:
    if len(text) > MAX_BYTES:
        raise EntryError(f"document of more than {MAX_BYTES} bytes: keep raw data in the run")
    try:
        content = text if isinstance(text, bytes) else text.encode("utf-8")
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"byte {error.start} is not UTF-8: save the file as UTF-8"
        raise EntryError(problem, line=line) from None
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is a lone surrogate: save the file as UTF-8"
        raise EntryError(problem) from None
    if len(content) > MAX_BYTES:
        raise EntryError(f"document of more than {MAX_BYTES} bytes: keep raw data in the run")
    return decoded


def _check_events(text: str) -> None:
    """Refuse what is not plain, too deep, or too much, without building anything."""
    depth = values = documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        problem = None
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                problem = "a second document: one entry per file"
            elif event.version or event.tags:
                problem = "a %YAML or %TAG directive: remove it, entries are plain YAML 1.1"
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            tag = getattr(event, "tag", None)  # an alias has none
            if event.anchor is not None:
                problem = "an anchor or alias (&, *): write the value out"
            elif tag is not None:
                problem = f"the tag {tag[:60]!r}: tags are never followed, write a plain value"
            elif depth > MAX_DEPTH:
                problem = f"nested deeper than {MAX_DEPTH} levels"
            elif values > MAX_VALUES:
                problem = f"more than {MAX_VALUES} values: keep raw data in the run"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if problem:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise EntryError(problem, line=line)


def _plain(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, place), lines) for place, item in enumerate(node.value)]
    items: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _key(key_node, path)
        if key in items:
            problem = f"duplicate key {key!r}: the later value would win silently; keep one"
            _refuse(key_node, problem, (*path, key))
        lines[(*path, key)] = key_node.start_mark.line + 1
        items[key] = _plain(value_node, (*path, key), lines)
    return items


def _key(node: yaml.Node, path: Path) -> str:
    if node.value == "<<" and isinstance(node, yaml.ScalarNode) and not node.style:
        _refuse(node, "a merge key (<<): write the values out", path)
    key = _scalar(node, (*path, "?")) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(key, str) or len(key) > MAX_KEY:
        problem = f"a key that is not text of at most {MAX_KEY} characters: put it in quotes"
        _refuse(node, problem, path)
    return key


def _scalar(node: yaml.ScalarNode, path: Path) -> Any:
    text = node.value
    kind = node.tag.rpartition(":")[2]  # what YAML 1.1 takes it for
    if node.style or kind in ("str", "merge"):
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if kind == "int" and _INT.fullmatch(text):
        return int(text)
    if kind == "float" and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    shown = text[:60]
    if kind in ("int", "float"):
        advice = "expected finite decimals, e.g. 50, 0.25 or 1.5e-07; quotes for text"
        _refuse(node, f"number {shown}: {advice}", path)
    meaning = _WORDS.get(kind, "something else")
    advice = "write true, false or null, or put text in quotes"
    _refuse(node, f"YAML reads {shown} as {meaning}: {advice}", path)


def _refuse(node: yaml.Node, problem: str, path: Path) -> NoReturn:
    raise EntryError(problem, path, line=node.start_mark.line + 1)


def number_hint(text: str) -> str:
    """Advice for text that a person meant as a number, e.g. ``4.98e02``; empty for other text."""
    if not _NUMBER_AS_TEXT.fullmatch(text) or len(text) > 60 or not math.isfinite(float(text)):
        return ""
    return f" (YAML 1.1 reads {text} as text; write {format_float(float(text))} without quotes)"


# --- writing --------------------------------------------------------------------------------------


def write(value: dict[str, Any]) -> str:
    """Canonical text of a plain mapping: block style, lists of scalars in brackets."""
    return "".join(f"{line}\n" for line in _block(value, ""))


def format_float(value: float) -> str:
    """Shortest decimal that gives the same float back and that YAML 1.1 reads as a float."""
    mantissa, e, exponent = float.__repr__(value).partition("e")
    if "." not in mantissa:
        mantissa += ".0"  # YAML 1.1 reads 1e-05 as text
    return f"{mantissa}{e}{exponent}"


def _block(mapping: dict[str, Any], indent: str) -> list[str]:
    lines = []
    inner = indent + "  "
    for key, value in mapping.items():
        head = f"{indent}{_text(key)}:"
        line = f"{head} {_flow(value)}"
        if isinstance(value, dict) and value:
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


def _list_item(item: dict[str, Any], indent: str) -> list[str]:
    line = f"{indent}- {_flow(item)}"
    nested = any(isinstance(value, dict | list) for value in item.values())
    if len(line) <= LINE_WIDTH and not nested:
        return [line]
    first, *others = _block(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *others]


def _wrapped(items: list[Any], indent: str) -> list[str]:
    lines = [indent]
    for item in items:
        text = f"{_flow(item)},"
        if lines[-1] != indent and len(lines[-1]) + len(text) > LINE_WIDTH:
            lines.append(indent)
        lines[-1] += f"{text} "
    lines[-1] = lines[-1].rstrip().removesuffix(",")
    return [line.rstrip() for line in lines]


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return format_float(value)
    if value is None:
        return "null"
    return str(value).lower()  # true, false, and integers


def _text(text: str) -> str:
    """Plain where no reader could take it for something else, in double quotes otherwise."""
    if _PLAIN.fullmatch(text) and _resolved(text).endswith(":str"):
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _resolved(text: str) -> str:
    """The tag that YAML 1.1 gives an unquoted scalar."""
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[0], ()):
        if pattern.match(text):
            return str(tag)
    return "tag:yaml.org,2002:str"


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    if character in "\n\t":
        return {"\n": "\\n", "\t": "\\t"}[character]
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
