"""Hooks on a denoiser's blocks: they watch, they let a handler decide, and on a skipped step they stand in.

The model's own forward always runs. On a skipped step every block returns a placeholder at once, and the value that
enters the stack's exit is overridden, so that nothing the blocks would have returned can reach the output.
"""

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from runtime.compat.diffusers_private import lockstep_group
from runtime.compat.torch_private import compiled_by, pause, resume, stays_python
from runtime.decide.tracker import Tracker
from runtime.errors import UnsupportedModel, WiringError
from runtime.watch.blocks import Blocks, HookSet, attention_modules, find_blocks
from runtime.watch.call import Call, Handler, Trajectory
from runtime.watch.observe import Observation
from runtime.watch.places import Place, at, replaced
from runtime.watch.scheduler import SchedulerClock, hooked_steps
from runtime.watch.wiring import Exit


class Watch:
    """The hooks of all denoisers of a pipeline, installed and removed as one.

    Args:
        modules: The denoisers by name.
        new_handler: Makes the handler of a denoiser, by its name.
        clock: Reads the scheduler of the pipeline that drives them.
        blocks: Names the stack by hand (see :func:`runtime.watch.blocks.find_blocks`).
        on_step: Given what the pipeline's schedulers receive (see :func:`runtime.watch.scheduler.hooked_steps`).
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        new_handler: Callable[[str], Handler],
        clock: SchedulerClock,
        blocks: Blocks | None = None,
        on_step: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._pipeline, self._on_step = clock.pipeline, on_step
        self.stacks: list[StackHooks] = []
        for expert, module in modules.items():
            hooks = StackHooks(module, new_handler(expert), clock, self.stacks, blocks)
            self.stacks.append(hooks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the hooks in place, all or none; afterwards the models are as they were."""
        with ExitStack() as undo:
            undo.callback(self.reset)
            for stack in self.stacks:
                undo.enter_context(stack.installed())
            undo.enter_context(hooked_steps(self._pipeline, self._on_step))
            yield

    def reset(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        for stack in self.stacks:
            stack.reset()


class StackHooks(HookSet):
    """The hooks of one denoiser, and the trajectories that its calls belong to.

    Attributes:
        siblings: The hooks of all denoisers of the pipeline, which may share its schedule.
        trajectories: What is kept of each CFG branch of the generation under way.
        time_embedding: Where in the first block's arguments it stands; a property of the model's class.
    """

    def __init__(
        self,
        root: Module,
        handler: Handler,
        clock: SchedulerClock,
        siblings: list["StackHooks"],
        blocks: Blocks | None = None,
    ) -> None:
        super().__init__(root, find_blocks(root, blocks))
        self.handler, self.clock, self.siblings = handler, clock, siblings
        self.trajectories: dict[str, Trajectory] = {}
        self.time_embedding: Place | None = None
        self.call: Call | None = None
        self._names = list(inspect.signature(root.forward).parameters)
        self._tracker = Tracker()
        self._schedule: Hashable | None = None
        self._step = -1
        path, self._head = self.blocks[0]
        self._attention = attention_modules(self._head)
        if not self._attention:
            raise UnsupportedModel(
                f"{type(root).__name__}: the first block ({path}, {type(self._head).__name__}) "
                "has no attention layer, so there is no modulated input to watch; name another stack with blocks=[...]"
            )
        self._exit_modules: dict[Module, None] = {}  # in the order in which they were found
        self._lock = threading.Lock()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the hooks in place, all or none; afterwards the model is as it was."""
        with super().installed():
            self._exit_modules.clear()
            self.undo.callback(self._drop_call)
            yield

    def reset(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        self.trajectories.clear()
        self._tracker.reset()
        self.handler.end()

    # -- one forward ----------------------------------------------------------------------------------------------
    # Under torch.compile(model) everything but the blocks' own forwards runs in plain Python: what is learned, decided
    # and overridden around them cannot be traced, and a graph that breaks at every block is not worth its guards.

    @stays_python
    def begin(self, root: Module, args: tuple, kwargs: dict) -> None:
        compiler = pause()
        with ExitStack() as undo:
            undo.callback(resume, compiler)
            self._take_lock()
            undo.callback(self._drop_call)
            self.call = call = self._new_call(args, kwargs)
            call.compiler, call.time_embedding = compiler, self.time_embedding
            self.handler.open(call)
            if call.trajectory.wiring is None:
                self._observe(call)
            undo.pop_all()

    def _new_call(self, args: tuple, kwargs: dict) -> Call:
        """A call with these arguments: its trajectory, and where in the generation it stands."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        where = self._tracker.locate(self.clock.call_info(named, self.receiver.name))
        if where.new_generation:
            self.trajectories.clear()
            self.handler.begin(where)
        self._schedule, self._step = where.schedule, where.step
        for other in self.siblings:
            # Left by an aborted generation, or by an expert whose part of the schedule is over.
            if other._schedule != where.schedule or other._step < where.step - 1:
                other.trajectories.clear()
        if where.branch not in self.trajectories:
            self.trajectories[where.branch] = self.handler.new_trajectory(where.branch)
        trajectory = self.trajectories[where.branch]
        if not where.consecutive:
            trajectory.restart()
        return Call(self.root, trajectory, where, named)

    @stays_python
    def end(self, root: Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self.call
        if call is None or call.thread != threading.get_ident():
            return None  # a call that was refused
        try:
            if output is None:  # the forward has failed
                call.trajectory.restart()
                return None
            self._conclude(call, output)
            return self.handler.finish(call, output)
        except BaseException:
            call.trajectory.restart()
            raise
        finally:
            self._drop_call()
            resume(call.compiler)

    def _take_lock(self) -> None:
        if self.call is not None and self.call.thread == threading.get_ident():
            self._drop_call()  # the last forward never came back
        if not self._lock.acquire(blocking=False):
            raise WiringError(
                f"{type(self.root).__name__} is called from two threads at once; one pipeline serves one request at a "
                "time: use a lock, or a copy of the pipeline for each thread"
            )

    def _drop_call(self) -> None:
        if self.call is not None and self.call.observation is not None:
            self.call.observation.abort()
        self.call = None
        if self._lock.locked():
            self._lock.release()

    def _conclude(self, call: Call, output: Any) -> None:
        trajectory, name = call.trajectory, type(self.root).__name__
        if not call.decided:
            raise WiringError(
                f"{name} ran without any of its hooked blocks: something that was installed before the cache took its "
                "hooks along when it was removed; remove() the cache and apply it again"
            )
        needed: Sequence[int] = range(len(call.wiring.exits))
        if call.observation is not None:
            wiring, needed = call.observation.finish(output)
            trajectory.wiring = wiring
            self.time_embedding = self.time_embedding or wiring.time_embedding
            self._watch_exits(wiring.exits)
        if call.overrides:
            raise WiringError(
                f"{name}: a skipped step missed {len(call.overrides)} of {len(needed)} exits of the block stack; "
                "the model took another path than on the computed step; its output is refused: exclude such steps "
                "with start/end, or remove the cache"
            )
        if call.skip:
            return
        if all(index in call.results for index in needed):
            self.handler.keep(call, [call.results[index] for index in needed])
        else:
            trajectory.restart()  # another path than before: learn again

    @stays_python
    def run_block(self, block: Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """A block is called: decide at the first one, stand in or run."""
        # On here where the block alone is compiled, and not the denoiser around it.
        compiler = pause()
        try:
            call = self.call
            if call is None:  # the block is used outside the denoiser's own forward
                return compiled_by(compiler, original, args, kwargs)
            if not call.decided:
                call.head = (args, kwargs)
                self._decide(call, block, original)
            number = call.count(block)
            if call.skip and (block, number) in call.wiring.outputs:
                return call.wiring.placeholder(block, number, call.stand_ins)
            run = partial(compiled_by, compiler or call.compiler, original, args, kwargs)
            if call.observation is None:
                return run()
            return call.observation.block(block, number, run)
        finally:
            resume(compiler)

    def _decide(self, call: Call, block: Module, original: Callable) -> None:
        trajectory = call.trajectory
        if self._head is not block:
            self._head, self._attention = block, attention_modules(block)
        call.decided = True
        call.first_block = (block, original, self._attention)
        conditions = call.conditions(with_arguments=lockstep_group(self.root) is not None)
        changed = trajectory.conditions not in (None, conditions)
        if changed:
            trajectory.restart()
        trajectory.conditions = conditions
        if trajectory.wiring is None and call.observation is None:
            self._observe(call)
        if call.observation is not None:
            call.observation.head(*call.head)
        call.skip = self.handler.decide(call, changed)
        if not call.skip:
            call.keep_bases()
            return
        for index, exit in enumerate(call.wiring.exits):
            base = None if exit.base is None else exit.selected(at(exit.base, *call.head))
            call.overrides[index] = self.handler.enter(call, index, base)

    def _observe(self, call: Call) -> None:
        blocks = [block for _, block in self.blocks]
        call.observation = Observation(self.root, blocks, partial(self._leave, call))
        call.observation.begin(call.named)

    def _leave(self, call: Call, index: int, exit: Exit, value: Tensor) -> None:
        base = None if exit.base is None else exit.selected(call.bases[exit.base])
        call.results[index] = self.handler.leave(call, index, value, base)

    def _watch_exits(self, exits: tuple[Exit, ...]) -> None:
        for exit in exits:
            if exit.module not in self._exit_modules:
                self._exit_modules[exit.module] = None
                register = exit.module.register_forward_pre_hook
                self.undo.enter_context(register(self._at_exit, with_kwargs=True))

    def _at_exit(
        self, module: Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None or not call.decided or call.observation is not None:
            return None
        number = call.count(module)
        changed = None
        for index, exit in enumerate(call.wiring.exits):
            if exit.module is not module or exit.call != number:
                continue
            value = at(exit.place, args, kwargs)
            if not call.skip:
                self._leave(call, index, exit, value)
                continue
            stored, shape = call.overrides.pop(index), getattr(value, "shape", None)
            if shape != stored.shape:
                raise WiringError(
                    f"{type(self.root).__name__}: {tuple(stored.shape)} was computed at the stack's exit "
                    f"({type(module).__name__}), a skipped step brings {shape} there; its output is refused"
                )
            args, kwargs = changed = replaced(exit.place, stored.to(value), args, kwargs)
        return changed
