"""A denoiser small enough to record thousands of times, and a recorder with the interface of the real one.

Used where the run folder, the ranks or the kills are under test and not the measured values.
"""

import sys
import types
from dataclasses import dataclass, field

import numpy as np
import torch

EXPERT = "transformer"


class Denoiser(torch.nn.Module):
    """One matrix; what it returns depends on every call before it in the same generation."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 8, generator=generator) / 3)

    @property
    def dtype(self):
        return self.weight.dtype

    def forward(self, hidden):
        return hidden + torch.tanh(hidden @ self.weight) / 4


def generate_with(denoiser, steps=6):
    """``generate(prompt, seed)``: a toy generation of so many steps."""

    def generate(prompt, seed):
        hidden = torch.randn(
            4, 8, generator=torch.Generator().manual_seed(seed + len(prompt))
        )
        for _ in range(steps):
            hidden = denoiser(hidden)
        return hidden

    return generate


@dataclass
class Recording:
    rows: list
    timing: dict
    non_finite: int = 0
    gram: dict = field(default_factory=dict)
    trajectory: object = None


@dataclass
class Recorder:
    """Relative L1 of consecutive outputs of one module, in every column of values."""

    modules: dict
    pipeline: object = None
    blocks: object = None
    gram: bool = False
    outputs: list = field(default_factory=list)

    def __enter__(self):
        hook = lambda module, args, output: self.outputs.append(output)  # noqa: E731
        self._handle = self.modules[EXPERT].register_forward_hook(hook)
        return self

    def __exit__(self, *exc_info):
        self._handle.remove()

    def start(self):
        self.outputs.clear()

    def held_bytes(self):
        return sum(output.nbytes for output in self.outputs[-1:])

    def finish(self):
        rows = []
        for step in range(1, len(self.outputs)):
            previous, current = self.outputs[step - 1 : step + 1]
            y = float((current - previous).abs().sum() / previous.abs().sum())
            values = (
                "x",
                "x_time_embedding",
                "y_output",
                "y_hidden",
                "y_residual",
                "mag_ratio",
                "mag_ratio_std",
            )
            rows.append(
                {
                    "branch": "cond",
                    "expert": EXPERT,
                    "step": step,
                    "num_steps": len(self.outputs),
                }
                | {"timestep": 1000.0 - step, "sigma": 1.0 / step, "cos_distance": y}
                | dict.fromkeys(values, y)
            )
        finite = [
            row for row in rows if row["x"] == row["x"] and abs(row["x"]) != float("inf")
        ]
        timing = {
            EXPERT: {"call_seconds": 0.0, "stack_seconds": 0.0, "calls": len(self.outputs)}
        }
        gram = {f"{EXPERT}/output": np.eye(2)} if self.gram else {}
        return Recording(
            rows=rows, timing=timing, non_finite=len(rows) - len(finite), gram=gram
        )


def install():
    """Put the stub in the place of ``calibrate.recording.recorder`` in this process."""
    module = types.ModuleType("calibrate.recording.recorder")
    module.Recorder = Recorder
    sys.modules["calibrate.recording.recorder"] = module
