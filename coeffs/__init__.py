"""Calibrated step-cache coefficients with their provenance: load, list, check, write and publish entries.

>>> import coeffs
>>> entry = coeffs.load("vllm-omni/longcat-image")
>>> entry.fit().polynomial(entry.sign_rule).predict(0.1)
0.1967943

Imports the standard library and PyYAML only.
"""

from coeffs.errors import CoeffsError
from coeffs.polynomial import Polynomial
from coeffs.schema import Candidate, Checkpoint, Counts, Entry, Expert, Fit, Plan, Protocol, Source, Threshold
from coeffs.store import dump, entries, load, loads, publish, save

_ON_DEMAND = ("Facts", "Match", "find")  # matching is only needed once a pipeline is loaded

__all__ = [
    "Candidate",
    "Checkpoint",
    "CoeffsError",
    "Counts",
    "Entry",
    "Expert",
    "Facts",
    "Fit",
    "Match",
    "Plan",
    "Polynomial",
    "Protocol",
    "Source",
    "Threshold",
    "dump",
    "entries",
    "find",
    "load",
    "loads",
    "publish",
    "save",
]


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        from coeffs import match

        return getattr(match, name)
    raise AttributeError(f"module 'coeffs' has no attribute {name!r}")
