"""Hooks on a denoiser's blocks: they watch, they let a handler decide, and on a skipped step they stand in.

The model's own forward always runs. On a skipped step every block returns a placeholder at once, and the value that
enters the stack's exit is overridden, so that nothing the blocks would have returned can reach the output.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from runtime.compat.diffusers_private import ContextReceiver, hook_registry, lockstep_group
from runtime.compat.torch_private import compiled_by, pause, resume, stays_python
from runtime.errors import ApplyError, UnsupportedModel, WiringError
from runtime.watch.blocks import attention_modules, find_blocks
from runtime.watch.places import Place, at, call_tensors, replaced, signature
from runtime.watch.wiring import Exit, Observation, Spec, Wiring

HOOK = "teacal_block"
# Ahead of every other entry in the hook chain: this attribute on the denoiser says whose hooks it carries.
_OWNER = "_teacal_hooks"


class Trajectory:
    """What is kept between the steps of one trajectory; handlers derive their own."""

    wiring: Wiring | None = None
    signature: tuple | None = None

    def restart(self) -> None:
        """Forget the past: the next step has nothing to be compared with."""
        self.wiring = None
        self.signature = None


class Call:
    """One forward of the denoiser."""

    def __init__(
        self, trajectory: Trajectory, args: tuple, kwargs: dict, compiler: Any = None
    ) -> None:
        self.trajectory = trajectory
        self.args, self.kwargs = args, kwargs
        self.compiler = compiler  # what torch.compile(model) runs the forward with
        self.decided = self.skip = False
        self.observation: Observation | None = None
        self.bases: dict[Place | None, torch.Tensor] = {}
        self.results: dict[int, Any] = {}
        self.overrides: dict[int, torch.Tensor] = {}
        self.stand_ins: dict[Spec, torch.Tensor] = {}
        self.overridden = 0
        self.head: tuple[tuple, dict] = ((), {})
        self.stream: torch.Size = torch.Size()
        self.thread = threading.get_ident()
        self._counts: dict[nn.Module, int] = {}

    def count(self, module: nn.Module) -> int:
        """Which call of ``module`` this is, within the forward and since the stack began."""
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        return number


class Handler(Protocol):
    """What is done with what the hooks see: the cache decides and reuses, the recorder measures."""

    def start(self, args: tuple, kwargs: dict) -> Trajectory:
        """A forward begins; which trajectory does it belong to?"""

    def decide(self, call: Call, probe: Callable[[], torch.Tensor], changed: bool) -> bool:
        """At the first block: whether to skip. ``probe()`` gives the modulated input of this step."""

    def watches_signal(self, call: Call) -> bool:
        """Whether :meth:`signal` wants the modulated input of a step that is computed."""

    def signal(self, call: Call, value: torch.Tensor) -> None:
        """The modulated input, seen while the first block runs."""

    def leave(self, call: Call, index: int, value: torch.Tensor, base: torch.Tensor | None) -> Any:
        """A computed step's value at exit ``index``; ``base`` (the handler's to keep) is the stack's input there."""

    def keep(self, call: Call, results: list[Any]) -> None:
        """What :meth:`leave` returned for the exits that matter, once all are known."""

    def enter(self, call: Call, index: int, base: torch.Tensor | None) -> torch.Tensor:
        """A skipped step's value for exit ``index``."""

    def finish(self, call: Call, output: Any) -> Any:
        """The forward has returned ``output``; what is returned instead, ``None`` for ``output`` itself."""


class StopForward(BaseException):
    """Ends the probe at the first attention call. No Exception, so that no model's own handler swallows it."""


class _BlockHook(ModelHook):
    """Passes every call of a block to the :class:`StackHooks` it belongs to."""

    _is_stateful = True

    def __init__(self, owner: "StackHooks", receiver: ContextReceiver | None = None) -> None:
        super().__init__()
        self.owner: StackHooks | None = owner
        # diffusers looks for this among the attributes of stateful hooks and tells it the name of the CFG branch.
        self.receiver = receiver
        # What accelerate puts back when its own hook, which was there before this one, is removed.
        self.beneath: Callable | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.beneath = getattr(module, "_old_forward", None)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.fn_ref.original_forward
        if self.owner is None:
            return original(*args, **kwargs)
        return self.owner.run_block(module, original, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        if self.owner is not None and self.receiver is not None:
            self.owner.on_reset()
        return module


class StackHooks:
    """The hooks of one denoiser, installed and removed as one.

    Args:
        root: The denoiser.
        handler: What to do with what they see.
        blocks: Names the stack by hand (see :func:`runtime.watch.blocks.find_blocks`).
        on_reset: Called when the pipeline says that a generation is over.
    """

    def __init__(
        self,
        root: nn.Module,
        handler: Handler,
        blocks: Sequence[str | nn.Module] | None = None,
        on_reset: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.handler, self.on_reset = root, handler, on_reset
        self.blocks = find_blocks(root, blocks)
        self.receiver = ContextReceiver()
        self.call: Call | None = None
        self._members = frozenset(block for _, block in self.blocks)
        self._attention = attention_modules(self.blocks[0][1])
        if not self._attention:
            raise UnsupportedModel(
                f"{type(root).__name__}: the first block ({self.blocks[0][0]}, {type(self.blocks[0][1]).__name__}) "
                "has no attention layer, so there is no modulated input to watch; name another stack with blocks=[...]"
            )
        # Where in the first block's arguments the time embedding stands; a property of the model's class.
        self.time_embedding: Place | None = None
        self._head: nn.Module | None = None
        self._handles: list = []
        self._exit_handles: dict[nn.Module, Any] = {}
        self._hooks: list[tuple[nn.Module, _BlockHook]] = []
        self._lock = threading.Lock()

    # -- installation ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in place, all or none."""
        if getattr(self.root, _OWNER, None) is not None:
            raise ApplyError(
                f"{type(self.root).__name__} already carries a cache or recorder of teacal; remove() that one first"
            )
        setattr(self.root, _OWNER, self)
        try:
            self._handles.append(self.root.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(
                self.root.register_forward_hook(self._end, with_kwargs=True, always_call=True)
            )
            for index, (_, block) in enumerate(self.blocks):
                hook = _BlockHook(self, self.receiver if index == 0 else None)
                # A model's context-parallel hook splits the sequence on the first block: ours must see what is left.
                (_register_innermost if index == 0 else _register)(block, hook)
                self._hooks.append((block, hook))
            HookRegistry.check_if_exists_or_initialize(
                self.root
            ).invalidate_child_registries_cache()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything out again; the model is as it was. Harmless when nothing is installed."""
        for handle in (*self._handles, *self._exit_handles.values()):
            handle.remove()
        self._handles.clear()
        self._exit_handles.clear()
        while self._hooks:
            _unregister(*self._hooks.pop())
        if getattr(self.root, _OWNER, None) is self:
            delattr(self.root, _OWNER)
        registry = hook_registry(self.root)
        if registry is not None:
            registry.invalidate_child_registries_cache()
        self._drop_call()

    # -- one forward ----------------------------------------------------------------------------------------------

    # Under torch.compile(model) everything but the blocks' own forwards runs in plain Python: what is learned, decided
    # and overridden around them cannot be traced, and a graph that breaks at every block is not worth its guards.

    @stays_python
    def _begin(self, root: nn.Module, args: tuple, kwargs: dict) -> None:
        compiler = pause()
        try:
            self._open(root, args, kwargs, compiler)
        except BaseException:
            resume(compiler)
            raise

    @stays_python
    def _end(self, root: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self.call
        if call is None or call.thread != threading.get_ident():
            return None  # a call that was refused
        try:
            return self._close(call, output)
        finally:
            resume(call.compiler)

    def _open(self, root: nn.Module, args: tuple, kwargs: dict, compiler: Any) -> None:
        if not self._lock.acquire(blocking=False):
            if self.call is not None and self.call.thread == threading.get_ident():
                self._drop_call()  # the last forward never came back
                self._lock.acquire(blocking=False)
            else:
                raise WiringError(
                    f"{type(root).__name__} is called from two threads at once; one pipeline serves one request at a "
                    "time: use a lock, or a copy of the pipeline for each thread"
                )
        try:
            self.call = Call(self.handler.start(args, kwargs), args, kwargs, compiler)
            if self.call.trajectory.wiring is None:
                self._observe(self.call)
        except BaseException:
            self._drop_call()
            raise

    def _close(self, call: Call, output: Any) -> Any:
        failed = output is None
        try:
            if not failed and not call.decided:
                raise WiringError(
                    f"{type(self.root).__name__} ran without any of its hooked blocks: something that was installed "
                    "before the cache took its hooks along when it was removed; remove() the cache and apply it again"
                )
            if not failed and call.decided:
                self._conclude(call, output)
                return self.handler.finish(call, output)
            return None
        except BaseException:
            call.trajectory.restart()
            raise
        finally:
            if failed:
                call.trajectory.restart()
            self._drop_call()

    def _drop_call(self) -> None:
        if self.call is not None and self.call.observation is not None:
            self.call.observation.abort()
        self.call = None
        if self._lock.locked():
            self._lock.release()

    def _conclude(self, call: Call, output: Any) -> None:
        trajectory = call.trajectory
        if call.observation is not None:
            wiring, needed = call.observation.finish(output)
            trajectory.wiring = wiring
            self.time_embedding = self.time_embedding or wiring.time_embedding
            self._watch_exits(wiring)
            self.handler.keep(call, [call.results[index] for index in needed])
        elif call.skip:
            if call.overridden != len(trajectory.wiring.exits):
                raise WiringError(
                    f"{type(self.root).__name__}: a skipped step reached {call.overridden} of "
                    f"{len(trajectory.wiring.exits)} exits of the block stack; the model took another path than on "
                    "the computed step; its output is refused: exclude such steps with start/end, or remove the cache"
                )
        else:
            exits = len(trajectory.wiring.exits)
            if len(call.results) != exits:
                trajectory.restart()  # another path than before: learn again
                return
            self.handler.keep(call, [call.results[index] for index in range(exits)])

    # -- blocks ---------------------------------------------------------------------------------------------------

    @stays_python
    def run_block(self, block: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
        """A block is called: decide at the first one, stand in or run."""
        compiler = (
            pause()
        )  # on here where the block alone is compiled, and not the denoiser around it
        try:
            return self._run_block(compiler, block, original, args, kwargs)
        finally:
            resume(compiler)

    def _run_block(
        self, compiler: Any, block: nn.Module, original: Callable, args: tuple, kwargs: dict
    ) -> Any:
        call = self.call
        if call is None:  # the block is used outside the denoiser's own forward
            return compiled_by(compiler, original, args, kwargs)
        is_head = not call.decided
        if is_head:
            self._decide(call, block, original, args, kwargs)
        number = call.count(block)
        if call.skip and (block, number) in call.trajectory.wiring.outputs:
            return call.trajectory.wiring.placeholder(block, number, call.stand_ins)
        if is_head and self.handler.watches_signal(call):
            return self._run_watched(call, block, number, original, args, kwargs)
        return self._run(call, block, number, original, args, kwargs, compiler or call.compiler)

    def _run(
        self,
        call: Call,
        block: nn.Module,
        number: int,
        original: Callable,
        args: tuple,
        kwargs: dict,
        compiler: Any,
    ) -> Any:
        if call.observation is None:
            return compiled_by(compiler, original, args, kwargs)
        with call.observation.paused():
            result = compiled_by(compiler, original, args, kwargs)
        call.observation.block(block, number, result)
        return result

    def _run_watched(
        self, call: Call, block: nn.Module, number: int, original: Callable, args, kwargs
    ) -> Any:
        seen: list[torch.Tensor] = []

        def watch(module: nn.Module, inputs: tuple, named: dict) -> None:
            if not seen:
                seen.append(_hidden_states(inputs, named, call.stream))
                self.handler.signal(call, seen[0])

        handles = [
            module.register_forward_pre_hook(watch, with_kwargs=True) for module in self._attention
        ]
        try:
            # A graph knows no hooks that come and go: the watched block runs as it is.
            result = self._run(call, block, number, uncompiled(original), args, kwargs, None)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise self._no_attention_call(block)
        return result

    def _decide(
        self, call: Call, block: nn.Module, original: Callable, args: tuple, kwargs: dict
    ) -> None:
        trajectory = call.trajectory
        # Ranks may hold parts of unequal length: only the whole call's shapes change on all of them at once.
        whole = signature(call.args, call.kwargs) if lockstep_group(self.root) is not None else None
        now = (block, signature(args, kwargs), _modes(call.kwargs), whole)
        changed = trajectory.signature is not None and trajectory.signature != now
        if changed:
            trajectory.restart()
        trajectory.signature = now
        if self._head is not block:
            self._head, self._attention = block, attention_modules(block)
        call.decided, call.head = True, (args, kwargs)
        if trajectory.wiring is None and call.observation is None:
            self._observe(call)
        if call.observation is not None:
            call.observation.head(args, kwargs)
        wiring = trajectory.wiring or call.observation.wiring
        call.stream = at(wiring.primary, args, kwargs).shape
        call.skip = self.handler.decide(
            call, lambda: self._probe(call, block, original, args, kwargs), changed
        )
        if call.skip:
            exits = trajectory.wiring.exits
            call.overrides = {
                index: self.handler.enter(call, index, found.entry(args, kwargs, at))
                for index, found in enumerate(exits)
            }
            return
        self._keep_bases(call, args, kwargs)

    def _keep_bases(self, call: Call, args: tuple, kwargs: dict) -> None:
        """Copies of the streams that enter the stack, since a block may change its input in place."""
        if call.observation is None:
            places = {
                found.base for found in call.trajectory.wiring.exits if found.base is not None
            }
            call.bases = {place: at(place, args, kwargs).detach().clone() for place in places}
        else:
            streams = [
                (p, t)
                for p, t in call_tensors(args, kwargs)
                if t.is_floating_point() and t.ndim > 1
            ]
            call.bases = {place: tensor.detach().clone() for place, tensor in streams}

    def _probe(
        self, call: Call, block: nn.Module, original: Callable, args: tuple, kwargs: dict
    ) -> torch.Tensor:
        """The modulated input: the first block's own forward, stopped at its first attention call."""
        seen: list[torch.Tensor] = []

        def stop(module: nn.Module, inputs: tuple, named: dict) -> None:
            seen.append(_hidden_states(inputs, named, call.stream))
            raise StopForward

        handles = [
            module.register_forward_pre_hook(stop, with_kwargs=True) for module in self._attention
        ]
        try:
            # A block that is an attention layer itself has no forward to stop: its input is the signal.
            if block in self._attention:
                return _hidden_states(args, kwargs, call.stream)
            uncompiled(original)(*args, **kwargs)
        except StopForward:
            return seen[0]
        finally:
            for handle in handles:
                handle.remove()
        raise self._no_attention_call(block)

    def _no_attention_call(self, block: nn.Module) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(self.root).__name__}: the first block ({type(block).__name__}) ran without calling any of its "
            "attention layers, so there is no modulated input to watch; name another stack with blocks=[...]"
        )

    # -- exits ----------------------------------------------------------------------------------------------------

    def _observe(self, call: Call) -> None:
        def on_exit(index: int, found: Exit, value: torch.Tensor) -> None:
            call.results[index] = self.handler.leave(call, index, value, _base(call, found))

        call.observation = Observation(self.root, self._members, on_exit)
        call.observation.begin(call.args, call.kwargs)

    def _watch_exits(self, wiring: Wiring) -> None:
        for found in wiring.exits:
            if found.module not in self._exit_handles:
                self._exit_handles[found.module] = found.module.register_forward_pre_hook(
                    self._at_exit, with_kwargs=True
                )

    def _at_exit(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None or not call.decided or call.observation is not None:
            return None
        number = call.count(module)
        changed = None
        for index, found in enumerate(call.trajectory.wiring.exits):
            if found.module is not module or found.call != number:
                continue
            value = at(found.place, args, kwargs)
            if call.skip:
                args, kwargs = changed = self._override(call, index, found, value, args, kwargs)
            else:
                call.results[index] = self.handler.leave(call, index, value, _base(call, found))
        return changed

    def _override(
        self, call: Call, index: int, found: Exit, value: Any, args: tuple, kwargs: dict
    ) -> tuple:
        stored = call.overrides.pop(index)
        if not isinstance(value, torch.Tensor) or value.shape != stored.shape:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise WiringError(
                f"{type(self.root).__name__}: {tuple(stored.shape)} was computed at the stack's exit "
                f"({type(found.module).__name__}), a skipped step brings {shape} there; its output is refused"
            )
        call.overridden += 1
        both = replaced({"args": args, "kwargs": kwargs}, found.place, stored.to(value))
        return both["args"], both["kwargs"]


def uncompiled(forward: Callable) -> Callable:
    """A block's forward without the graph that :func:`runtime.compile.compile_blocks` made of it."""
    return getattr(forward, "uncompiled", forward)


def _base(call: Call, found: Exit) -> torch.Tensor | None:
    if found.base is None:
        return None
    value = call.bases[found.base]
    for selection in found.selections:
        value = selection(value)
    return value


def _hidden_states(args: tuple, kwargs: dict, stream: torch.Size) -> torch.Tensor:
    """What an attention layer receives as hidden states: by name, else the tensor shaped like the stream."""
    value = kwargs.get("hidden_states")
    if isinstance(value, torch.Tensor):
        return value
    received = [tensor for _, tensor in call_tensors(args, kwargs)]
    return next((tensor for tensor in received if tensor.shape == stream), received[0])


def _modes(kwargs: dict) -> tuple:
    """Texts among the denoiser's arguments name modes (such as writing or reading a key-value cache)."""
    return tuple((key, value) for key, value in kwargs.items() if isinstance(value, str))


def _register(block: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, HOOK)


def _register_innermost(block: nn.Module, hook: ModelHook) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(block)
    others = [(name, registry.get_hook(name)) for name in list(registry.hooks)]
    # In reverse order: diffusers drops the next hook's forward when one is removed from the middle.
    for name, _ in reversed(others):
        registry.remove_hook(name, recurse=False)
    registry.register_hook(hook, HOOK)
    for name, other in others:
        registry.register_hook(other, name)


def _unregister(block: nn.Module, hook: _BlockHook) -> None:
    hook.owner = None
    registry = hook_registry(block)
    if registry is None or registry.get_hook(HOOK) is not hook:
        return
    present = block.forward
    names = list(registry.hooks)
    above = [(name, registry.get_hook(name)) for name in names[names.index(HOOK) + 1 :]]
    for name, _ in reversed(above):
        registry.remove_hook(name, recurse=False)
    registry.remove_hook(HOOK, recurse=False)
    for name, other in above:
        registry.register_hook(other, name)
    if (
        hook.beneath is not None and present == hook.beneath
    ):  # accelerate's hook is gone, and took ours along
        block.forward = present
