"""Eager, compiled, and both with every second step skipped, in one run."""

import copy
from typing import Any

from benchmarks.common import alternate, ratio
from benchmarks.gpu.applying import applied
from benchmarks.workloads import Workload, build, generate
from runtime import compile_blocks


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds of a generation, and their ratios to the eager one's."""
    eager = build(workload)
    # A second model on the same weights: the largest would not fit twice.
    shared = {id(parameter): parameter for parameter in eager.parameters()}
    compiled = copy.deepcopy(eager, shared)
    compile_blocks(compiled)
    half = {"schedule": ("CS" * workload.steps)[: workload.steps]}
    cases = {
        "eager": lambda: generate(eager, workload),
        "eager, half skipped": applied(eager, workload, half),
        "compiled": lambda: generate(compiled, workload),
        "compiled, half skipped": applied(compiled, workload, half),
    }
    seconds = alternate(cases, rounds)
    return {
        "seconds": seconds,
        "over_eager": {name: ratio(seconds, name, "eager") for name in cases if name != "eager"},
    }
