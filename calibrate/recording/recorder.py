"""Measures uncached denoising: one row of pairs per step and trajectory, written while the model runs.

The hooks, the signal and the distances are the runtime's own, so that what is fitted is what the gate will see. A
trajectory keeps the previous step's signal, stack input, stack output and model output on the device and nothing
older; only scalars ever reach the host, all at once when the generation is over.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from calibrate.recording.inner_products import Products
from runtime.watch.distance import l1_sums, pieces
from runtime.watch.hooks import Call, StackHooks, Trajectory
from runtime.watch.places import at, tensors
from runtime.watch.ranks import gathered, lockstep_group
from runtime.watch.scheduler import Locator, SchedulerClock

# Figures of one step, in the order they are stacked on the device: sums for the four distances, then the ratios.
_SUMS = ("x", "x_time_embedding", "y_output", "y_hidden", "y_residual")
_RATIOS = ("mag_ratio", "mag_ratio_std", "cos_distance")


@dataclass
class Recording:
    """What one generation gave.

    Attributes:
        rows: One dict per pair with the columns of a run's log, ``prompt_id`` and ``seed`` excepted.
        timing: Per expert: mean seconds of a denoiser call and of its block stack, and the number of calls.
        non_finite: Rows in which a distance is not finite (they are kept in ``rows``).
        gram: Inner products of all steps for planning, named as in :mod:`calibrate.runs.gram_log`; empty without them.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    non_finite: int = 0
    gram: dict[str, Any] = field(default_factory=dict)


class _Stream:
    """Previous tensors of one trajectory, in buffers that are written over, step by step."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def previous(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        kept = self._kept.get(name)
        return (
            kept
            if kept is not None and kept.shape == like.shape and kept.dtype == like.dtype
            else None
        )

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        kept = self.previous(name, tensor)
        if kept is None:
            self._kept[name] = tensor.detach().clone()
        else:
            kept.copy_(tensor)

    def clear(self) -> None:
        self._kept.clear()

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())


class _RecordedTrajectory(Trajectory):
    def __init__(self) -> None:
        self.stream = _Stream()
        self.rows: list[dict[str, Any]] = []

    def restart(self) -> None:
        super().restart()
        self.stream.clear()


class _Clock:
    """Moments on the device's own time line: CUDA events, which do not wait, or the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class _RecordHandler:
    """Measures one denoiser; never skips."""

    def __init__(self, expert: str, clock: SchedulerClock | None, gram: bool) -> None:
        self.expert, self._schedule = expert, clock
        self._products = Products() if gram else None
        self._trajectories: dict[str, _RecordedTrajectory] = {}
        self._finished: list[_RecordedTrajectory] = []
        self._several = False
        self._moments: list[tuple[_Clock, Any, Any, Any, Any]] = []

    def bind(self, hooks: StackHooks, locator: Locator) -> None:
        self._hooks, self._locator = hooks, locator

    def reset(self) -> None:
        """The next call begins a generation; what was measured is kept until it is taken."""
        self._finished += self._trajectories.values()
        for trajectory in self._trajectories.values():
            trajectory.restart()
        self._trajectories = {}
        self._locator.reset()

    def discard(self) -> None:
        """Forget what was seen since the last call."""
        self.reset()
        self._finished, self._moments, self._several = [], [], False
        if self._products is not None:
            self._products.clear()

    def gram(self) -> dict[str, Any]:
        """The inner products of the generation since the last call; ranks call it together, as :meth:`take`."""
        if self._products is None:
            return {}
        group = lockstep_group(self._hooks.root)
        device = next(self._hooks.root.parameters()).device
        summed = None if group is None else lambda matrix: gathered(group, matrix.to(device)).sum(0)
        # Of several schedules in one generation no one plan could be made.
        found = {} if self._several else self._products.matrices(self.expert, summed)
        self._products.clear()
        return found

    def take(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of all trajectories since the last call, as numbers, and the mean times.

        Ranks that run one forward together must call it together: each has measured its part of the sequence.
        """
        self.reset()
        rows = _counted_on(self._finished)
        numbers = torch.stack([row.pop("figures") for row in rows]) if rows else torch.zeros(0)
        tokens = torch.tensor([row.pop("tokens") for row in rows])
        group = lockstep_group(self._hooks.root)
        if group is not None:
            device = next(self._hooks.root.parameters()).device
            parts = gathered(
                group, numbers.to(device), [(row["branch"], row["step"]) for row in rows]
            )
            numbers = over_parts(parts, gathered(group, tokens.to(device)))
        for row, figures in zip(rows, numbers.tolist(), strict=True):
            row.update(_named(figures, row.pop("has_time_embedding")))
            row["timestep"] = float(row["timestep"])
        timing = self._timing()
        self._finished, self._moments = [], []
        return rows, timing

    @property
    def held_bytes(self) -> int:
        return sum(trajectory.stream.held_bytes for trajectory in self._trajectories.values())

    def _timing(self) -> dict[str, float]:
        if not self._moments:
            return {}
        spans = [(watch.seconds(a, d), watch.seconds(b, c)) for watch, a, b, c, d in self._moments]
        calls = len(spans)
        return {
            "call_seconds": sum(whole for whole, _ in spans) / calls,
            "stack_seconds": sum(stack for _, stack in spans) / calls,
            "calls": calls,
        }

    # -- what the hooks call --------------------------------------------------------------------------------------

    def start(self, args: tuple, kwargs: dict) -> _RecordedTrajectory:
        self._position = position = self._locator.locate(args, kwargs)
        if position.new_generation:
            self._several |= any(
                trajectory.rows for trajectory in (*self._finished, *self._trajectories.values())
            )
            self._finished += self._trajectories.values()
            self._trajectories = {}
            if self._products is not None:
                self._products.clear()
        if self._products is not None:
            self._products.add_latents(
                position.branch, position.step, kwargs.get("hidden_states", *args[:1])
            )
        trajectory = self._trajectories.setdefault(position.branch, _RecordedTrajectory())
        if not position.consecutive:
            trajectory.restart()
        devices = {tensor.device for _, tensor in tensors((args, kwargs))}
        self._watch = _Clock(
            next((one for one in devices if one.type == "cuda"), next(iter(devices)))
        )
        self._begun, self._row = self._watch.now(), {}
        self._left: Any = None
        return trajectory

    def decide(self, call: Call, probe: Any, changed: bool) -> bool:
        self._entered = self._watch.now()
        return False

    def watches_signal(self, call: Call) -> bool:
        return True

    def signal(self, call: Call, value: torch.Tensor) -> None:
        self._compare(call, "x", value)

    def leave(
        self, call: Call, index: int, value: torch.Tensor, base: torch.Tensor | None
    ) -> dict | None:
        """Measures the generated stream at its exit; other streams are not part of the figures."""
        if self._left is None:
            self._left = self._watch.now()
        if call.observation is not None:
            # Which exit is the primary one is known only after the forward, and there is nothing to compare with yet.
            return {"hidden": value.clone(), "entry": base}
        if index == 0:
            self._measure_exit(call, value, base)
        return None

    def keep(self, call: Call, results: list[dict | None]) -> None:
        if results[0] is not None:
            self._measure_exit(call, results[0]["hidden"], results[0]["entry"])

    def enter(self, call: Call, index: int, base: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError("the recorder never skips")

    def finish(self, call: Call, output: Any) -> None:
        self._moments.append(
            (self._watch, self._begun, self._entered, self._left, self._watch.now())
        )
        place = self._hooks.time_embedding
        embedding = None if place is None else at(place, *call.head)
        if embedding is not None:
            self._compare(call, "x_time_embedding", embedding)
        parts = [tensor for _, tensor in tensors(prediction(output))]
        whole = parts[0] if len(parts) == 1 else torch.cat([p.flatten() for p in parts])
        self._compare(call, "y_output", whole)
        if self._products is not None:
            self._products.add_output(self._position.branch, self._position.step, whole)
            if self._schedule is not None:
                for step in (self._position.step, self._position.step + 1):
                    self._products.add_sigma(step, self._schedule.sigma(step))
        if "x" in self._row and "y_output" in self._row:
            self._add_row(call)

    # -- figures --------------------------------------------------------------------------------------------------

    def _compare(self, call: Call, name: str, value: torch.Tensor) -> None:
        stream = call.trajectory.stream
        before = stream.previous(name, value)
        if before is not None:
            self._row[name] = l1_sums(value, before)
        stream.keep(name, value)

    def _measure_exit(self, call: Call, hidden: torch.Tensor, entry: torch.Tensor | None) -> None:
        stream = call.trajectory.stream
        before = stream.previous("hidden", hidden)
        if before is not None:
            entry_before = None if entry is None else stream.previous("entry", entry)
            self._row.update(exit_figures(hidden, entry, before, entry_before))
            self._row["tokens"] = hidden.numel() // hidden.shape[-1]
        stream.keep("hidden", hidden)
        if entry is not None:
            stream.keep("entry", entry)
        if self._products is not None:
            self._products.add_residual(self._position.branch, self._position.step, hidden, entry)

    def _add_row(self, call: Call) -> None:
        position, row = self._position, self._row
        zero = torch.zeros(2, device=row["x"].device)
        timestep = self._locator.timestep(call.args, call.kwargs)
        sigma = None if self._schedule is None else self._schedule.sigma(position.step)
        figures = torch.cat([row.get(name, zero) for name in _SUMS] + [row["ratios"]])
        call.trajectory.rows.append(
            {
                "branch": position.branch,
                "expert": self.expert,
                "step": position.step,
                "num_steps": position.num_steps,
                "timestep": float("nan") if timestep is None else _highest(timestep),
                "sigma": float("nan") if sigma is None else sigma,
                "has_time_embedding": "x_time_embedding" in row,
                "figures": figures,
                "tokens": row["tokens"],
            }
        )


def _counted_on(trajectories: list[_RecordedTrajectory]) -> list[dict[str, Any]]:
    """All rows; where a pipeline ran several schedules (chunks, stages), a branch's steps are counted on.

    Between two schedules there is no pair, as there is none at the first step.
    """
    rows, taken = [], {}
    for trajectory in trajectories:
        if not trajectory.rows:
            continue
        branch = trajectory.rows[0]["branch"]
        offset = taken.get(branch, 0)
        rows += [row | {"step": row["step"] + offset} for row in trajectory.rows]
        taken[branch] = offset + max(row["num_steps"] or row["step"] + 1 for row in trajectory.rows)
    return rows


def exit_figures(
    hidden: torch.Tensor,
    entry: torch.Tensor | None,
    hidden_before: torch.Tensor,
    entry_before: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Distances of the stack's output and residual, and MagCache's ratios, from one reading of each tensor.

    Args:
        hidden, hidden_before: The stack's output at this step and the previous, shape (..., dim).
        entry, entry_before: Its input; ``None`` where the output has no counterpart there (the residual is then the
            output itself).

    Returns:
        ``y_hidden`` and ``y_residual`` as sums (see :func:`runtime.watch.distance.l1_sums`), shape
        (2,), and ``ratios``,
        shape (3,): mean and standard deviation over tokens of ``|r_t| / |r_(t-1)|`` (L2 over dim; MagCache, arXiv
        2506.09045), and the mean cosine distance of ``r_t`` and ``r_(t-1)``. Residuals are formed in float32.
    """
    rows = [
        t.reshape(-1, t.shape[-1])
        for t in (hidden, hidden_before, entry, entry_before)
        if t is not None
    ]
    y_hidden = torch.zeros(2, device=hidden.device)
    y_residual = torch.zeros(2, device=hidden.device)
    ratios, cosines = [], []
    for part in token_pieces(*rows):
        now, before = part[0].float(), part[1].float()
        y_hidden += torch.stack([(now - before).abs_().sum(), before.abs().sum()])
        if len(part) == 4:
            now, before = now - part[2].float(), before - part[3].float()
        y_residual += torch.stack([(now - before).abs_().sum(), before.abs().sum()])
        norm, norm_before = now.norm(dim=-1), before.norm(dim=-1)
        ratios.append(norm / (norm_before + 1e-8))
        cosines.append((now * before).sum(-1) / (norm * norm_before).clamp_min(1e-12))
    ratio, cosine = torch.cat(ratios), torch.cat(cosines)
    std, mean = torch.std_mean(ratio, correction=0)
    return {
        "y_hidden": y_hidden,
        "y_residual": y_residual,
        "ratios": torch.stack([mean, std, 1 - cosine.mean()]),
    }


def over_parts(parts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The figures of whole tensors from those of their parts.

    Sums are added. What every part holds entire (the gathered output, an embedding of the time) is then counted
    several times over in the numerator and in the denominator, so that the ratio stays what it was.

    Args:
        parts: Figures of each part, shape (parts, rows, figures).
        tokens: Number of tokens that each part has, shape (parts, rows).

    Returns:
        Shape (rows, figures), float64, on the host.
    """
    parts, tokens = parts.cpu().double(), tokens.cpu().double()
    if parts.ndim < 3:  # no rows
        return parts.sum(0)
    weights = tokens / tokens.sum(0)
    mean, std, cosine = parts[..., 2 * len(_SUMS) :].unbind(-1)
    whole = (weights * mean).sum(0)
    variance = (weights * (std**2 + (mean - whole) ** 2)).sum(0)
    return torch.cat(
        [
            parts[..., : 2 * len(_SUMS)].sum(0),
            torch.stack([whole, variance.sqrt(), (weights * cosine).sum(0)], dim=-1),
        ],
        dim=-1,
    )


def token_pieces(*rows: torch.Tensor) -> Any:
    """Matching pieces of (tokens, dim) tensors that never split a token."""
    return pieces(*rows) if rows[0].shape[0] >= rows[0].shape[1] else iter([rows])


def _named(figures: list[float], has_time_embedding: bool) -> dict[str, float]:
    row = {}
    for index, name in enumerate(_SUMS):
        numerator, denominator = figures[2 * index : 2 * index + 2]
        row[name] = numerator / denominator if denominator > 0 else float("nan")
    if not has_time_embedding:
        row["x_time_embedding"] = float("nan")
    row.update(zip(_RATIOS, figures[2 * len(_SUMS) :], strict=True))
    return row


def prediction(output: Any) -> Any:
    """The denoiser's prediction in what its forward returned: the first field of an output class, or of a tuple."""
    if isinstance(output, dict):
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def _highest(timestep: Any) -> Any:
    if isinstance(timestep, list | tuple):
        return max(float(torch.as_tensor(item).float().max()) for item in timestep)
    return timestep.float().max() if isinstance(timestep, torch.Tensor) else float(timestep)


class Recorder:
    """Watches the denoisers of a pipeline while it generates; a context manager.

    Args:
        modules: The denoisers by name (see :func:`runtime.denoisers`).
        pipeline: The pipeline that drives them, for its scheduler's steps and sigmas; ``None`` for a loop of your own.
        blocks: Names the block stack of a model of your own.
        gram: Keep outputs and residuals of all steps until :meth:`finish` and multiply them there, for planning; see
            :mod:`calibrate.recording.inner_products` for what that may hold on the device (320 MiB for
            each denoiser at most).

    Raises:
        runtime.UnsupportedModel: A denoiser whose stack or attention cannot be found.

    Example::

        with Recorder(denoisers(pipe), pipe) as recorder:
            recorder.start()
            pipe("a cup of coffee")
            rows = recorder.finish().rows
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        pipeline: Any = None,
        blocks: Any = None,
        gram: bool = False,
    ) -> None:
        clock = None if pipeline is None else SchedulerClock(pipeline)
        self._parts: list[tuple[StackHooks, _RecordHandler]] = []
        for expert, module in modules.items():
            handler = _RecordHandler(expert, clock, gram)
            hooks = StackHooks(module, handler, blocks, on_reset=handler.reset)
            handler.bind(hooks, Locator(module, hooks.receiver, clock))
            self._parts.append((hooks, handler))

    def __enter__(self) -> "Recorder":
        try:
            for hooks, _ in self._parts:
                hooks.install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for hooks, handler in self._parts:
            hooks.remove()
            handler.discard()

    def held_bytes(self) -> int:
        """Bytes of the tensors that are kept from the previous step, over all live trajectories."""
        return sum(handler.held_bytes for _, handler in self._parts)

    def start(self) -> None:
        """Forget what was seen: the next denoiser call begins a generation."""
        for _, handler in self._parts:
            handler.discard()

    def finish(self) -> Recording:
        """The pairs of the generation since :meth:`start`, in order of expert, branch and step.

        Where several ranks run one forward together, all of them call it, and all get the whole sequence's pairs.
        """
        recording = Recording()
        for _, handler in self._parts:
            rows, timing = handler.take()
            recording.rows += rows
            recording.gram |= handler.gram()
            if timing:
                recording.timing[handler.expert] = timing
        _number_steps(recording.rows)
        distances = ("x", "y_output", "y_hidden", "y_residual")
        recording.non_finite = sum(
            any(not abs(row[name]) < float("inf") for name in distances) for row in recording.rows
        )
        return recording


def _number_steps(rows: list[dict[str, Any]]) -> None:
    """Where no scheduler says how long the schedule is, it is as long as what was seen."""
    longest: dict[str, int] = {}
    for row in rows:
        longest[row["expert"]] = max(longest.get(row["expert"], 0), row["step"] + 1)
    for row in rows:
        if row["num_steps"] is None:
            row["num_steps"] = longest[row["expert"]]
