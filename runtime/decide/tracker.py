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
Times = tuple[float, float]  # lowest and highest of the timesteps that a call was given


@dataclass(frozen=True, kw_only=True)
class CallInfo:
    """What is known about one denoiser call before it runs.

    Attributes:
        context: Name set by the pipeline through ``cache_context``, if any.
        schedule: Identity of the schedule in force (a new one per generation); ``None`` without a pipeline.
        step_index: 0-based index of the scheduler's step; ``None`` where the scheduler keeps none.
        num_steps: Length of the schedule, if known.
        timestep: Reads the timesteps; called only where needed, since on a GPU it waits.
        conditioning: Identities of the call's conditioning tensors (prompt embeddings and the like).
    """

    context: str | None = None
    schedule: Hashable | None = None
    step_index: int | None = None
    num_steps: int | None = None
    timestep: Callable[[], Times | None] = lambda: None
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


@dataclass
class _Branch:
    """A CFG branch: the ordinal of its latest step, the conditioning seen there, and what of it never changed."""

    name: str
    ordinal: int
    seen: frozenset
    constant: frozenset
    calls: int = 1


class Tracker:
    """Follows the calls of one denoiser: :meth:`locate` once per call, in order."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next call begins a generation."""
        self._branches: list[_Branch] = []
        self._ordinal = -1
        # Schedule and index of the latest call, and where a scheduler stands that does not drive.
        self._now: tuple[Hashable | None, int | None] = (None, None)
        self._stuck: Hashable | None = None
        self._time: Times | None = None
        self._rises: bool | None = None

    def locate(self, info: CallInfo) -> Position:
        """The trajectory and the step of this call."""
        index = None if self._is_stuck(info) else info.step_index
        time = info.timestep() if index is None else None
        event = self._event(info, index, time)
        if event == "generation":
            stuck = self._stuck
            self.reset()
            self._stuck = stuck
        if event != "branch":
            self._ordinal += 1
        self._now = info.schedule, index
        self._time = self._time if time is None else time
        branch, consecutive = self._visit(info)
        return Position(
            branch=branch,
            step=self._ordinal if index is None else index,
            num_steps=info.num_steps,
            new_generation=event == "generation",
            consecutive=consecutive,
            schedule=None if self._stuck is not None else info.schedule,
        )

    # -- does a new step or a new generation begin with this call? ------------------------------------------------

    def _is_stuck(self, info: CallInfo) -> bool:
        """Whether the scheduler in view stands still while the denoiser is driven by another one (a shared model)."""
        now = info.schedule, info.step_index
        if info.step_index is None:
            return False
        if self._stuck not in (None, now):
            self._stuck, self._branches = None, []  # it moves again: it drives
        if self._stuck is None:
            names = [branch.name for branch in self._called()]
            again = info.context in names or len(names) >= MOST_BRANCHES
            through = info.num_steps is not None and info.step_index >= info.num_steps
            if through or (again and self._now == now):
                self._stuck, self._branches = now, []
        return self._stuck is not None

    def _called(self) -> list[_Branch]:
        """The branches that were called at this step."""
        return [branch for branch in self._branches if branch.ordinal == self._ordinal]

    def _event(self, info: CallInfo, index: int | None, time: Times | None) -> str:
        """What begins with this call: a ``generation``, a ``step``, or only another ``branch``."""
        schedule, before = self._now
        if not self._branches or info.schedule != schedule:
            return "generation"
        if index is not None and before is not None:
            return "generation" if index < before else "step" if index > before else "branch"
        if before is not None or index is not None:
            return "generation"
        if time is None or time == self._time:
            silent = time is None and info.context is None and not info.conditioning
            return "step" if silent or self._evaluated_again(info) else "branch"
        if self._time is not None:
            rises = sum(time) > sum(self._time)
            if self._rises not in (None, rises):
                return "generation"
            self._rises = rises
        return "step"

    def _evaluated_again(self, info: CallInfo) -> bool:
        """Whether the same branch runs once more at one timestep, as solvers of second order do."""
        if info.context is not None:
            return info.context in [branch.name for branch in self._called()]
        seen = [branch.seen for branch in self._called()]
        return bool(info.conditioning) and info.conditioning in seen

    # -- which branch is it? --------------------------------------------------------------------------------------

    def _visit(self, info: CallInfo) -> tuple[str, bool]:
        """The name of the call's branch, and whether it was also called at the previous step."""
        now, branch = info.conditioning, self._find(info)
        if branch is None:
            name = info.context or f"branch{len(self._branches)}"
            self._branches.append(_Branch(name, self._ordinal, now, now))
            return name, False
        # Pipelines pass the same embeddings at every step, so after one call other embeddings may mean another branch.
        # Custom loops often rebuild embeddings every step, so without a scheduler we trust call order.
        known = branch.calls > 1 or info.context is not None or self._now[1] is None
        known = known or not (branch.seen and now) or bool(branch.seen & now)
        consecutive = known and branch.ordinal == self._ordinal - 1
        branch.constant &= now
        branch.seen, branch.ordinal, branch.calls = now, self._ordinal, branch.calls + 1
        return branch.name, consecutive

    def _find(self, info: CallInfo) -> _Branch | None:
        now = info.conditioning
        if info.context is not None:
            named = (branch for branch in self._branches if branch.name == info.context)
            return next(named, None)
        # All that stayed the same in a branch so far must be there again (one call alone proves nothing).
        free = [
            branch
            for branch in self._branches
            if branch.ordinal < self._ordinal and (branch.calls < 2 or branch.constant <= now)
        ]
        # max() keeps the first of equals: among indistinguishable branches the order of the calls decides.
        return max(free, key=lambda branch: len(branch.constant & now), default=None)
