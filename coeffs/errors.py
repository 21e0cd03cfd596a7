"""Errors of the registry: one line each, saying what was found, what was expected and what to do next."""


class CoeffsError(Exception):
    """Base of every expected error of ``coeffs``; ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class InvalidPolynomial(CoeffsError, ValueError):
    """Coefficients, a domain or a sign rule that cannot be used."""


class EntryError(CoeffsError, ValueError):
    """A document that is not a valid entry: says the file and line, the key, what was found and what was expected.

    Args:
        problem: Found, expected, next step; one line.
        path: Keys and list positions from the document's root to the value.
        file: Name of the file, ``None`` for text without one.
        line: Line of the value, counted from 1.
    """

    def __init__(
        self,
        problem: str,
        path: tuple[str | int, ...] = (),
        file: str | None = None,
        line: int | None = None,
    ):
        super().__init__(problem)
        self.problem, self.path, self.file, self.line = problem, tuple(path), file, line

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        key = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path
        ).lstrip(".")
        text = ": ".join(part for part in (place, key, self.problem) if part)
        return "".join(character if character.isprintable() else " " for character in text)

    def under(self, *path: str | int) -> "EntryError":
        """The same error seen from further out."""
        return type(self)(self.problem, (*path, *self.path), self.file, self.line)


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
    """A draft that may not be published, or a registry folder that cannot be written."""

    exit_code = 1
