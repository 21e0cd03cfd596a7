"""Pins every unpublished name of diffusers and torch that the runtime relies on: a new release breaks here first."""

import dataclasses
import inspect

import pytest
import torch
import zoo
from diffusers.hooks import HookRegistry, ModelHook, _common, hooks
from diffusers.models.cache_utils import CacheMixin

from runtime.compat import diffusers_private as compat
from runtime.compat import torch_private as dynamo


class Plus(ModelHook):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def new_forward(self, module: torch.nn.Module, *args: object) -> torch.Tensor:
        return self.fn_ref.original_forward(*args) + self.number


def test_a_branch_name_reaches_the_receiver() -> None:
    """``cache_context`` tells the name to every StateManager among a stateful hook's attributes, and takes it back."""
    assert {"name", "step_index"} <= set(inspect.signature(hooks.CacheContext).parameters)

    class Listener(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.receiver = compat.ContextReceiver()

    model, listener = zoo.build("flux"), Listener()
    assert isinstance(model, CacheMixin)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0]).register_hook(
        listener, "listener"
    )
    assert listener.receiver.name is None
    with model.cache_context("cond"):
        assert listener.receiver.name == "cond"
    assert listener.receiver.name is None


def test_attention_classes_are_listed() -> None:
    assert (
        torch.nn.Linear not in _common._ATTENTION_CLASSES
        and len(_common._ATTENTION_CLASSES) >= 2
    )
    block = zoo.build("flux").transformer_blocks[0]
    assert compat.is_attention(block.attn) and not compat.is_attention(block.ff)


def test_an_enabled_cache_is_seen() -> None:
    from diffusers import FirstBlockCacheConfig

    model = zoo.build("flux")
    assert compat.enabled_cache(model) is None
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert compat.enabled_cache(model) == "FirstBlockCacheConfig"
    model.disable_cache()
    assert compat.enabled_cache(model) is None


def test_the_registry_is_found_where_diffusers_keeps_it() -> None:
    module = torch.nn.Identity()
    assert compat.hook_registry(module) is None
    assert HookRegistry.check_if_exists_or_initialize(module) is compat.hook_registry(module)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_forward_beneath_the_hooks_can_be_exchanged(count: int) -> None:
    module, one = torch.nn.Identity(), torch.ones(1)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    for index in range(count):
        registry.register_hook(Plus(10.0**index), str(index))
    own = compat.inner_forward(module)
    assert own.__self__ is module and module(one).item() == 1 + [0, 1, 11][count]
    compat.set_inner_forward(module, lambda value: 100 * value)
    assert module(one).item() == 100 + [0, 1, 11][count]
    compat.set_inner_forward(module, own)
    assert module(one).item() == 1 + [0, 1, 11][count]
    if not count:
        assert "forward" not in module.__dict__
    for index in reversed(range(count)):
        registry.remove_hook(str(index))
    assert module(one).item() == 1


def test_sharded_models_say_who_shares_them() -> None:
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig

    assert {"context_parallel_config", "tensor_parallel_config"} <= {
        f.name for f in dataclasses.fields(ParallelConfig)
    }
    assert "_flattened_mesh" in {f.name for f in dataclasses.fields(ContextParallelConfig)}
    assert "_mesh" in {f.name for f in dataclasses.fields(TensorParallelConfig)}
    assert zoo.build("flux")._parallel_config is None
    assert compat.lockstep_group(zoo.build("flux")) is None


def test_the_wrapper_of_a_compiled_module_is_taken_off() -> None:
    module = torch.nn.Linear(2, 2)
    assert (
        compat.unwrapped(torch.compile(module)) is module
        and compat.unwrapped(module) is module
    )
    assert module._compiled_call_impl is None
    module.compile()
    assert module._compiled_call_impl is not None


def test_the_compiler_is_paused_and_let_in_for_one_call() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> object:
        graphs.append(
            [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
        )
        return graph.forward

    def inside(x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x)

    @dynamo.stays_python
    def between(x: torch.Tensor) -> torch.Tensor:
        compiler = dynamo.pause()
        try:
            return dynamo.compiled_by(compiler, inside, (torch.sin(x),), {})
        finally:
            dynamo.resume(compiler)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.exp(between(torch.tan(x))), backend=backend)
    x = torch.ones(2)
    assert torch.equal(compiled(x), x.tan().sin().cos().exp())
    assert sorted(name for graph in graphs for name in graph) == ["cos", "exp", "tan"]
    assert dynamo.pause() is None, "the compiler is left on"
