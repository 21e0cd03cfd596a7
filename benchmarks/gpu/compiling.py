"""Eager, compiled, and both with every second step skipped, in one run."""

from typing import Any

from benchmarks.common import alternate, ratio
from benchmarks.gpu.applying import applied
from benchmarks.workloads import TimedLoop, Workload
from runtime import compile_blocks


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds of a generation, and their ratios to the eager one's."""
    eager = TimedLoop(workload)
    compiled = eager.sharing()
    compile_blocks(compiled.model)
    half = {"schedule": ("CS" * workload.steps)[: workload.steps]}
    cases = {
        "eager": eager.generate,
        "eager, half skipped": applied(eager, half),
        "compiled": compiled.generate,
        "compiled, half skipped": applied(compiled, half),
    }
    seconds = alternate(cases, rounds)
    return {
        "seconds": seconds,
        "over_eager": {
            name: ratio(seconds, name, "eager") for name in cases if name != "eager"
        },
    }
