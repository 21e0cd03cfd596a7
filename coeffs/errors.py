"""Errors of the registry, one line each: what is there, what is expected, what to do next."""

import difflib
from collections.abc import Iterable


class CoeffsError(Exception):
    """Base of every expected error of ``coeffs``; the command line returns ``exit_code``."""

    exit_code = 2


class EntryError(CoeffsError, ValueError):
    """A document that is not a valid entry.

    Args:
        problem: What is there, what is expected, what to do next; one line.
        path: Keys and list positions from the document's root to the value.
        file: Name of the file, ``None`` for text without one.
        line: Line of the value, counted from 1.
    """

    def __init__(
        self,
        problem: str,
        *path: str | int,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path
        self.file = file
        self.line = line

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        key = ""
        for part in self.path:
            key += f"[{part}]" if isinstance(part, int) else f".{part}"
        text = ": ".join(filter(None, (place, key.lstrip("."), self.problem)))
        return "".join(character if character.isprintable() else " " for character in text)


class EntryNotFound(CoeffsError, LookupError):
    """No entry of that name, version or path in any layer of the registry."""


class AmbiguousEntry(CoeffsError, LookupError):
    """Several entries answer to the name, or only one that was copied from another model."""


class EntryMismatch(CoeffsError, ValueError):
    """A pipeline that the entry was not measured on (only with ``strict=True``)."""


class EngineError(CoeffsError, ValueError):
    """What an engine's form cannot express, or a form that is not the engine's."""


class CheckFailed(CoeffsError):
    """Files of a registry that are not as they were released, or an entry with problems."""

    exit_code = 1


class PublishError(CoeffsError):
    """An entry that may not be published."""

    exit_code = 1


class WriteError(PublishError):
    """A file or folder that cannot be written; nothing was changed."""

    exit_code = 2


def did_you_mean(
    name: str, known: Iterable[str], *, most: int = 3, closeness: float = 0.6
) -> str:
    """``did you mean A or B?``, whatever the case; empty where nothing known is close."""
    spelled = {text.lower(): text for text in known}
    close = difflib.get_close_matches(name.lower(), spelled, most, closeness)
    return f"did you mean {' or '.join(spelled[text] for text in close)}?" if close else ""
