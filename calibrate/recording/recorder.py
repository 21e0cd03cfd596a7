"""``Recorder``: measures the denoisers of a pipeline while it generates."""

from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from calibrate.recording.figures import number_steps
from calibrate.recording.handler import RecordHandler, Recording
from calibrate.recording.inner_products import SolverStep, trajectory_of
from runtime.watch.hooks import Watch
from runtime.watch.scheduler import SchedulerClock, hooked_steps


class Recorder:
    """Watches the denoisers of a pipeline while it generates; a context manager.

    Args:
        modules: The denoisers by name (see :func:`runtime.denoisers`).
        pipeline: The pipeline that drives them, for its scheduler's steps and sigmas; ``None`` for a loop of your own.
        blocks: Names the block stack of a model of your own.
        gram: Keep the outputs of all steps and the latents until :meth:`finish`, for planning: at most 256 MiB on the
            device for each denoiser, the rest in the host's memory.

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
        modules: Mapping[str, Module],
        pipeline: Any = None,
        blocks: Any = None,
        gram: bool = False,
    ) -> None:
        clock = SchedulerClock(pipeline)
        self._latest: deque[RecordHandler] = deque(maxlen=1)  # whose denoiser was called last
        self._handlers = {
            expert: RecordHandler(expert, module, gram, clock, self._latest.append)
            for expert, module in modules.items()
        }
        self._installed = ExitStack()
        self._watch = Watch(modules, self._handlers.__getitem__, clock, blocks)
        self._pipeline, self._gram = pipeline, gram
        self._steps = 0
        self._end: Tensor | None = None
        self._sigmas: Any = None

    def __enter__(self) -> "Recorder":
        on_stepped = self._stepped if self._gram else None
        with ExitStack() as stack:
            stack.enter_context(self._watch.installed())
            stack.enter_context(hooked_steps(self._pipeline, None, on_stepped))
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._installed.close()
        self.start()

    def _stepped(self, scheduler: Any, prediction: Any, sample: Any, stepped: Any) -> None:
        end = (
            stepped[0]
            if isinstance(stepped, tuple)
            else getattr(stepped, "prev_sample", None)
        )
        if isinstance(prediction, Tensor):
            for handler in self._latest:
                handler.stepped(prediction, sample)
        self._end = end.detach().clone() if isinstance(end, Tensor) else None
        self._steps, self._sigmas = self._steps + 1, getattr(scheduler, "sigmas", None)

    def held_bytes(self) -> int:
        """Bytes on the device: of each live trajectory the previous step's tensors, and the outputs for planning."""
        outputs = sum(handler.held_bytes for handler in self._handlers.values())
        return outputs + sum(
            buffer.nbytes
            for stack in self._watch.stacks
            for trajectory in stack.trajectories.values()
            for buffer in trajectory.buffers.values()
        )

    def start(self) -> None:
        """Forget what was seen: the next denoiser call begins a generation."""
        self._watch.reset()
        self._steps = 0
        for handler in self._handlers.values():
            handler.discard()

    def finish(self) -> Recording:
        """The pairs of the generation since :meth:`start`, in order of expert, branch and step.

        Where several ranks run one forward together, all of them call it, and all get the whole sequence's pairs.
        """
        self._watch.reset()
        recording = Recording()
        steps: dict[int, SolverStep] = {}
        for handler in self._handlers.values():
            steps |= handler.take(recording)
        if len(steps) == self._steps:  # one prediction a step, and no step unseen
            in_order = [steps[step] for step in sorted(steps)]
            recording.trajectory = partial(trajectory_of, in_order, self._end, self._sigmas)
        number_steps(recording.rows)
        distances = ("x", "y_output", "y_hidden", "y_residual")
        recording.non_finite = sum(
            any(not abs(row[name]) < float("inf") for name in distances)
            for row in recording.rows
        )
        return recording
