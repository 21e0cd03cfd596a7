"""Step caching beside torch.compile: what runs inside graphs is counted, and decisions and results stay the same."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch._dynamo.utils import counters

import runtime
from calibrate.recording.recorder import Recorder
from runtime import ApplyError, Forecast, apply_tea_cache, compile_blocks

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SCHEDULE = "CSCCSC"
# More blocks of each class than graphs: a graph per block, or a guard on the block's identity, would show.
DEEP = {
    "flux": {"num_layers": 3, "num_single_layers": 4},
    "longcat_image": {"num_layers": 3, "num_single_layers": 4},
    "wan21": {"num_layers": 4},
    "qwen_image": {"num_layers": 4},
    "qwen_image_zero_cond_t": {"num_layers": 4},
}
# Graphs per class of blocks; single-stream blocks have a second one, for the first of them gets another layout.
GRAPHS = {
    "flux": 3,
    "longcat_image": 3,
    "wan21": 1,
    "qwen_image": 1,
    "qwen_image_zero_cond_t": 1,
}
# Fewer than the blocks of a class, so that one graph for each of them reaches the limit too.
RECOMPILES = 3
ATTENTION = {"wan21": 2}  # attention calls per block


class Backend:
    """Runs graphs as they are and counts: graphs, and the calls of each operation inside of them."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls: Counter = Counter()

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        self.graphs += 1
        names = Counter(
            getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes
        )

        def run(*args: Any) -> Any:
            self.calls.update(names)
            return graph.forward(*args)

        return run

    @property
    def attention(self) -> int:
        return self.calls["scaled_dot_product_attention"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        yield
    torch._dynamo.reset()


def generate(
    name: str, model: torch.nn.Module, total: int = len(SCHEDULE)
) -> list[tuple[torch.Tensor, ...]]:
    return [zoo.run(model, kwargs) for kwargs in zoo.trajectory(name, total)]


def expected(name: str, model: torch.nn.Module) -> list[tuple[torch.Tensor, ...]]:
    with apply_tea_cache(model, schedule=SCHEDULE):
        return generate(name, model)


def blocks_of(name: str) -> int:
    return sum(DEEP[name].values())


def equal(found: list, wanted: list) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(found, wanted, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def whole(model: torch.nn.Module, backend: Backend) -> torch.nn.Module:
    return torch.compile(model, backend=backend)


def method(model: torch.nn.Module, backend: Backend) -> torch.nn.Module:
    model.compile(backend=backend)
    return model


def regional(model: torch.nn.Module, backend: Backend) -> torch.nn.Module:
    # The hooks are compiled along, with guards on each block's own: torch's usual limit.
    torch._dynamo.config.recompile_limit = 8
    model.compile_repeated_blocks(backend=backend)
    return model


def ours(model: torch.nn.Module, backend: Backend) -> torch.nn.Module:
    compile_blocks(model, backend=backend)
    return model


# With the gate, not with a fixed schedule: it probes, which must not enter a graph or make one.
GATE = {"coefficients": [1.0, 0.0], "threshold": 0.3}
STEPS = 8
CASES = [
    ("flux", way, first)
    for way in (whole, method, regional)
    for first in ("compile", "apply")
]
CASES += [(name, whole, "compile") for name in DEEP if name != "flux"]
CASES += [(name, ours, first) for name in DEEP for first in ("compile", "apply")]


@pytest.mark.parametrize(
    ("name", "way", "first"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_blocks_run_in_graphs_and_nothing_is_compiled_again(
    name: str, way: Callable, first: str
) -> None:
    """Per generation: every attention call of a computed step inside a graph, none else, no graph after the first."""
    model, backend = zoo.build(name, **DEEP[name]), Backend()
    with apply_tea_cache(model, **GATE) as cache:
        wanted = generate(name, model, STEPS)
        pattern = cache.stats.pattern
    assert 1 < pattern.count("C") < STEPS
    called = way(model, backend) if first == "compile" else model
    cache = apply_tea_cache(called, **GATE)
    called = way(model, backend) if first == "apply" else called
    for generation in (1, 2):
        found = generate(name, called, STEPS)
        assert cache.stats.pattern == pattern
        assert equal(found, wanted)
        assert backend.graphs == GRAPHS[name]
        assert backend.attention == generation * pattern.count("C") * blocks_of(
            name
        ) * ATTENTION.get(name, 1)
    if (
        way is not regional
    ):  # which compiles the hooks along with the blocks, and breaks at them
        assert not counters["graph_break"]
    assert not counters["recompile_limit"]


PLAN = "CCSCSSCS"
KINDS = (
    "linear",
    "quadratic",
    Forecast("fitted", {2: (1.5, -0.5), 4: (1.4, -0.4), 5: (1.2,), 7: (1.3, -0.3)}),
)


@pytest.mark.parametrize(("name", "way"), [("flux", whole), ("flux", ours), ("wan21", ours)])
def test_skips_with_forecasts_compile_nothing(name: str, way: Callable) -> None:
    """Every forecast of residuals and outputs, one after the other on one compiled model: no graph after the first."""
    settings = [
        {"forecast": kind, "forecast_of": of}
        for kind in KINDS
        for of in ("residual", "output")
    ]
    model, backend = zoo.build(name, **DEEP[name]), Backend()
    wanted = []
    for how in settings:
        with apply_tea_cache(model, schedule=PLAN, **how):
            wanted.append(generate(name, model, len(PLAN)))
    called = way(model, backend)
    for how, expected_outputs in zip(settings, wanted, strict=True):
        with apply_tea_cache(model, schedule=PLAN, **how) as cache:
            for _generation in range(2):
                assert equal(generate(name, called, len(PLAN)), expected_outputs)
                assert cache.stats.pattern == PLAN
                assert backend.graphs == GRAPHS[name]
    generations = 2 * len(settings)
    assert backend.attention == generations * PLAN.count("C") * blocks_of(
        name
    ) * ATTENTION.get(name, 1)
    assert not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize("name", ["flux", "qwen_image_zero_cond_t"])
def test_removal_leaves_the_model_as_it_was(name: str) -> None:
    model = zoo.build(name)
    plain = generate(name, model)
    state = [dict(module.__dict__) for module in model.modules()]
    with compile_blocks(model, backend=Backend()) as compiled:
        assert compiled.count >= 3
        generate(name, model)
    assert compiled.count == 0
    assert equal(generate(name, model), plain)
    assert [dict(module.__dict__) for module in model.modules()] == state


@pytest.mark.parametrize("last", ["cache", "graphs"])
@pytest.mark.parametrize("first", ["cache", "graphs"])
def test_cache_and_graphs_come_off_in_any_order(first: str, last: str) -> None:
    model, backend = zoo.build("flux"), Backend()
    plain = generate("flux", model)
    handles = {}
    for part in ("cache", "graphs") if first == "cache" else ("graphs", "cache"):
        part_is_cache = part == "cache"
        handles[part] = (
            apply_tea_cache(model, schedule=SCHEDULE)
            if part_is_cache
            else compile_blocks(model, backend=backend)
        )
    generate("flux", model)
    calls = backend.attention
    assert calls
    handles["graphs" if last == "cache" else "cache"].remove()
    halfway = generate("flux", model)
    if last == "cache":  # the graphs are off, the cache is not
        assert backend.attention == calls and handles["cache"].stats.pattern == SCHEDULE
    else:
        assert backend.attention > calls and equal(halfway, plain)
    handles[last].remove()
    calls = backend.attention
    assert equal(generate("flux", model), plain)
    assert backend.attention == calls
    assert not any(
        "forward" in block.__dict__ and hasattr(block.forward, "compiled")
        for block in model.modules()
    )


def test_both_experts_are_compiled_and_share_their_graphs() -> None:
    class Pair:
        def __init__(self) -> None:
            self.components = {
                "transformer": zoo.build("wan21"),
                "transformer_2": zoo.build("wan21", seed=1),
            }

    pair, backend = Pair(), Backend()
    both = list(pair.components.values())
    plain = [generate("wan21", model) for model in both]
    with compile_blocks(pair, backend=backend) as compiled:
        assert compiled.count == sum(len(model.blocks) for model in both)
        assert all(
            equal(generate("wan21", model), wanted)
            for model, wanted in zip(both, plain, strict=True)
        )
    assert backend.graphs == GRAPHS["wan21"]


def test_the_recorder_sees_the_same_beside_graphs() -> None:
    model = zoo.build("flux")

    def rows() -> list[dict]:
        with Recorder({"transformer": model}) as recorder:
            recorder.start()
            generate("flux", model)
            return recorder.finish().rows

    plain = rows()
    compile_blocks(model, backend=Backend())
    assert repr(rows()) == repr(plain)  # nan is not equal to itself


def test_a_cached_model_leaves_other_models_to_the_compiler() -> None:
    """Pausing the compiler for one model must not switch it off for the next, also when a forward fails."""
    cached, backend = zoo.build("wan21"), Backend()
    called = torch.compile(cached, backend=backend)
    other = torch.compile(torch.nn.Linear(4, 4), backend=backend)
    with apply_tea_cache(cached, schedule=SCHEDULE):
        with pytest.raises(Exception, match=r"mat1|shape|size"):
            called(
                **{**zoo.inputs("wan21", 0), "encoder_hidden_states": torch.zeros(1, 2, 3)}
            )
        other(torch.ones(1, 4))
        assert backend.calls["linear"] > 0
        generate("wan21", called)
    other(torch.ones(1, 4))


def test_the_default_compiler_gives_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with Inductor: fused arithmetic rounds otherwise, decisions and steps are the same."""
    if not _has_cpp_compiler():
        pytest.skip("Inductor needs a C++ compiler on a CPU")
    # A cache of its own: an interrupted compilation leaves half a library in the shared one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = zoo.build("wan21")
    wanted = expected("wan21", model)
    with compile_blocks(model), apply_tea_cache(model, schedule=SCHEDULE) as cache:
        found = generate("wan21", model)
        assert cache.stats.pattern == SCHEDULE
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _has_cpp_compiler() -> bool:
    from shutil import which

    return any(which(name) for name in ("g++", "c++", "clang++"))


def test_refusals_say_what_to_do() -> None:
    model = zoo.build("flux")
    with (
        compile_blocks(model, backend="eager"),
        pytest.raises(ApplyError, match="already; remove"),
    ):
        compile_blocks(model)
    regional(model, Backend())
    with pytest.raises(ApplyError, match=r"compile_repeated_blocks.*load the model again"):
        compile_blocks(model)
    model = zoo.build("flux")
    with pytest.raises(ApplyError, match="compiled as a whole already"):
        compile_blocks(method(model, Backend()))
    model = zoo.build("flux")
    model.transformer_blocks[1].attn._hf_hook = object()
    with pytest.raises(ApplyError, match=r"transformer_blocks\.1\.attn moves its weights"):
        compile_blocks(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_whole_block_with_its_hooks_is_refused_by_name() -> None:
    """compile_repeated_blocks(fullgraph=True) takes the hooks into the graph; the error names what to use instead."""
    model = zoo.build("flux")
    with apply_tea_cache(model, schedule=SCHEDULE):
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"runtime\.compile_blocks"):
            generate("flux", model)


def test_it_is_exported() -> None:
    assert runtime.compile_blocks is compile_blocks and "compile_blocks" in runtime.__all__
