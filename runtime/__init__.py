"""Applies calibrated step caching at inference. Importing this package alone does not import torch.

from runtime import apply_tea_cache

with apply_tea_cache(pipe, "tiny-longcat-image", threshold=0.2) as cache:
    image = pipe("a handwritten digit seven").images[0]
print(cache.stats)
"""

from typing import Any

from teacal import check_packages

check_packages("coeffs")  # before any module of ours imports it

from runtime.decide.forecast import Forecast
from runtime.decide.gate import Decision, FixedSchedule, Gate, GateConfig
from runtime.errors import (
    ApplyError,
    InvalidSetting,
    RuntimeCacheError,
    UnsupportedModel,
    WiringError,
)
from runtime.stats import Stats

_NEEDS_TORCH = {
    "OwnLoop": "runtime.watch.scheduler",
    "TeaCache": "runtime.apply",
    "apply_tea_cache": "runtime.apply",
    "compile_blocks": "runtime.compile",
    "denoisers": "runtime.apply",
    "plan_scheduler": "runtime.anchors",
    "rel_l1": "runtime.watch.distance",
}

__all__ = [
    "ApplyError",
    "Decision",
    "FixedSchedule",
    "Forecast",
    "Gate",
    "GateConfig",
    "InvalidSetting",
    "RuntimeCacheError",
    "Stats",
    "UnsupportedModel",
    "WiringError",
    *sorted(_NEEDS_TORCH),
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        from importlib import import_module

        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEEDS_TORCH})
