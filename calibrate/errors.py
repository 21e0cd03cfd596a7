"""Expected errors of the offline tools."""

from coeffs.errors import CoeffsError
from runtime.errors import RuntimeCacheError


class CalibrateError(Exception):
    """Base of every expected error of `calibrate`: one line with what was found, expected and the next step."""

    exit_code = 2


class InvalidOption(CalibrateError, ValueError):
    """An option, or a combination of options, that cannot be used."""


class ModelNotFound(CalibrateError):
    """A model name that is neither embedded, a folder, cached nor reachable."""


class InvalidCheckpoint(CalibrateError):
    """A folder that is no diffusers checkpoint, or one that this version of diffusers cannot load."""


class UnsafeCheckpoint(InvalidCheckpoint):
    """A checkpoint that could run code: pickled weights, or Python files named by its configuration."""


class InvalidPrompts(CalibrateError, ValueError):
    """A prompt file or image that cannot be used; names the file and the line."""


class RunFolderError(CalibrateError):
    """A run folder that cannot be read or written."""


class ProtocolMismatch(RunFolderError):
    """The run folder belongs to another model, protocol or prompt set."""


class RunInUse(RunFolderError):
    """Another live process is recording into the run folder."""


class CorruptShard(RunFolderError):
    """A file of pairs that is truncated or damaged."""


class Incomplete(CalibrateError):
    """Some prompts are not recorded yet; running the same command again continues."""

    exit_code = 3


# They say what to do about the model, the entry or the run, and would be the same for every prompt.
EXPECTED = (CalibrateError, CoeffsError, RuntimeCacheError)


def one_line(error: BaseException) -> str:
    """An exception's text on one line, without the advice that libraries append."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."
