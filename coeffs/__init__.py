"""Calibrated step-cache coefficients with their provenance.

Load, list, check, write and publish entries:

>>> import coeffs
>>> entry = coeffs.load("vllm-omni/longcat-image")
>>> entry.fit().polynomial(entry.sign_rule).predict(0.1)
0.1967943

Imports the standard library and PyYAML only.
"""

from coeffs.entry.certificates import Certificate
from coeffs.entry.polynomial import Polynomial
from coeffs.entry.provenance import Checkpoint, Counts, Protocol, Source
from coeffs.entry.schema import Candidate, Entry, Expert, Fit, Plan, Threshold
from coeffs.errors import CoeffsError
from coeffs.match import Match, find
from coeffs.release import publish
from coeffs.store import dump, entries, load, loads, save

__all__ = [
    "Candidate",
    "Certificate",
    "Checkpoint",
    "CoeffsError",
    "Counts",
    "Entry",
    "Expert",
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
