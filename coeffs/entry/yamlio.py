"""Canonical writing of the small subset of YAML that entries use; ``yamlread`` reads it, and costs PyYAML's import."""

import math
import re
from typing import Any

MAX_BYTES = 256 * 1024
LINE_WIDTH = 115

_NUMBER_AS_TEXT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"[A-Za-z][\w./@+()-]*(?: [\w./@+()-]+)*", re.ASCII)


def write(value: dict) -> str:
    """Canonical text of a plain mapping: block style, flow lists of numbers, floats that read back exactly."""
    return "".join(f"{line}\n" for line in _mapping_lines(value, ""))


def format_float(value: float) -> str:
    """Shortest decimal that gives the same float back and that YAML 1.1 reads as a float, e.g. ``1.0e-05``."""
    text = float.__repr__(value)
    mantissa, e, exponent = text.partition("e")
    return text if "." in mantissa else f"{mantissa}.0{e}{exponent}"


def format_text(text: str) -> str:
    """Plain where no reader could take it for something else, double-quoted with escapes otherwise."""
    if _PLAIN.fullmatch(text):
        from coeffs.entry.yamlread import resolve

        if resolve(text) == "str":
            return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return {10: "\\n", 9: "\\t"}.get(code) or (
        f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{format_text(key)}: {_flow(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return format_float(value)
    return str(value) if isinstance(value, int) else format_text(value)


def _mapping_lines(value: dict, indent: str) -> list[str]:
    lines = []
    for key, item in value.items():
        head = f"{indent}{format_text(key)}:"
        if isinstance(item, dict) and item:
            lines += [head, *_mapping_lines(item, indent + "  ")]
        elif isinstance(item, list) and any(isinstance(part, dict) for part in item):
            lines += [head, *(line for part in item for line in _item_lines(part, indent + "  "))]
        elif isinstance(item, list):
            lines += _wrapped(head, item, indent + "  ")
        else:
            lines.append(f"{head} {_flow(item)}")
    return lines


def _item_lines(item: dict, indent: str) -> list[str]:
    flow = f"{indent}- {_flow(item)}"
    if len(flow) <= LINE_WIDTH and not any(isinstance(part, dict | list) for part in item.values()):
        return [flow]
    first, *rest = _mapping_lines(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *rest]


def _wrapped(head: str, items: list, indent: str) -> list[str]:
    flow = f"{head} {_flow(items)}"
    if len(flow) <= LINE_WIDTH:
        return [flow]
    lines, line = [f"{head} ["], indent
    for item in items:
        text = f"{_flow(item)},"
        if line.strip() and len(line) + len(text) > LINE_WIDTH:
            lines.append(line.rstrip())
            line = indent
        line += f"{text} "
    return [*lines, line.rstrip().removesuffix(","), f"{indent[:-2]}]"]


def number_hint(text: str) -> str:
    """Advice for text that a person meant as a number, e.g. ``4.98e02``; empty for other text."""
    if not _NUMBER_AS_TEXT.fullmatch(text) or len(text) > 60 or not math.isfinite(float(text)):
        return ""
    return f" (YAML 1.1 reads {text} as text; write {format_float(float(text))} without quotes)"
