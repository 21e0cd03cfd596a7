"""Which trajectory a denoiser call belongs to. Pure: no tensors, so every rule is tested with plain numbers.

A trajectory is one CFG branch of one generation of one denoiser. About a third of diffusers' pipelines name the branch
through ``cache_context``; the others just call the denoiser several times per step. What is known without waiting for
the device decides first: the context's name, the scheduler's own step counter, the identity of the conditioning
tensors. Only where no scheduler is in view is the timestep read.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

# More calls than this within one scheduler step are no CFG branches: the scheduler in view drives something else.
MOST_BRANCHES = 8


@dataclass(frozen=True, kw_only=True)
class CallInfo:
    """What is known about one denoiser call before it runs.

    Attributes:
        context: Name set by the pipeline through ``cache_context``, if any.
        schedule: Identity of the schedule in force (a new one per generation); ``None`` without a pipeline.
        step_index: 0-based index of the scheduler's step; ``None`` where the scheduler keeps none.
        num_steps: Length of the schedule, if known.
        timestep: Reads ``(lowest, highest)`` of the timestep; called only where needed, since on a GPU it waits.
        conditioning: Identities of the call's conditioning tensors (prompt embeddings and the like).
    """

    context: str | None = None
    schedule: Hashable | None = None
    step_index: int | None = None
    num_steps: int | None = None
    timestep: Callable[[], tuple[float, float] | None] = lambda: None
    conditioning: frozenset = frozenset()


@dataclass(frozen=True)
class Position:
    """Where a call stands.

    Attributes:
        branch: Name of the CFG branch: the context's, or ``branch0``, ``branch1``, ... in order of their first call.
        step: 0-based denoising step within the schedule.
        num_steps: Length of the schedule, if known.
        new_generation: Whether everything remembered belongs to an earlier generation.
        consecutive: Whether this branch was also called at the previous step, so that the two may be compared.
        schedule: Identity of the schedule that the step is one of; ``None`` where none is in view.
    """

    branch: str
    step: int
    num_steps: int | None
    new_generation: bool
    consecutive: bool
    schedule: Hashable | None = None


class _Branch:
    def __init__(self, name: str, ordinal: int, conditioning: frozenset) -> None:
        self.name = name
        self.ordinal = ordinal
        self.seen = self.constant = conditioning
        self.calls = 1

    def accepts(self, conditioning: frozenset) -> bool:
        """Whether all that stayed the same in this branch so far is there again (one call alone proves nothing)."""
        return self.calls < 2 or self.constant <= conditioning

    def visit(self, ordinal: int, conditioning: frozenset) -> None:
        self.constant &= conditioning
        self.seen, self.ordinal, self.calls = conditioning, ordinal, self.calls + 1


class Tracker:
    """Follows the calls of one denoiser: :meth:`locate` once per call, in order."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next call begins a generation."""
        self._branches: list[_Branch] = []
        self._ordinal = -1
        self._schedule: Hashable | None = None
        self._index: int | None = None
        self._stuck: Hashable | None = None
        self._time: tuple[float, float] | None = None
        self._rises: bool | None = None

    def locate(self, info: CallInfo) -> Position:
        """The trajectory and the step of this call."""
        index = info.step_index
        if index is not None and self._is_stuck(info, index):
            index = None
        by_clock = index is not None
        event = self._time_event(info) if index is None else self._clock_event(info, index)
        if event == "generation":
            stuck = self._stuck
            self.reset()
            self._stuck = None if by_clock else stuck
        if event != "branch":
            self._ordinal += 1
        self._schedule, self._index = info.schedule, index
        if not by_clock:
            self._remember_time(info)
        branch, consecutive = self._visit(info)
        return Position(
            branch=branch.name,
            step=self._ordinal if index is None else index,
            num_steps=info.num_steps,
            new_generation=event == "generation",
            consecutive=consecutive,
            schedule=None if self._stuck is not None else info.schedule,
        )

    # -- does a new step or a new generation begin with this call? ------------------------------------------------

    def _is_stuck(self, info: CallInfo, index: int) -> bool:
        """Whether the scheduler in view stands still while the denoiser is driven by another one (a shared model)."""
        now = (info.schedule, index)
        if self._stuck is not None and self._stuck != now:
            self._stuck = None  # it moves again: it drives
            self._branches = []
        if info.num_steps is not None and index >= info.num_steps and self._stuck is None:
            self._stuck, self._branches = now, []  # it is through with its schedule
        if self._stuck is None and self._branches and (self._schedule, self._index) == now:
            used = [branch.name for branch in self._branches if branch.ordinal == self._ordinal]
            if info.context in used or len(used) >= MOST_BRANCHES:
                self._stuck, self._branches = now, []
        return self._stuck is not None

    def _clock_event(self, info: CallInfo, index: int) -> str:
        if not self._branches or info.schedule != self._schedule or self._index is None:
            return "generation"
        if index < self._index:
            return "generation"
        return "step" if index > self._index else "branch"

    def _time_event(self, info: CallInfo) -> str:
        time = info.timestep()
        if not self._branches or info.schedule != self._schedule or self._index is not None:
            return "generation"
        if time is None or time == self._time:
            silent = time is None and info.context is None and not info.conditioning
            return "step" if silent or self._evaluated_again(info) else "branch"
        rises = sum(time) > sum(self._time) if self._time is not None else None
        if self._rises is not None and rises is not None and rises != self._rises:
            return "generation"
        return "step"

    def _evaluated_again(self, info: CallInfo) -> bool:
        """Whether the same branch runs once more at one timestep, as solvers of second order do."""
        used = [branch for branch in self._branches if branch.ordinal == self._ordinal]
        if info.context is not None:
            return any(branch.name == info.context for branch in used)
        return bool(info.conditioning) and any(branch.seen == info.conditioning for branch in used)

    def _remember_time(self, info: CallInfo) -> None:
        time = info.timestep()
        if (
            time is not None
            and self._time is not None
            and time != self._time
            and self._rises is None
        ):
            self._rises = sum(time) > sum(self._time)
        self._time = time if time is not None else self._time

    # -- which branch is it? --------------------------------------------------------------------------------------

    def _visit(self, info: CallInfo) -> tuple[_Branch, bool]:
        branch = self._find(info)
        if branch is None:
            name = info.context or f"branch{len(self._branches)}"
            self._branches.append(_Branch(name, self._ordinal, info.conditioning))
            return self._branches[-1], False
        # Pipelines pass the same embeddings at every step, so after one call other embeddings may mean another branch.
        # Custom loops often rebuild embeddings every step, so without a scheduler we trust call order.
        known = branch.calls > 1 or info.context is not None or self._index is None
        known = known or not branch.seen or not info.conditioning
        consecutive = branch.ordinal == self._ordinal - 1 and (
            known or bool(branch.seen & info.conditioning)
        )
        branch.visit(self._ordinal, info.conditioning)
        return branch, consecutive

    def _find(self, info: CallInfo) -> _Branch | None:
        if info.context is not None:
            return next((branch for branch in self._branches if branch.name == info.context), None)
        free = [
            branch
            for branch in self._branches
            if branch.ordinal < self._ordinal and branch.accepts(info.conditioning)
        ]
        # max() keeps the first of equals: among indistinguishable branches the order of the calls decides.
        return max(free, key=lambda branch: len(branch.constant & info.conditioning), default=None)
