"""What the cache does with what the hooks see: it measures the signal, asks the policy, keeps and reuses residuals."""

from collections.abc import Callable
from itertools import count
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from runtime.anchors import Anchors, Guided
from runtime.compat.diffusers_private import lockstep_group
from runtime.decide.forecast import Forecast
from runtime.decide.gate import Decision, Gate, Policy
from runtime.decide.tracker import Position
from runtime.errors import UnsupportedModel
from runtime.settings import Settings
from runtime.stats import Stats
from runtime.watch.call import Call, Handler, Trajectory, measured
from runtime.watch.distance import ratio
from runtime.watch.places import mapped, tensors
from runtime.watch.ranks import agree, await_gathered
from runtime.watch.wiring import Exit


class _CachedTrajectory(Trajectory):
    """One signal, what the forecast needs of computed steps, in the model's dtype, and the policy's own state."""

    def __init__(self, policy: Policy, anchors: Anchors) -> None:
        self.policy, self.anchors = policy, anchors
        super().__init__()

    def restart(self) -> None:
        super().restart()
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
        stats: Where decisions are counted.
        level: Noise level of a step.
        on_generation: Told the number of steps when a generation begins; says what is then in force.
        guided: Forecasts the guided prediction, if the settings say so.
    """

    settings: Settings

    def __init__(
        self,
        expert: str,
        stats: Stats,
        level: Callable[[int], float],
        on_generation: Callable[[int | None], Settings],
        guided: Guided | None,
    ) -> None:
        self.expert, self.stats = expert, stats
        self._level, self._on_generation, self._guided = level, on_generation, guided
        # Where the first branch of the step stood, and whether it skips.
        self._lead: tuple[Position, bool] | None = None

    def begin(self, position: Position) -> None:
        self.settings = self._on_generation(position.num_steps)
        self._lead = None
        joins = self.stats.begin(self.expert, position.schedule)
        if self._guided is not None:
            self._guided.begin(joins)

    def end(self) -> None:
        if self._guided is not None:
            self._guided.clear()

    def new_trajectory(self, branch: str) -> Trajectory:
        settings = self.settings
        # Of a guided prediction a skipped step's own output is not read: the last one stands in for it.
        forecast = settings.forecast if self._guided is None else Forecast()
        anchors = Anchors(forecast, self._level, settings.asked.offload)
        return _CachedTrajectory(settings.new_policy(self.expert, branch), anchors)

    @torch.no_grad()
    def decide(self, call: Call, changed: bool) -> bool:
        trajectory, where = _kept(call), call.position
        first, first_skips = self._lead or (where, False)
        same_step = first.step == where.step and first.branch != where.branch
        follows = same_step and self.settings.branches == "together"
        # Ranks that run in lockstep all take part in every round, also where another branch has decided.
        if not follows or lockstep_group(call.root) is not None:
            decision = self._decide(call)
        else:
            trajectory.buffers.clear()  # the signal is not looked at, so it is no reference of a later step
        if follows:
            decision = Decision("skipped" if first_skips else "computed")
        else:
            self._lead = where, decision.skip
        if changed:
            decision = Decision("shape_changed")
        elif decision.skip and not trajectory.anchors:
            decision = Decision("first")
        if not decision.skip:
            # Frees what the stack's own memory can use.
            trajectory.anchors.make_room(where.step)
        if self._guided is not None:
            self._guided.decided(where.step, decision.skip)
        trajectory.past = crc32(decision.kind.encode(), trajectory.past)
        self.stats.add(self.expert, where.branch, decision)
        return decision.skip

    def _decide(self, call: Call) -> Decision:
        policy, step, num_steps = (
            _kept(call).policy,
            call.position.step,
            call.position.num_steps,
        )
        x = None
        if isinstance(policy, Gate) and policy.config.threshold > 0:
            known = policy.known(step=step, num_steps=num_steps)
            x = self._change(call, needed=known is None)
        return policy.step(x, step=step, num_steps=num_steps)

    def _change(self, call: Call, needed: bool) -> float | None:
        """Relative L1 change of the signal since the previous step; the signal becomes the next reference."""
        signal = measured(call, self.settings.signal)
        if signal is None:
            raise UnsupportedModel(
                f"{type(call.root).__name__}: no {self.settings.signal} is handed to the first block, and this "
                "entry's coefficients were fitted on it; use an entry fitted on the modulated_input"
            )
        trajectory = _kept(call)
        sums = trajectory.change("signal", signal, needed)
        group = lockstep_group(call.root)
        if group is None:
            return None if sums is None else ratio(*sums.tolist())
        past = crc32(call.position.branch.encode(), trajectory.past)
        x, same_past = agree(group, sums, past, signal.device)
        if not same_past:
            trajectory.forget()
        return x

    @torch.no_grad()
    def leave(self, call: Call, exit: Exit, value: Tensor, base: Tensor | None) -> None:
        if self.settings.forecast_of != "residual":
            return
        residual = value.detach()
        if base is None:
            residual = residual.clone()
        else:
            # Some models cast to float32 at the exit; the residual is kept in the stack's own dtype. Where no other
            # exit needs the copy of the stack's input, the residual takes its place.
            bases = [other.base for other in call.wiring.exits]
            out = base if bases.count(exit.base) == 1 else None
            residual = torch.sub(residual.to(base), base, out=out)
        _kept(call).anchors.add(call.position.step, exit, residual)

    @torch.no_grad()
    def enter(self, call: Call, exit: Exit, base: Tensor | None) -> Tensor:
        if self.settings.forecast_of != "residual":  # the output is replaced as a whole
            return exit.spec.make() if base is None else base
        device = exit.spec.device if base is None else base.device
        forecast = _kept(call).anchors.forecast(call.position.step, exit, device)
        # A copy where the kept tensor itself would go out: whoever receives it may change it in place.
        return forecast.clone() if base is None else (base + forecast).to(base.dtype)

    @torch.no_grad()
    def finish(self, call: Call, output: Any) -> Any:
        where, replaced = call.position, None
        if self.settings.forecast_of != "residual":
            replaced = self._output_for(call, output)
        if where.num_steps is not None and where.step >= where.num_steps - 1:
            call.trajectory.restart()  # nothing follows: the decoder can use the memory
        return replaced

    def _output_for(self, call: Call, output: Any) -> Any:
        """Keeps a computed output; on a skipped step, what is returned in its place."""
        anchors, step = _kept(call).anchors, call.position.step
        outputs = [tensor for _, tensor in tensors(output)]
        if not call.skip:
            for index, tensor in enumerate(outputs):
                anchors.add(step, index, tensor.clone())
            return None
        if lockstep_group(call.root) is not None:
            await_gathered(outputs)
        places = count()

        def forecast(tensor: Tensor) -> Tensor:
            value = anchors.forecast(step, next(places), tensor.device)
            return value.to(tensor.dtype, copy=True)

        return mapped(output, forecast)
