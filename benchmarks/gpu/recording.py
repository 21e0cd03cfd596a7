"""What recording costs: time and memory against the plain denoiser and against the way of the public estimators.

The estimators copy the modulated input and the stack's output of every call to the host in float32 and compute the
distances when the generation is over (vLLM-Omni's coefficient_estimator.py, read at ad0db31). Their way is restated
here on the same places, so that only the bookkeeping differs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.common import alternate, peak_bytes, ratio
from benchmarks.workloads import TimedLoop, Workload
from calibrate.recording.recorder import Recorder


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of a generation: plain, recorded, recorded for planning, and the estimators' way."""
    loop = TimedLoop(workload)
    held: dict[str, int] = {}

    def recorded(gram: bool) -> Callable[[], None]:
        def run() -> None:
            with Recorder(loop.modules, loop, gram=gram) as recorder:
                recorder.start()
                loop.generate()
                held["recorder"] = recorder.held_bytes()
                assert recorder.finish().rows

        return run

    def estimated() -> None:
        with Estimator(loop.model) as estimator:
            loop.generate()
            held["estimator, on the host"] = estimator.held_bytes
            assert estimator.pairs()

    cases = {
        "plain": loop.generate,
        "record": recorded(gram=False),
        "record --gram": recorded(gram=True),
        "estimators' way": estimated,
    }
    seconds = alternate(cases, rounds)
    return {
        "seconds": seconds,
        "over_plain": {
            name: ratio(seconds, name, "plain") for name in cases if name != "plain"
        },
        "peak_bytes": {name: peak_bytes(run) for name, run in cases.items()},
        "held_tensors_per_trajectory": held["recorder"]
        / workload.hidden_bytes
        / workload.branches,
        "estimator_host_bytes": held["estimator, on the host"],
    }


class Estimator:
    """Whole activations to the host, distances afterwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
        self._attention = blocks[0].attn1 if hasattr(blocks[0], "attn1") else blocks[0].attn
        self._exit = model.norm_out
        self.signals: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []

    def __enter__(self) -> "Estimator":
        self._handles = [
            self._attention.register_forward_pre_hook(
                _copy_to(self.signals), with_kwargs=True
            ),
            self._exit.register_forward_pre_hook(_copy_to(self.outputs), with_kwargs=True),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def pairs(self) -> list[tuple[float, float]]:
        """The distances of consecutive calls: of the signal and of the output."""
        return list(zip(_distances(self.signals), _distances(self.outputs), strict=True))

    @property
    def held_bytes(self) -> int:
        return sum(array.nbytes for array in self.signals + self.outputs)


def _copy_to(kept: list[np.ndarray]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        kept.append(hidden.float().cpu().numpy())

    return hook


def _distances(kept: list[np.ndarray]) -> list[float]:
    return [
        float(np.abs(now - before).sum() / (np.abs(before).sum() + 1e-6))
        for before, now in pairwise(kept)
    ]
