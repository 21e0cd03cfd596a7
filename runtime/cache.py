"""What the cache does with what the hooks see: it measures the signal, asks the policy, keeps and reuses residuals."""

from collections.abc import Callable
from typing import Any

import torch

from runtime.clock import Locator
from runtime.compat import sequence_group
from runtime.distance import rel_l1
from runtime.errors import UnsupportedModel
from runtime.gate import Decision, Policy
from runtime.hooks import Call, StackHooks, Trajectory
from runtime.leaves import at
from runtime.stats import Stats


class _CachedTrajectory(Trajectory):
    """One signal and one residual per exit, in the model's dtype, and the policy's own state."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.policy.reset()
        self.previous: torch.Tensor | None = None
        self.residuals: list[torch.Tensor] = []


class CacheHandler:
    """Decides and reuses, for one denoiser.

    Args:
        expert: The denoiser's name in the pipeline (``transformer``, ``transformer_2``).
        policy: Makes the policy of a branch, by the branch's name.
        signal: ``modulated_input`` or ``time_embedding``.
        stats: Where decisions are counted.
    """

    def __init__(self, expert: str, policy: Callable[[str], Policy], signal: str, stats: Stats) -> None:
        self.expert, self.stats = expert, stats
        self._new_policy, self._signal = policy, signal
        self._trajectories: dict[str, _CachedTrajectory] = {}
        self.siblings: list[CacheHandler] = []
        self.step = -1

    def bind(self, hooks: StackHooks, locator: Locator) -> None:
        self._hooks, self._locator = hooks, locator
        group = sequence_group(hooks.root)
        self._reduce = None if group is None else _summed_over(group)

    def reset(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        self._trajectories.clear()
        self._locator.reset()

    def start(self, args: tuple, kwargs: dict) -> _CachedTrajectory:
        self._position = position = self._locator.locate(args, kwargs)
        if position.new_generation:
            self._trajectories.clear()
            self.stats.begin(self.expert)
        if position.step != self.step:
            self.step = position.step
            for other in self.siblings:  # the other expert's part of the schedule is over
                if other.step < position.step - 1:
                    other._trajectories.clear()
        if position.branch not in self._trajectories:
            self._trajectories[position.branch] = _CachedTrajectory(self._new_policy(position.branch))
        trajectory = self._trajectories[position.branch]
        if not position.consecutive:
            trajectory.restart()
        return trajectory

    def decide(self, call: Call, probe: Callable[[], torch.Tensor], changed: bool) -> bool:
        trajectory, where = call.trajectory, self._position
        known = trajectory.policy.known(step=where.step, num_steps=where.num_steps)
        x = self._change(call, probe, measured=known is None) if trajectory.policy.needs_signal else None
        decision = trajectory.policy.step(x, step=where.step, num_steps=where.num_steps)
        if changed:
            decision = Decision("shape_changed")
        elif decision.skip and not trajectory.residuals:
            decision = Decision("first")
        if not decision.skip:
            trajectory.residuals = []  # frees them before the stack runs
        self.stats.add(self.expert, where.branch, decision)
        return decision.skip

    def _change(self, call: Call, probe: Callable[[], torch.Tensor], measured: bool) -> float | None:
        """Relative L1 change of the signal since the previous step; the signal becomes the next reference."""
        signal = probe() if self._signal == "modulated_input" else self._time_embedding(call)
        trajectory = call.trajectory
        before = trajectory.previous
        if before is None or before.shape != signal.shape or before.dtype != signal.dtype:
            trajectory.previous = signal.clone()
            return None
        x = rel_l1(signal, before, self._reduce) if measured else None
        before.copy_(signal)
        return x

    def _time_embedding(self, call: Call) -> torch.Tensor:
        place = self._hooks.time_embedding
        if place is None and call.observation is not None:  # the first step ever
            place = call.observation.wiring.time_embedding
        value = None if place is None else at(place, *call.head)
        if value is None:
            raise UnsupportedModel(
                f"{type(self._hooks.root).__name__}: no time embedding is handed to the first block, and this entry's "
                "coefficients were fitted on it; use an entry fitted on the modulated input"
            )
        return value

    def watches_signal(self, call: Call) -> bool:
        return False

    def signal(self, call: Call, value: torch.Tensor) -> None:
        raise NotImplementedError

    def leave(self, call: Call, index: int, value: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        if base is None:
            return value.clone()
        # Some models cast to float32 at the exit; the residual is kept in the stack's own dtype.
        return value.to(base.dtype) - base

    def keep(self, call: Call, results: list[torch.Tensor]) -> None:
        call.trajectory.residuals = results

    def enter(self, call: Call, index: int, base: torch.Tensor | None) -> torch.Tensor:
        residual = call.trajectory.residuals[index]
        return residual if base is None else base + residual

    def finish(self, call: Call, output: Any) -> None:
        pass


def _summed_over(group: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(sums: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(sums, group=group)
        return sums

    return reduce
