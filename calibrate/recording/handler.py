"""Measures one denoiser while it runs uncached: one row of figures per step and trajectory.

The hooks, the signals and the distances are the runtime's own, so that what is fitted is what the gate will see. A
trajectory keeps the previous step's signals, stack input, stack output and model output on the device and nothing
older; only scalars ever reach the host, all at once when the generation is over.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from calibrate.recording.figures import (
    Row,
    counted_on,
    exit_figures,
    highest,
    named,
    over_parts,
    prediction,
    stacked,
)
from calibrate.recording.inner_products import Products, SolverStep
from calibrate.runs.trajectory import Trajectory as SolverTrajectory
from coeffs.entry.signals import SIGNALS
from runtime.compat.diffusers_private import lockstep_group
from runtime.decide.tracker import Position
from runtime.watch.call import Call, Handler, Trajectory, measured
from runtime.watch.places import tensors
from runtime.watch.ranks import gathered
from runtime.watch.scheduler import SchedulerClock, timestep
from runtime.watch.wiring import Exit


@dataclass
class Recording:
    """What one generation gave.

    Attributes:
        rows: One dict per pair with the columns of a run's log, ``prompt_id`` and ``seed`` excepted.
        timing: Per expert: mean seconds of a denoiser call and of its block stack, and the number of calls.
        non_finite: Rows in which a distance is not finite (they are kept in ``rows``).
        gram: Inner products of all steps for planning, named as in :mod:`calibrate.runs.gram_log`; empty without them.
        trajectory: Makes what the solver saw, where the pipeline steps one once per step; for the rank that keeps it.
    """

    rows: list[Row] = field(default_factory=list)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    non_finite: int = 0
    gram: dict[str, Any] = field(default_factory=dict)
    trajectory: Callable[[], SolverTrajectory | None] | None = None


class Moments:
    """When one call began, reached its stack (before and after the signals were measured), left it and ended.

    On the device's own time line: CUDA events, which do not wait, or the host's clock.
    """

    def __init__(self, call: Call) -> None:
        devices = {tensor.device for _, tensor in tensors(call.named)}
        self._cuda = next((device for device in devices if device.type == "cuda"), None)
        self._marks: dict[str, Any] = {}
        self.mark("begun")

    def mark(self, name: str) -> None:
        """``name`` is now; the first time counts."""
        if self._cuda is None:
            self._marks.setdefault(name, time.perf_counter())
        elif name not in self._marks:
            event = torch.cuda.Event(enable_timing=True)
            self._marks[name] = torch.cuda.current_stream(self._cuda).record_event(event)

    def between(self, begin: str, end: str) -> float:
        """Seconds from one mark to another; waits for the device."""
        first, last = self._marks[begin], self._marks[end]
        if self._cuda is None:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000


def mean_times(timings: list[Moments]) -> dict[str, float]:
    """Mean seconds of a denoiser call, without the measurement of signals, and of its block stack."""
    stack = fmean(call.between("entered", "left") for call in timings)
    before = fmean(call.between("begun", "reached") for call in timings)
    after = fmean(call.between("left", "ended") for call in timings)
    return {
        "call_seconds": before + stack + after,
        "stack_seconds": stack,
        "calls": len(timings),
    }


class RecordHandler(Handler):
    """Measures one denoiser; never skips."""

    def __init__(
        self,
        expert: str,
        root: Module,
        gram: bool,
        clock: SchedulerClock,
        on_open: Callable[["RecordHandler"], None],
    ) -> None:
        self.expert, self.root = expert, root
        self._clock, self._on_open, self._gram = clock, on_open, gram
        self._products = Products()
        self.discard()

    @property
    def held_bytes(self) -> int:
        """Bytes of the outputs that are kept on the device for planning."""
        return self._products.held_bytes

    def discard(self) -> None:
        """Forget what was seen since the last call."""
        # Of each trajectory, in the order of their first calls, and of each branch the present one's.
        self._recorded: list[list[Row]] = []
        self._present: dict[str, list[Row]] = {}
        self._timings: list[Moments] = []
        self._several = False
        self._products.clear()

    def take(self, recording: Recording) -> dict[int, SolverStep]:
        """Add what was measured since the last call to ``recording``, and return what the solver saw.

        Ranks that run one forward together must call it together: each has measured its part of the sequence.
        """
        rows = counted_on(self._recorded)
        figures = [row.pop("figures") for row in rows]
        numbers = torch.stack(figures) if rows else torch.zeros(0)
        tokens = torch.tensor([row.pop("tokens") for row in rows])
        group = lockstep_group(self.root)
        if group is not None:
            device = next(self.root.parameters()).device
            steps = [(row["branch"], row["step"]) for row in rows]
            parts = gathered(group, numbers.to(device), steps)
            numbers = over_parts(parts, gathered(group, tokens.to(device)))

        def over_ranks(matrix: Tensor) -> Tensor:
            return matrix if group is None else gathered(group, matrix.to(device)).sum(0)

        for row, figures in zip(rows, numbers.tolist(), strict=True):
            row.update(named(figures))
            row["timestep"] = float(row["timestep"])
        recording.rows += rows
        if self._timings:
            recording.timing[self.expert] = mean_times(self._timings)
        if self._several:  # schedules in one generation: no one plan could be made of them
            self._products.clear()
        products, sigma = self._products, self._clock.sigma
        recording.gram |= products.matrices(self.expert, sigma, over_ranks)
        seen = products.solver_steps(self.expert)
        self.discard()
        return seen

    # -- what the hooks call --------------------------------------------------------------------------------------

    def begin(self, position: Position) -> None:
        self._several |= any(self._recorded)
        self._products.clear()

    def new_trajectory(self, branch: str) -> Trajectory:
        self._present[branch] = []
        self._recorded.append(self._present[branch])
        return Trajectory()

    def open(self, call: Call) -> None:
        where = self._where = call.position
        self._on_open(self)
        if self._gram:
            first = next(iter(call.named.values()))
            self._products.add_latents(where.branch, call.named.get("hidden_states", first))
        self._moments, self._row = Moments(call), Row()

    def stepped(self, prediction: Tensor, latents: Any) -> None:
        """What the scheduler received, made of this denoiser's outputs."""
        self._products.add_step(self._where.step, prediction, latents)

    def decide(self, call: Call, changed: bool) -> bool:
        self._moments.mark("reached")
        for signal in SIGNALS.values():
            value = measured(call, signal.name)
            if value is not None:
                self._compare(call, signal.column, value)
        self._moments.mark("entered")
        return False

    def reached_exit(self) -> None:
        self._moments.mark("left")

    def leave(self, call: Call, exit: Exit, value: Tensor, base: Tensor | None) -> None:
        """Measures the generated stream at its exit; other streams are not part of the figures."""
        self._moments.mark("left")
        if exit is call.wiring.exits[0]:
            self._measure_exit(call, value, base)

    def finish(self, call: Call, output: Any) -> None:
        self._moments.mark("ended")
        self._timings.append(self._moments)
        parts = [tensor for _, tensor in tensors(prediction(output))]
        value = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
        self._compare(call, "y_output", value)
        if self._gram:
            self._products.add_output(self._where.branch, self._where.step, value)
        if {"x", "y_output"} <= self._row.keys():
            self._present[self._where.branch].append(self._finished_row(call))

    # -- figures --------------------------------------------------------------------------------------------------

    def _compare(self, call: Call, name: str, value: Tensor) -> None:
        sums = call.trajectory.change(name, value)
        if sums is not None:
            self._row[name] = sums

    def _measure_exit(self, call: Call, hidden: Tensor, entry: Tensor | None) -> None:
        trajectory = call.trajectory
        before = trajectory.previous("hidden", hidden)
        if before is not None:
            entry_before = None if entry is None else trajectory.previous("entry", entry)
            self._row.update(exit_figures(hidden, entry, before, entry_before))
            self._row["tokens"] = hidden.numel() // hidden.shape[-1]
        trajectory.keep("hidden", hidden)
        if entry is not None:
            trajectory.keep("entry", entry)

    def _finished_row(self, call: Call) -> Row:
        where = self._where
        time, sigma = timestep(call.named), self._clock.sigma(where.step)
        return {
            "branch": where.branch,
            "expert": self.expert,
            "step": where.step,
            "num_steps": where.num_steps,
            "timestep": float("nan") if time is None else highest(time),
            "sigma": float("nan") if sigma is None else sigma,
            "figures": stacked(self._row),
            "tokens": self._row["tokens"],
        }
