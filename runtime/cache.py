"""What the cache does with what the hooks see: it measures the signal, asks the policy, keeps and reuses residuals."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from runtime.anchors import Anchors, Guided
from runtime.decide.forecast import Forecast
from runtime.decide.gate import Decision, Policy
from runtime.decide.tracker import Position
from runtime.errors import UnsupportedModel
from runtime.settings import Settings
from runtime.stats import Stats
from runtime.watch.call import Call, Handler, Trajectory, measured
from runtime.watch.distance import l1_sums, ratio
from runtime.watch.places import mapped, tensors
from runtime.watch.ranks import agree, await_gathered, lockstep_group


class _CachedTrajectory(Trajectory):
    """One signal, what the forecast needs of computed steps, in the model's dtype, and the policy's own state."""

    def __init__(self, policy: Policy, anchors: Anchors) -> None:
        self.policy, self.anchors = policy, anchors
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.previous: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Nothing to reuse and nothing decided: the step under way is a first one."""
        self.policy.reset()
        self.past = 0  # digest of the decisions so far
        self.anchors.clear()


def _kept(call: Call) -> _CachedTrajectory:
    assert isinstance(call.trajectory, _CachedTrajectory)
    return call.trajectory


class CacheHandler(Handler):
    """Decides and reuses, for one denoiser.

    Branches decide together by default: the first one of a step decides for all of them. Their errors then cancel in
    the guidance, which multiplies the difference of the branches, and one measurement serves all.

    Args:
        expert: The denoiser's name in the pipeline (``transformer``, ``transformer_2``).
        settings: What is in force.
        stats: Where decisions are counted.
        guided: Forecasts the guided prediction, if the settings say so.
        on_generation: Told the number of steps when a generation begins; says what is then in force.
    """

    def __init__(
        self,
        expert: str,
        settings: Settings,
        stats: Stats,
        guided: Guided | None,
        on_generation: Callable[[int | None], Settings] | None = None,
    ) -> None:
        self.expert, self.settings, self.stats = expert, settings, stats
        self._guided, self._on_generation = guided, on_generation
        self._of_output = settings.forecast_of != "residual"
        self._lead: tuple[int, str, Decision] | None = None

    def begin(self, position: Position) -> None:
        if self._on_generation is not None:
            self.settings = self._on_generation(position.num_steps)
        self._lead = None
        self.stats.begin(self.expert, position.schedule)
        if self._guided is not None:
            self._guided.begin(self.expert, position.schedule)

    def end(self) -> None:
        if self._guided is not None:
            self._guided.clear()

    def new_trajectory(self, branch: str) -> Trajectory:
        # Of a guided prediction a skipped step's own output is not read: the last one stands in for it.
        forecast = self.settings.forecast if self._guided is None else Forecast()
        anchors = Anchors(forecast, self.settings.asked.offload)
        return _CachedTrajectory(self.settings.new_policy(self.expert, branch), anchors)

    @torch.no_grad()
    def decide(self, call: Call, changed: bool) -> bool:
        trajectory, where = _kept(call), call.position
        decision = self._led(where)
        # Ranks that run in lockstep all take part in every round, also where another branch has decided.
        if decision is None or lockstep_group(call.root) is not None:
            own = self._decide(call)
        else:
            trajectory.previous = None  # not looked at, so it is no reference of a later step
        if decision is None:
            decision = own
            self._lead = (where.step, where.branch, decision)
        else:
            decision = Decision("skipped" if decision.skip else "computed")
        if changed:
            decision = Decision("shape_changed")
        elif decision.skip and not trajectory.anchors:
            decision = Decision("first")
        if not decision.skip:
            trajectory.anchors.make_room(where.step)  # frees what the stack's own memory can use
        if self._guided is not None:
            self._guided.decided(where.step, call.locator, decision.skip)
        trajectory.past = crc32(decision.kind.encode(), trajectory.past)
        self.stats.add(self.expert, where.branch, decision)
        return decision.skip

    def _led(self, where: Position) -> Decision | None:
        """The decision that another branch has taken at this step, where branches decide together."""
        if self.settings.branches == "apart" or self._lead is None:
            return None
        step, branch, decision = self._lead
        return decision if step == where.step and branch != where.branch else None

    def _decide(self, call: Call) -> Decision:
        policy, where = _kept(call).policy, call.position
        x = None
        if policy.needs_signal:
            known = policy.known(step=where.step, num_steps=where.num_steps)
            x = self._change(call, needed=known is None)
        return policy.step(x, step=where.step, num_steps=where.num_steps)

    def _change(self, call: Call, needed: bool) -> float | None:
        """Relative L1 change of the signal since the previous step; the signal becomes the next reference."""
        signal = measured(call, self.settings.signal)
        if signal is None:
            raise UnsupportedModel(
                f"{type(call.root).__name__}: no {self.settings.signal} is handed to the first block, and this "
                "entry's coefficients were fitted on it; use an entry fitted on the modulated_input"
            )
        trajectory = _kept(call)
        before = trajectory.previous
        sums = None
        if before is not None and before.shape == signal.shape and before.dtype == signal.dtype:
            sums = l1_sums(signal, before) if needed else None
            before.copy_(signal)
        else:
            trajectory.previous = signal.detach().clone()
        group = lockstep_group(call.root)
        if group is None:
            return None if sums is None else ratio(*sums.tolist())
        past = crc32(call.position.branch.encode(), trajectory.past)
        agreement = agree(group, sums, past, signal.device)
        if not agreement.same_past:
            trajectory.forget()
        return agreement.x

    @torch.no_grad()
    def leave(self, call: Call, index: int, value: Tensor, base: Tensor | None) -> Tensor:
        if base is None:
            return value.detach().clone()
        # Some models cast to float32 at the exit; the residual is kept in the stack's own dtype. Where nobody else
        # needs the copy of the stack's input, the residual takes its place.
        out = base if call.observation is None and call.wiring.is_sole(index) else None
        return torch.sub(value.detach().to(base), base, out=out)

    def keep(self, call: Call, results: list[Tensor]) -> None:
        if not self._of_output:
            _kept(call).anchors.add(call.position.step, call.locator, results)

    @torch.no_grad()
    def enter(self, call: Call, index: int, base: Tensor | None) -> Tensor:
        if self._of_output:  # it is replaced as a whole; what runs until then does not matter
            return base if base is not None else call.wiring.exits[index].spec.make()
        forecast = _kept(call).anchors.forecast(call.position.step, call.locator, index)
        # A copy where the kept tensor itself would go out: whoever receives it may change it in place.
        return forecast.clone() if base is None else (base + forecast).to(base.dtype)

    @torch.no_grad()
    def finish(self, call: Call, output: Any) -> Any:
        replaced = self._output_for(call, output) if self._of_output else None
        where = call.position
        if where.num_steps is not None and where.step >= where.num_steps - 1:
            call.trajectory.restart()  # nothing follows: the decoder can use the memory
        return replaced

    def _output_for(self, call: Call, output: Any) -> Any:
        """Keeps a computed output; on a skipped step, what is returned in its place."""
        anchors, step = _kept(call).anchors, call.position.step
        outputs = [tensor for _, tensor in tensors(output)]
        if not call.skip:
            anchors.add(step, call.locator, [tensor.clone() for tensor in outputs])
            return None
        if lockstep_group(call.root) is not None:
            await_gathered(outputs)
        places = iter(range(len(outputs)))

        def forecast(tensor: Tensor) -> Tensor:
            return anchors.forecast(step, call.locator, next(places)).to(tensor.dtype, copy=True)

        return mapped(output, forecast)
