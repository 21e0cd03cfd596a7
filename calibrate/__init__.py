"""Offline tools: record what a model does, fit it, plan, verify the fit, and draft a registry entry.

The functions are the commands: ``record``, ``fit``, ``plan``, ``verify``, ``certify``, ``audit`` and ``report``,
imported on first use.
"""

from importlib import import_module
from typing import Any

from teacal import check_packages

_VERBS = {
    "record": "calibrate.recording.record",
    "fit": "calibrate.fitting.draft",
    "plan": "calibrate.planning.plan",
    "verify": "calibrate.verifying.verify",
    "certify": "calibrate.certifying.certify",
    "audit": "calibrate.certifying.audit",
    "report": "calibrate.reporting.report",
}

__all__ = ["__version__", "embedded_model", *_VERBS]


def embedded_model() -> str:
    """Folder of tiny-longcat-image, a trained pipeline of 3.5 MB that ships with the package."""
    from importlib.resources import files

    return str(files("calibrate") / "embedded" / "tiny-longcat-image")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("teacal")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "0.1.0"
    if name in _VERBS:
        check_packages("coeffs", "runtime")
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
