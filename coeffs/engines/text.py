"""The forms of the engines as text: JSON, YAML, command lines, and Python calls that are parsed and never run."""

import ast
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from coeffs.entry import strict_yaml
from coeffs.errors import EngineError, EntryError

# --- writing ----------------------------------------------------------------------------------------


def comment(notes: Iterable[str]) -> str:
    return "".join(f"# {note}\n" for note in notes)


def yaml_text(section: dict[str, Any]) -> str:
    """Nested mappings in blocks, lists in one line; floats as YAML 1.1 reads them."""
    import yaml  # here, so that `import coeffs` stays cheap

    return yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=10_000)


def command_line(notes: Iterable[str], arguments: dict[str, str]) -> str:
    """Options for a command line in one line, after the notes."""
    options = " ".join(f"{name} {shlex.quote(value)}" for name, value in arguments.items())
    return f"{comment(notes)}{options}\n"


# --- reading ----------------------------------------------------------------------------------------


def read_json(
    text: str, *, required: set[str], known: Sequence[str] | None = None
) -> dict[str, Any]:
    """A JSON object with these keys; ``known`` refuses any other."""
    _check_size(text)
    try:
        form = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"not JSON: {' '.join(str(error).split())}") from None
    return _checked(form, required, known)


def read_section(text: str, section: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """The mapping under one key of a YAML document, read strictly; ``known`` refuses any other key in it."""
    try:
        form = strict_yaml.parse(text)
    except EntryError as error:
        raise EngineError(str(error)) from None
    return _checked(_checked(form, {section}, None)[section], set(), known)


def read_option(text: str, name: str) -> str:
    """What follows ``name`` on a command line, as ``command_line`` writes it."""
    _check_size(text)
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise EngineError(f"not a command line: {error}") from None
    if name not in words[:-1]:
        raise EngineError(f"no {name}: expected {name} '...', as the export writes it")
    return words[words.index(name) + 1]


def read_calls(text: str, name: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Every call of ``name`` in Python text: the variable it is assigned to, and its keyword arguments as literals."""
    calls: list[tuple[str | None, dict[str, Any]]] = []
    for node in ast.walk(_parsed(text)):
        if not isinstance(node, ast.Assign | ast.Expr) or not isinstance(node.value, ast.Call):
            continue
        function = node.value.func
        if not isinstance(function, ast.Name) or function.id != name:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        variable = target.id if isinstance(target, ast.Name) else None
        calls.append((variable, _arguments(node.value)))
    if not calls:
        raise EngineError(f"no call of {name}: expected {name}(...), as the export writes it")
    return calls


def read_item(text: str, name: str) -> tuple[str, Any]:
    """The key and the literal of ``name["key"] = literal`` in Python text."""
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if isinstance(target.value, ast.Name) and target.value.id == name:
                return str(_literal(target.slice)), _literal(node.value)
    raise EngineError(f'no assignment: expected {name}["..."] = [...], as the export writes it')


def number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EngineError(f"{what}: {str(value)[:60]!r}, expected a finite number")
    return float(value)


def number_list(value: object, what: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 10_000:
        raise EngineError(f"{what}: {str(value)[:60]!r}, expected a list of numbers")
    return tuple(number(item, what) for item in value)


def cap(value: object) -> int | None:
    """A longest run of skips."""
    if value is not None and type(value) is not int:
        raise EngineError(f"longest run of skips {str(value)[:40]!r}: expected a whole number")
    return value


def _check_size(text: str) -> None:
    if len(text) > strict_yaml.MAX_BYTES:
        raise EngineError(
            f"more than {strict_yaml.MAX_BYTES} characters: expected one engine's setting"
        )


def _parsed(text: str) -> ast.AST:
    _check_size(text)
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EngineError(f"not Python: {' '.join(str(error).split())}") from None


def _arguments(call: ast.Call) -> dict[str, Any]:
    return {
        keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg is not None
    }


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
        raise EngineError(
            "an expression where a plain value was expected: write numbers out"
        ) from None


def _checked(form: Any, required: set[str], known: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(form, dict):
        names = sorted(required) or known or ["keys"]
        raise EngineError(f"expected an object with {', '.join(names)}")
    if missing := required - set(form):
        raise EngineError(f"missing {', '.join(sorted(missing))}")
    if known is not None and (unknown := set(form) - set(known)):
        names = ", ".join(sorted(map(str, unknown)))[:200]
        raise EngineError(f"unknown {names}: expected {', '.join(sorted(known))}")
    return form


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ValueError("a key appears twice")
    return form


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")
