"""Calibrated step-cache coefficients with their provenance.

Load, list, check, write and publish entries:

>>> import coeffs
>>> entry = coeffs.load("vllm-omni/longcat-image")
>>> entry.fit().polynomial(entry.sign_rule).predict(0.1)
0.1967943

Imports the standard library and PyYAML only.
"""

from importlib import import_module

from coeffs.entry.polynomial import Polynomial
from coeffs.entry.provenance import Checkpoint, Counts, Protocol, Source
from coeffs.entry.schema import Candidate, Entry, Expert, Fit, Plan, Threshold
from coeffs.errors import CoeffsError
from coeffs.store import dump, entries, load, loads, save

# What only matters once a pipeline is loaded or an entry released is imported when it is asked for.
_ON_DEMAND = {"Facts": "match", "Match": "match", "find": "match", "publish": "release"}

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
        return getattr(import_module(f"coeffs.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module 'coeffs' has no attribute {name!r}")
