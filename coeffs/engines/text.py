"""Reading the forms of the engines: JSON, and Python calls that are parsed and never run."""

import ast
import json
from typing import Any

from coeffs.entry import strict_yaml
from coeffs.errors import EngineError, EntryError


def read_json(text: str, *, required: set[str], known: set[str] | None = None) -> dict:
    """A JSON object with these keys; ``known`` refuses any other."""
    _check_size(text)
    try:
        form = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"not JSON: {' '.join(str(error).split())}") from None
    return _checked(form, required, known)


def read_yaml(text: str, *, required: set[str]) -> dict:
    """A YAML mapping with these keys, read strictly."""
    try:
        form = strict_yaml.parse(text)
    except EntryError as error:
        raise EngineError(str(error)) from None
    return _checked(form, required, None)


def read_calls(text: str, name: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Every call of ``name`` in Python text: the variable it is assigned to, and its keyword arguments as literals."""
    found = []
    for node in ast.walk(_parsed(text)):
        if (
            isinstance(node, ast.Assign)
            and _is_call(node.value, name)
            and isinstance(node.targets[0], ast.Name)
        ):
            found.append((node.targets[0].id, _arguments(node.value)))
        elif isinstance(node, ast.Expr) and _is_call(node.value, name):
            found.append((None, _arguments(node.value)))
    if not found:
        raise EngineError(f"no call of {name}: expected {name}(...), as the export writes it")
    return found


def read_item(text: str, name: str) -> tuple[str, Any]:
    """The key and the literal of ``name["key"] = literal`` in Python text."""
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if isinstance(target.value, ast.Name) and target.value.id == name:
                return str(_literal(target.slice)), _literal(node.value)
    raise EngineError(f'no assignment: expected {name}["..."] = [...], as the export writes it')


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


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


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


def _checked(form: Any, required: set[str], known: set[str] | None) -> dict:
    if not isinstance(form, dict):
        raise EngineError(f"expected an object with {', '.join(sorted(required))}")
    if missing := required - set(form):
        raise EngineError(f"missing {', '.join(sorted(missing))}")
    if known is not None and (unknown := set(form) - known):
        raise EngineError(
            f"unknown {', '.join(sorted(unknown))[:200]}: expected {', '.join(sorted(known))}"
        )
    return form


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ValueError("a key appears twice")
    return form


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")
