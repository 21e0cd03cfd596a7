"""Hooks on a denoiser's blocks: they watch, they let a handler decide, and on a skipped step they stand in.

The model's own forward always runs. On a skipped step every block returns a placeholder at once, and the value that
enters the stack's exit is overridden, so that nothing the blocks would have returned can reach the output.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from runtime.compat.diffusers_private import ContextReceiver, lockstep_group
from runtime.compat.torch_private import compiled_by, pause, resume, stays_python
from runtime.decide.tracker import Position, Tracker
from runtime.errors import UnsupportedModel, WiringError
from runtime.watch.blocks import Blocks, attention_modules, find_blocks, hooked
from runtime.watch.call import Call, Handler, Trajectory
from runtime.watch.observe import Observation
from runtime.watch.places import Arguments, Place, at, mapped, replaced
from runtime.watch.scheduler import SchedulerClock
from runtime.watch.wiring import Exit, Spec


class Watch:
    """The hooks of all denoisers of a pipeline, installed and removed as one.

    Args:
        modules: The denoisers by name.
        new_handler: Makes the handler of a denoiser, by its name.
        clock: Reads the scheduler of the pipeline that drives them.
        blocks: Names the stack by hand (see :func:`runtime.watch.blocks.find_blocks`).
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        new_handler: Callable[[str], Handler],
        clock: SchedulerClock,
        blocks: Blocks | None = None,
    ) -> None:
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
            yield

    def reset(self) -> None:
        """The generation is over: free what was kept, the next call begins a new one."""
        for stack in self.stacks:
            stack.reset()


class StackHooks:
    """The hooks of one denoiser, and the trajectories that its calls belong to.

    Attributes:
        blocks: The denoiser's blocks with their paths.
        siblings: The hooks of all denoisers of the pipeline, which may share its schedule.
        trajectories: What is kept of each CFG branch of the generation under way.
        time_embedding: Where in the first block's arguments it stands; a property of the model's class.
        attention: The attention layers of each block.
        exits: The modules that a stack's result was seen to enter, in the order in which they were found.
    """

    def __init__(
        self,
        root: Module,
        handler: Handler,
        clock: SchedulerClock,
        siblings: list["StackHooks"],
        blocks: Blocks | None = None,
    ) -> None:
        self.root, self.blocks = root, find_blocks(root, blocks)
        self.handler, self.clock, self.siblings = handler, clock, siblings
        self.trajectories: dict[str, Trajectory] = {}
        self.time_embedding: Place | None = None
        self.attention = {block: attention_modules(block) for _, block in self.blocks}
        self.exits: dict[Module, None] = {}
        self._receiver, self._tracker = ContextReceiver(), Tracker()
        self._names = list(inspect.signature(root.forward).parameters)
        self._call: Call | None = None
        self._where: Position | None = None
        self._lock = threading.Lock()
        self._undo = ExitStack()
        path, head = self.blocks[0]
        if not self.attention[head]:
            raise UnsupportedModel(
                f"{type(root).__name__}: the first block ({path}, {type(head).__name__}) "
                "has no attention layer, so there is no modulated input to watch; name another stack with blocks=[...]"
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the hooks in place, all or none; afterwards the model is as it was."""
        root, run = self.root, self._run_block
        with self._undo as undo:
            undo.enter_context(hooked(root, self.blocks, run, self._receiver, self.reset))
            begin = root.register_forward_pre_hook(self._begin, with_kwargs=True)
            end = root.register_forward_hook(self._end, with_kwargs=True, always_call=True)
            undo.enter_context(begin)
            undo.enter_context(end)
            self.exits.clear()
            undo.callback(self._drop_call)
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
    def _begin(self, root: Module, args: tuple, kwargs: dict) -> None:
        compiler = pause()
        with ExitStack() as undo:
            undo.callback(resume, compiler)
            if self._call is not None and self._call.thread == threading.get_ident():
                self._drop_call()  # the last forward never came back
            if not self._lock.acquire(blocking=False):
                raise WiringError(
                    f"{type(root).__name__} is called from two threads at once; one pipeline serves one request at a "
                    "time: use a lock, or a copy of the pipeline for each thread"
                )
            undo.callback(self._drop_call)
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            where = self._tracker.locate(self.clock.call_info(named, self._receiver.name))
            trajectory = self._trajectory(where)
            self._call = call = Call(
                root, trajectory, where, named, compiler, self.time_embedding
            )
            self.handler.open(call)
            if trajectory.wiring is None:
                self._observe(call)
            undo.pop_all()

    def _trajectory(self, where: Position) -> Trajectory:
        """What is kept of the branch that is called; what belongs to another generation is freed."""
        if where.new_generation:
            self.trajectories.clear()
            self.handler.begin(where)
        self._where = where
        for other in self.siblings:
            # Left by an aborted generation, or by an expert whose part of the schedule is over.
            seen = other._where or where
            if seen.schedule != where.schedule or seen.step < where.step - 1:
                other.trajectories.clear()
        if where.branch not in self.trajectories:
            self.trajectories[where.branch] = self.handler.new_trajectory(where.branch)
        trajectory = self.trajectories[where.branch]
        if not where.consecutive:
            trajectory.restart()
        return trajectory

    @stays_python
    def _end(self, root: Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self._call
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

    def _drop_call(self) -> None:
        if self._call is not None and self._call.observation is not None:
            self._call.observation.abort()
        self._call = None
        if self._lock.locked():
            self._lock.release()

    def _conclude(self, call: Call, output: Any) -> None:
        name = type(self.root).__name__
        if not call.decided:
            raise WiringError(
                f"{name} ran without any of its hooked blocks: something that was installed before the cache took its "
                "hooks along when it was removed; remove() the cache and apply it again"
            )
        if call.observation is not None:
            call.trajectory.wiring = call.observation.finish(output)
            self.time_embedding = self.time_embedding or call.observation.time_embedding
            for exit in call.wiring.exits:
                self._leave(call, exit, call.observation.left[exit])
                if exit.module not in self.exits:
                    self.exits[exit.module] = None
                    register = exit.module.register_forward_pre_hook
                    self._undo.enter_context(register(self._at_exit, with_kwargs=True))
        exits = call.wiring.exits
        if call.overrides:
            raise WiringError(
                f"{name}: a skipped step missed {len(call.overrides)} of {len(exits)} exits of the block stack; "
                "the model took another path than on the computed step; its output is refused: exclude such steps "
                "with start/end, or remove the cache"
            )
        if not call.skip and call.left < set(exits):
            call.trajectory.restart()  # another path than before: learn again

    @stays_python
    def _run_block(self, block: Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """A block is called: decide at the first one, stand in or run."""
        # On here where the block alone is compiled, and not the denoiser around it.
        compiler = pause()
        try:
            call = self._call
            if call is None:  # the block is used outside the denoiser's own forward
                return compiled_by(compiler, original, args, kwargs)
            if not call.decided:
                call.first_block = (block, original, self.attention[block])
                call.arguments = (args, kwargs)
                self._decide(call)
            number = call.count(block)
            if call.skip and (block, number) in call.wiring.outputs:
                # The structure of its last result, filled with zeros that nobody reads.
                return mapped(call.wiring.outputs[block, number], call.zeros, leaf=Spec)
            run = partial(compiled_by, compiler or call.compiler, original, args, kwargs)
            if call.observation is None:
                return run()
            return call.observation.block(block, number, run)
        finally:
            resume(compiler)

    def _decide(self, call: Call) -> None:
        call.decided, trajectory = True, call.trajectory
        conditions = call.conditions(with_arguments=lockstep_group(self.root) is not None)
        changed = trajectory.conditions not in (None, conditions)
        if changed:
            trajectory.restart()
        trajectory.conditions = conditions
        if trajectory.wiring is None and call.observation is None:
            self._observe(call)
        if call.observation is not None:
            call.observation.head(call.arguments)
            # At the first step ever only what has been observed so far tells where it stands.
            call.time_embedding = call.time_embedding or call.observation.time_embedding
        call.skip = self.handler.decide(call, changed)
        call.keep_bases()
        if call.skip:
            for exit in call.wiring.exits:
                call.overrides[exit] = self.handler.enter(call, exit, call.base(exit))

    def _observe(self, call: Call) -> None:
        reached = self.handler.reached_exit
        call.observation = Observation(self.root, self.attention, call.named, reached)

    def _leave(self, call: Call, exit: Exit, value: Tensor) -> None:
        call.left.add(exit)
        self.handler.leave(call, exit, value, call.base(exit))

    def _at_exit(self, module: Module, args: tuple, kwargs: dict) -> Arguments | None:
        call = self._call
        if call is None or not call.decided or call.observation is not None:
            return None
        number, arguments = call.count(module), (args, kwargs)
        for exit in call.wiring.exits:
            if exit.module is not module or exit.call != number:
                continue
            value = at(exit.place, arguments)
            if not call.skip:
                self._leave(call, exit, value)
                continue
            stored, shape = call.overrides.pop(exit), getattr(value, "shape", None)
            if shape != stored.shape:
                raise WiringError(
                    f"{type(self.root).__name__}: {tuple(stored.shape)} was computed at the stack's exit "
                    f"({type(module).__name__}), a skipped step brings {shape} there; its output is refused"
                )
            arguments = replaced(arguments, exit.place, stored.to(value))
        return arguments if call.skip else None
