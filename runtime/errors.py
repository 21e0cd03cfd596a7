"""Errors of the runtime: one line each, saying what was found, what was expected and what to do next."""


class RuntimeCacheError(Exception):
    """Base of every expected error of ``runtime``; ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class InvalidSetting(RuntimeCacheError, ValueError):
    """A threshold, window, cap or schedule that cannot be used."""


class ApplyError(RuntimeCacheError):
    """The cache cannot be installed on this model; the model is left as it was."""


class UnsupportedModel(ApplyError):
    """No block stack, no attention in its first block, or an exit that cannot be overridden."""


class WiringError(RuntimeCacheError):
    """The model ran differently from the way it was observed to run; nothing wrong was returned."""
