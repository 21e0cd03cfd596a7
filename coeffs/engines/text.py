"""The forms of the engines as text: JSON, YAML, command lines, and Python calls that are parsed and never run."""

import ast
import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from coeffs.engines.releases import releases
from coeffs.entry import strict_yaml
from coeffs.entry.fields import Text, checked
from coeffs.errors import EngineError, EntryError

Form = dict[str, Any]

# --- writing ----------------------------------------------------------------------------------------


def comment(notes: Iterable[str]) -> str:
    return "".join(f"# {note}\n" for note in notes)


def json_text(notes: Iterable[str], form: Form, indent: int | None = None) -> str:
    """A JSON object; the notes travel inside, under a key that the engine sets aside."""
    return json.dumps({"_comment": "; ".join(notes), **form}, indent=indent) + "\n"


def yaml_text(notes: Iterable[str], section: str, form: Form) -> str:
    """One section in a block, lists in one line; floats as YAML 1.1 reads them."""
    import yaml  # here, so that `import coeffs` stays cheap

    return comment(notes) + yaml.safe_dump(
        {section: form}, sort_keys=False, default_flow_style=None, width=10_000
    )


def call_text(notes: Iterable[str], function: str, arguments: Form, first: str = "") -> str:
    """A Python call, an argument a line."""
    body = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return f"{comment(notes)}{function}(\n{first}{body})\n"


def command_line(notes: Iterable[str], arguments: dict[str, str]) -> str:
    """Options for a command line in one line, after the notes."""
    options = " ".join(f"{name} {shlex.quote(value)}" for name, value in arguments.items())
    return f"{comment(notes)}{options}\n"


# --- reading ----------------------------------------------------------------------------------------


def read_json(text: str, engine: Text = None) -> Form:
    """A JSON object; with ``engine`` one that holds only what that engine's configuration may hold."""
    with _reading("JSON", text):
        form = json.loads(text, object_pairs_hook=_unique)
    return _checked(form, engine)


def read_section(text: str, section: str, engine: Text = None) -> Form:
    """The mapping under one key of a YAML document, read strictly."""
    with _reading("the engine's form", text):
        form = strict_yaml.parse(text)
    return _checked(_checked(form).get(section), engine)


def read_option(text: str, name: str, engine: str) -> Form:
    """The JSON object that follows ``name`` on a command line, as ``command_line`` writes it."""
    with _reading("a command line", text):
        words = shlex.split(text, comments=True)
    if name not in words[:-1]:
        raise EngineError(f"no {name}: expected {name} '...', as the export writes it")
    return read_json(words[words.index(name) + 1], engine)


def read_calls(text: str, name: str) -> list[tuple[Text, Form]]:
    """Every call of ``name`` in Python text: the variable it is assigned to, and its keyword arguments as literals."""
    with _reading("Python", text):
        nodes = list(ast.walk(ast.parse(text)))
    assigned = {node.value: node.targets[0] for node in nodes if isinstance(node, ast.Assign)}
    calls = []
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
            words = {word.arg: literal(word.value) for word in node.keywords if word.arg}
            calls.append((getattr(assigned.get(node), "id", None), words))
    if not calls:
        raise EngineError(f"no call of {name}: expected {name}(...), as the export writes it")
    return calls


def literal(value: ast.expr | str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise EngineError(
            "an expression where a plain value was expected: write numbers out"
        ) from None


def value_of(form: Form, key: str, kind: Any = float) -> Any:
    """What a form says under a key, checked like a field of an entry with the annotation ``kind``."""
    try:
        value = checked(kind, form.get(key))
    except EntryError as error:
        raise EngineError(f"{key}: {error}") from None
    if value == ():
        raise EngineError(f"{key}: an empty list, expected numbers")
    return value


@contextmanager
def _reading(form: str, text: str) -> Iterator[None]:
    """Turns whatever a parser raises into one line."""
    if len(text) > strict_yaml.MAX_BYTES:
        raise EngineError(
            f"more than {strict_yaml.MAX_BYTES} characters: expected one engine's setting"
        )
    try:
        yield
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise EngineError(f"not {form}: {' '.join(str(error).split())}") from None


def _checked(form: Any, engine: Text = None) -> Form:
    if not isinstance(form, dict):
        raise EngineError(f"{str(form)[:40]!r}: expected an object with the engine's keys")
    known = set(releases()[engine].keys) if engine else set(form)
    if unknown := set(form) - known:
        names = ", ".join(sorted(map(str, unknown)))[:200]
        raise EngineError(f"unknown {names}: expected {', '.join(sorted(known))}")
    return form


def _unique(pairs: list[tuple[str, Any]]) -> Form:
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ValueError("a key appears twice")
    return form
