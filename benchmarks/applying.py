"""What applying costs and gives: hooks at threshold 0, speed-up against the ideal, where the time of a decision goes.

    python -m benchmarks.applying [--shape NAME] [--rounds N]

Ideal speed-up: T / (computed + skipped x rest), where ``rest`` is the share of a call that is not the block stack,
measured in the same run. diffusers' FirstBlockCache and MagCache run at equal numbers of computed steps.
"""

import time
from collections.abc import Callable
from typing import Any

import click
import torch

from benchmarks.common import alternate, peak_bytes, ratio, synchronize, table, write
from benchmarks.workloads import Shape, build, calls, chosen, generate
from calibrate.recording.recorder import Recorder
from runtime import apply_tea_cache
from runtime.watch.call import Call
from runtime.watch.distance import l1_sums

NEVER = 1e-12  # a threshold that every change exceeds: the gate measures and decides, and computes


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    model = build(shape)
    half = "".join("CS"[index % 2] for index in range(shape.steps))

    def plain() -> None:
        generate(model, shape)

    def with_cache(**settings: Any) -> Callable[[], None]:
        def run() -> None:
            with apply_tea_cache(model, num_steps=shape.steps, **settings):
                generate(model, shape)

        return run

    cases = {
        "plain": plain,
        "threshold 0": with_cache(coefficients=[1.0, 0.0], threshold=0.0),
        "every step decided, none skipped": with_cache(coefficients=[1.0, 0.0], threshold=NEVER),
        "half skipped": with_cache(schedule=half),
        "half skipped, linear": with_cache(schedule=half, forecast="linear"),
        "only the first computed": with_cache(schedule="C" + "S" * (shape.steps - 1)),
    }
    for name, config in _of_diffusers(shape, half).items():
        runner = _with_diffusers(model, shape, config)
        if runner is not None:
            cases[name] = runner
    rest = _rest(model, shape)
    seconds = alternate(cases, rounds)
    skipped = half.count("S")
    ideal = shape.steps / (shape.steps - skipped + skipped * rest)
    return {
        "shape": shape.title,
        "seconds": seconds,
        "rest_share": rest,
        "ideal_speedup": ideal,
        "over_plain": {name: ratio(seconds, name, "plain") for name in cases if name != "plain"},
        "share_of_ideal": 1 / ratio(seconds, "half skipped", "plain")["median"] / ideal,
        "peak_bytes": {name: peak_bytes(run) for name, run in cases.items()},
        "parts_ms": parts(model, shape),
    }


def _rest(model: torch.nn.Module, shape: Shape) -> float:
    """Share of a denoiser call that a skipped step still pays."""
    with Recorder({"transformer": model}) as recorder:
        recorder.start()
        generate(model, shape, steps=4)
        timing = recorder.finish().timing["transformer"]
    return 1 - timing["stack_seconds"] / timing["call_seconds"]


def _of_diffusers(shape: Shape, half: str) -> dict[str, Any]:
    """diffusers' own caches, set so that they compute as many steps as ``half`` does."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    return {
        # Above any change it skips whenever it may: the first step is computed, and the first block at every step.
        "FirstBlockCache, only the first computed": FirstBlockCacheConfig(threshold=1e9),
        "MagCache, half skipped": MagCacheConfig(
            threshold=1e9, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=len(half),
            mag_ratios=[1.0] * len(half),
        ),
    }  # fmt: skip


def _with_diffusers(model: torch.nn.Module, shape: Shape, config: Any) -> Callable[[], None] | None:
    def run() -> None:
        model.enable_cache(config)
        try:
            generate(model, shape)
        finally:
            model.disable_cache()

    try:
        run()
    except (
        Exception
    ) as refusal:  # any refusal of a class that it does not know is reported, not hidden
        click.echo(f"{type(config).__name__}: {refusal}", err=True)
        return None
    return run


@torch.inference_mode()
def parts(model: torch.nn.Module, shape: Shape, repeats: int = 30) -> dict[str, float]:
    """Milliseconds of the parts of one decision on tensors of this shape."""
    cache = apply_tea_cache(model, coefficients=[1.0, 0.0], threshold=NEVER)
    stack = cache._watch.stacks[0]
    probes: list[float] = []
    decide = stack.handler.decide

    def timed_decide(call: Call, changed: bool) -> bool:
        probe = call.probe

        def timed_probe() -> torch.Tensor:
            synchronize()
            begun = time.perf_counter()
            signal = probe()
            synchronize()
            probes.append(time.perf_counter() - begun)
            return signal

        call.probe = timed_probe
        return decide(call, changed)

    stack.handler.decide = timed_decide
    for _, _, arguments in list(calls(shape, 4)):
        model(**arguments)
    signal = next(iter(stack.trajectories.branches.values())).previous
    other = signal + 0.01
    cache.remove()
    return {
        "probe": 1000 * sorted(probes)[len(probes) // 2],
        "distance": _milliseconds(lambda: l1_sums(signal, other), repeats),
        "host synchronisation": _milliseconds(lambda: signal.new_zeros(2).tolist(), repeats),
        "denoiser call": _milliseconds(lambda: model(**next(calls(shape))[2]), 3),
    }


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    found = []
    for _ in range(repeats):
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - begun)
    return 1000 * sorted(found)[len(found) // 2]


@click.command()
@click.option("--shape", "name", help="One shape only (default: all that fit this machine).")
@click.option("--rounds", default=3, show_default=True)
def main(name: str | None, rounds: int) -> None:
    """Cost and gain of applying."""
    found = [measure(shape, rounds) for shape in chosen(name).values()]
    for case in found:
        click.echo(case["shape"])
        rows = [
            [label, figures["median"], 1 / figures["median"], figures["lowest"], figures["highest"]]
            for label, figures in case["over_plain"].items()
        ]
        click.echo(table(["case", "time/plain", "speed-up", "lowest", "highest"], rows))
        click.echo(
            f"ideal with half the steps skipped: {case['ideal_speedup']:.3f} (a skipped step costs "
            f"{case['rest_share']:.1%} of a call); reached: {case['share_of_ideal']:.1%}"
        )
        click.echo(
            table(["part", "ms"], [[part, value] for part, value in case["parts_ms"].items()])
            + "\n"
        )
    click.echo(f"{write('applying', {'cases': found})}")


if __name__ == "__main__":
    main()
