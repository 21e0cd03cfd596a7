"""Offline tools: record what a model does, fit it, verify the fit, and draft a registry entry."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

try:
    __version__ = version("teacal")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.1.0"

__all__ = ["__version__", "fit", "record"]


def _function_of_submodule(name: str) -> property:
    """The function that a submodule is named after, imported on first use.

    A property, because importing ``calibrate.fit`` anywhere would make the import system bind the *module* to this
    name, and ``from calibrate import fit`` would then depend on what was imported before.
    """
    return property(
        lambda package: getattr(import_module(f"{package.__name__}.{name}"), name),
        lambda package, submodule: None,
    )


class _Package(ModuleType):
    record = _function_of_submodule("record")
    fit = _function_of_submodule("fit")


sys.modules[__name__].__class__ = _Package
