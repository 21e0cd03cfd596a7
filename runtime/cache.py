"""What the cache does with what the hooks see: it measures the signal, asks the policy, keeps and reuses residuals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from runtime.decide.forecast import Forecast
from runtime.decide.gate import Decision, Policy
from runtime.decide.tracker import Position
from runtime.errors import UnsupportedModel
from runtime.stats import Stats
from runtime.watch.distance import l1_sums, ratio
from runtime.watch.hooks import Call, StackHooks, Trajectory
from runtime.watch.places import at, mapped, tensors
from runtime.watch.ranks import agree, await_gathered, lockstep_group, refuse_inner_sharding
from runtime.watch.scheduler import Locator


@dataclass
class _Anchor:
    """What a computed step leaves behind: when it was, one tensor per exit (or per output), and where each was."""

    step: int
    level: float
    values: list[torch.Tensor]
    devices: list[torch.device]


class _CachedTrajectory(Trajectory):
    """One signal, the residuals that the forecast needs, in the model's dtype, and the policy's own state."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.previous: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Nothing to reuse and nothing decided: the step under way is a first one."""
        self.policy.reset()
        self.past = 0
        self.anchors: list[_Anchor] = []  # the newest first


class CacheHandler:
    """Decides and reuses, for one denoiser.

    Args:
        expert: The denoiser's name in the pipeline (``transformer``, ``transformer_2``).
        policy: Makes the policy of a branch, by the branch's name.
        signal: ``modulated_input`` or ``time_embedding``.
        stats: Where decisions are counted.
        forecast: What a skipped step makes of the residuals of computed ones.
        of_output: Forecast the denoiser's output instead of the stack's residual: less memory, and the layers after
            the stack no longer see the present latents.
        together: The first branch of a step decides for all of them: their errors then cancel in the guidance, which
            multiplies the difference of the branches, and one measurement serves all.
        offload: Keep residuals in the host's memory between steps: slower, and nothing stays on the device.
        on_generation: Told the number of steps when a generation begins.
    """

    def __init__(
        self,
        expert: str,
        policy: Callable[[str], Policy],
        signal: str,
        stats: Stats,
        forecast: Forecast,
        of_output: bool = False,
        together: bool = True,
        offload: bool = False,
        on_generation: Callable[[int | None], None] = lambda num_steps: None,
    ) -> None:
        self.expert, self.stats = expert, stats
        self._forecast, self._of_output, self._on_generation = forecast, of_output, on_generation
        self._together, self._offload = together, offload
        self._lead: tuple[int, str, Decision] | None = None
        self._new_policy, self._signal = policy, signal
        self._trajectories: dict[str, _CachedTrajectory] = {}
        self.siblings: list[CacheHandler] = []
        self.step = -1
        self.schedule: object = None

    def bind(self, hooks: StackHooks, locator: Locator) -> None:
        refuse_inner_sharding(hooks.root, hooks.blocks)
        self._hooks, self._locator = hooks, locator

    def reset(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        self._trajectories.clear()
        self._locator.reset()

    def start(self, args: tuple, kwargs: dict) -> _CachedTrajectory:
        self._position = position = self._locator.locate(args, kwargs)
        if position.new_generation:
            for other in self.siblings:  # an aborted generation may have left them in the middle
                if other.schedule != position.schedule:
                    other._trajectories.clear()
            self.schedule = position.schedule
            self._on_generation(position.num_steps)
            self._lead = None
            self._trajectories.clear()
            self.stats.begin(self.expert, position.schedule)
        if position.step != self.step:
            self.step = position.step
            for other in self.siblings:  # the other expert's part of the schedule is over
                if other.step < position.step - 1:
                    other._trajectories.clear()
        if position.branch not in self._trajectories:
            self._trajectories[position.branch] = _CachedTrajectory(
                self._new_policy(position.branch)
            )
        trajectory = self._trajectories[position.branch]
        if not position.consecutive:
            trajectory.restart()
        return trajectory

    @torch.no_grad()
    def decide(self, call: Call, probe: Callable[[], torch.Tensor], changed: bool) -> bool:
        trajectory, where = call.trajectory, self._position
        led = self._led(where)
        if (
            led is None or lockstep_group(self._hooks.root) is not None
        ):  # there every rank takes part in every round
            known = trajectory.policy.known(step=where.step, num_steps=where.num_steps)
            x = (
                self._change(call, probe, measured=known is None)
                if trajectory.policy.needs_signal
                else None
            )
            decision = trajectory.policy.step(x, step=where.step, num_steps=where.num_steps)
        else:
            trajectory.previous = (
                None  # not looked at, so it must not become the reference of a later step
            )
        if led is None:
            self._lead = (where.step, where.branch, decision)
        else:
            decision = Decision("skipped" if led.skip else "computed")
        if changed:
            decision = Decision("shape_changed")
        elif decision.skip and not trajectory.anchors:
            decision = Decision("first")
        if not decision.skip:
            del trajectory.anchors[
                self._forecast.kept - 1 :
            ]  # frees what the stack's own memory can use
        trajectory.past = crc32(decision.kind.encode(), trajectory.past)
        self.stats.add(self.expert, where.branch, decision)
        return decision.skip

    def _led(self, where: Position) -> Decision | None:
        """The decision that another branch has taken at this step, where branches decide together."""
        if not self._together or self._lead is None:
            return None
        step, branch, decision = self._lead
        return decision if step == where.step and branch != where.branch else None

    def _change(
        self, call: Call, probe: Callable[[], torch.Tensor], measured: bool
    ) -> float | None:
        """Relative L1 change of the signal since the previous step; the signal becomes the next reference."""
        signal = probe() if self._signal == "modulated_input" else self._time_embedding(call)
        trajectory = call.trajectory
        before = trajectory.previous
        comparable = (
            before is not None and before.shape == signal.shape and before.dtype == signal.dtype
        )
        sums = l1_sums(signal, before) if comparable and measured else None
        if comparable:
            before.copy_(signal)
        else:
            trajectory.previous = signal.detach().clone()
        group = lockstep_group(self._hooks.root)
        if group is None:
            return None if sums is None else ratio(*sums.tolist())
        past = crc32(self._position.branch.encode(), trajectory.past)
        found = agree(group, sums, past, signal.device)
        if not found.same_past:
            trajectory.forget()
        return found.x

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

    @torch.no_grad()
    def leave(
        self, call: Call, index: int, value: torch.Tensor, base: torch.Tensor | None
    ) -> torch.Tensor:
        if base is None:
            return value.detach().clone()
        # Some models cast to float32 at the exit; the residual is kept in the stack's own dtype. Where nobody else
        # needs the copy of the stack's input, the residual takes its place.
        out = base if call.observation is None and call.trajectory.wiring.is_sole(index) else None
        return torch.sub(value.detach().to(base), base, out=out)

    def keep(self, call: Call, results: list[torch.Tensor]) -> None:
        if not self._of_output:
            self._add_anchor(call, results)

    @torch.no_grad()
    def enter(self, call: Call, index: int, base: torch.Tensor | None) -> torch.Tensor:
        if (
            self._of_output
        ):  # the output is replaced as a whole; what runs until then does not matter
            return base if base is not None else call.trajectory.wiring.exits[index].spec.make()
        forecast = self._forecast_of(call, index)
        # A copy where the kept tensor itself would go out: whoever receives it may change it in place.
        return forecast.clone() if base is None else (base + forecast).to(base.dtype)

    @torch.no_grad()
    def finish(self, call: Call, output: Any) -> Any:
        replaced = self._output_for(call, output) if self._of_output else None
        where = self._position
        if where.num_steps is not None and where.step >= where.num_steps - 1:
            call.trajectory.restart()  # nothing follows: the decoder can use the memory
        return replaced

    def _output_for(self, call: Call, output: Any) -> Any:
        """Keeps a computed output; on a skipped step, what is returned in its place."""
        if not call.skip:
            self._add_anchor(call, [tensor.clone() for _, tensor in tensors(output)])
            return None
        if lockstep_group(self._hooks.root) is not None:
            await_gathered(tensor for _, tensor in tensors(output))
        places = iter(range(sum(1 for _ in tensors(output))))
        return mapped(
            output, lambda tensor: self._forecast_of(call, next(places)).to(tensor.dtype, copy=True)
        )

    def _add_anchor(self, call: Call, values: list[torch.Tensor]) -> None:
        devices = [value.device for value in values]
        if self._offload:
            values = [value.to("cpu") for value in values]
        call.trajectory.anchors.insert(
            0, _Anchor(self._position.step, self._level, values, devices)
        )

    def _forecast_of(self, call: Call, index: int) -> torch.Tensor:
        anchors = call.trajectory.anchors
        device = anchors[0].devices[index]
        levels, steps = [anchor.level for anchor in anchors], [anchor.step for anchor in anchors]
        weights = self._forecast.at(self._position.step, self._level, levels, steps)
        newest = anchors[0].values[index].to(device)
        if not any(weights[1:]):
            return newest if weights[0] == 1 else newest * weights[0]
        # In float32: weights of opposite sign cancel most of what a bfloat16 sum would still hold.
        total = newest.float() * weights[0]
        for weight, anchor in zip(weights[1:], anchors[1:], strict=False):
            total.add_(anchor.values[index].to(device), alpha=weight)
        return total

    @property
    def _level(self) -> float:
        """Abscissa of forecasts: the noise level, or the step where the scheduler tells none; 0 where nobody asks."""
        if not self._forecast.asks_levels:
            return 0.0
        sigma = self._locator.sigma(self._position.step)
        return float(-self._position.step) if sigma is None else sigma
