"""What applying costs and gives: hooks, probe, decision, host waits, speed-up against the ideal, diffusers' caches.

The ideal is ``T / (computed + skipped x rest)``, where ``rest`` is the share of a call that is not the block stack,
measured in the same run.
"""

import statistics
from collections.abc import Callable
from typing import Any

import click
from torch.overrides import TorchFunctionMode

from benchmarks.common import alternate, peak_bytes, ratio
from benchmarks.workloads import TimedLoop, Workload
from calibrate.recording.recorder import Recorder
from runtime import apply_tea_cache

NEVER = 1e-12  # a threshold that every change exceeds: the gate measures and decides, and computes
# Predicts a change of 1 for every step, so that at this threshold every second step is computed.
EVERY_SECOND = {"coefficients": [1.0], "threshold": 1.5}


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds of a generation under every setting, in turn, and what follows from them."""
    loop = TimedLoop(workload)
    settings = _settings(workload.steps)
    cases: dict[str, Callable[[], Any]] = {"plain": loop.generate}
    for name, options in settings.items():
        cases[name] = applied(loop, options)
    cases |= _diffusers_caches(loop)
    seconds = alternate(cases, rounds)
    rest = rest_share(loop)
    half = settings["half skipped, plan"]["schedule"]
    ideal = workload.steps / (half.count("C") + half.count("S") * rest)
    return {
        "seconds": seconds,
        "over_plain": {
            name: ratio(seconds, name, "plain") for name in cases if name != "plain"
        },
        "rest_share": rest,
        "ideal_speedup": ideal,
        "share_of_ideal": {
            name: 1 / ratio(seconds, name, "plain")["median"] / ideal
            for name in cases
            if name.startswith("half skipped")
        },
        "milliseconds_a_call": _parts(seconds, workload),
        "host_waits": {
            name: host_waits(cases[name]) - host_waits(cases["plain"]) for name in settings
        },
        "peak_bytes": {name: peak_bytes(run) for name, run in cases.items()},
    }


def _settings(steps: int) -> dict[str, dict[str, Any]]:
    half = ("CS" * steps)[:steps]
    return {
        "threshold 0": {"coefficients": [1.0, 0.0], "threshold": 0.0},
        "every step decided, none skipped": {
            "coefficients": [1.0, 0.0],
            "threshold": NEVER,
        },
        "half skipped, gate": EVERY_SECOND,
        "half skipped, plan": {"schedule": half},
        "half skipped, plan with linear forecast": {"schedule": half, "forecast": "linear"},
        "half skipped, guided plan": {
            "schedule": half,
            "forecast": "linear",
            "forecast_of": "guided",
        },
        "only the first computed": {"schedule": "C" + "S" * (steps - 1)},
    }


def applied(loop: TimedLoop, options: dict[str, Any]) -> Callable[[], None]:
    """A generation under a setting."""

    def run() -> None:
        with apply_tea_cache(loop, **options):
            loop.generate()

    return run


def _diffusers_caches(loop: TimedLoop) -> dict[str, Callable[[], None]]:
    """diffusers' own caches at as many computed steps; without those that refuse the class."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    steps = loop.workload.steps
    configs = {
        # Above any change it skips whenever it may: it computes the first step, and the first block at every step.
        "FirstBlockCache, only the first computed": FirstBlockCacheConfig(threshold=1e9),
        "MagCache, half skipped": MagCacheConfig(
            threshold=1e9,
            max_skip_steps=1,
            retention_ratio=0.0,
            num_inference_steps=steps,
            mag_ratios=[1.0] * steps,
        ),
    }
    cases = {}
    for name, config in configs.items():
        run = _with_diffusers(loop, config)
        try:
            run()
        except Exception as refusal:  # a class it was not written for may raise anything
            click.echo(f"{name}: {' '.join(str(refusal).split())[:200]}", err=True)
        else:
            cases[name] = run
    return cases


def _with_diffusers(loop: TimedLoop, config: Any) -> Callable[[], None]:
    def run() -> None:
        loop.model.enable_cache(config)
        try:
            loop.generate()
        finally:
            loop.model.disable_cache()

    return run


def rest_share(loop: TimedLoop) -> float:
    """Share of a denoiser call that a skipped step still pays."""
    with Recorder(loop.modules, loop) as recorder:
        recorder.start()
        loop.generate(steps=4)
        timing = recorder.finish().timing["transformer"]
    return 1 - timing["stack_seconds"] / timing["call_seconds"]


def _parts(seconds: dict[str, list[float]], workload: Workload) -> dict[str, float]:
    """Milliseconds that hooks alone, and probe with decision, add to a call: differences within a round, median."""

    def added(name: str, to: str) -> float:
        pairs = zip(seconds[name], seconds[to], strict=True)
        return statistics.median(1000 * (slow - fast) for slow, fast in pairs) / calls

    calls = workload.steps * workload.branches
    return {
        "denoiser call": 1000 * statistics.median(seconds["plain"]) / calls,
        "hooks": added("threshold 0", "plain"),
        "probe and decision": added("every step decided, none skipped", "threshold 0"),
    }


class _Reads(TorchFunctionMode):
    """Counts what brings a tensor's values to the host, each of which waits for a GPU."""

    names = frozenset({"tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.names
        return function(*args, **(kwargs or {}))


def host_waits(run: Callable[[], Any]) -> int:
    """How often the host reads a tensor while ``run`` runs."""
    with _Reads() as reads:
        run()
    return reads.count
