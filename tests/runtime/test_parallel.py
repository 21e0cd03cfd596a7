"""Several ranks, one model: measured alike, decided alike, and nobody left waiting.

Ranks are real processes over gloo. A decision that differs between two of them would leave one waiting in the next
collective, so every group has a deadline and is killed when it passes.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import pytest
import torch
import zoo
from torch import distributed

import calibrate.recording.handler
import runtime.cache
import runtime.watch.hooks
from calibrate.recording.figures import exit_figures, over_parts
from calibrate.recording.recorder import Recorder
from coeffs.entry.polynomial import Polynomial
from runtime import Forecast, apply_tea_cache
from runtime.decide.gate import Gate, GateConfig
from runtime.errors import ApplyError
from runtime.watch.distance import l1_sums

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
DEADLINE = 300.0  # for the slowest machine; two idle cores take a fifth of it
STEPS = 8
# Qwen and Wan split the sequence on their first block, the FLUX line on the denoiser itself.
MODELS = ("flux", "longcat_image", "qwen_image", "qwen_image_zero_cond_t", "wan21")
THRESHOLDS = [0.05 + 0.005 * index for index in range(190)]
SCHEDULE = "CSCSSCSC"
# Plans with every forecast; weights of the last computed steps for each step that is skipped.
PLAN = "CCSCSSCS"
PLANNED_MODELS = ("flux", "wan21")
FITTED = Forecast("fitted", {2: (1.5, -0.5), 4: (1.4, -0.4), 5: (1.2,), 7: (1.6, -0.6)})
FORECASTS = [
    (kind, of) for kind in ("linear", "quadratic", FITTED) for of in ("residual", "output")
]
FIGURES = (
    "x",
    "x_time_embedding",
    "y_output",
    "y_hidden",
    "y_residual",
    "mag_ratio",
    "mag_ratio_std",
    "cos_distance",
)


# -- what one process, parallel or not, does with a model -------------------------------------------------------------


def build(name: str) -> torch.nn.Module:
    return zoo.build(name, num_attention_heads=4)  # so that four ranks can share them


def call(model: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The prediction; as a tuple, since the hooks of context parallelism take no output class."""
    return zoo.run(model, {**kwargs, "return_dict": False})[0]


def outputs_of(
    name: str, model: torch.nn.Module, first: int = STEPS, **inputs: Any
) -> list[torch.Tensor]:
    outputs = []
    for kwargs in islice(zoo.trajectory(name, total=STEPS, **inputs), first):
        outputs.append(call(model, kwargs).clone())
        float(
            outputs[-1].sum()
        )  # under context parallelism the output is still being gathered: wait for it
    return outputs


def pairs_of(
    name: str, model: torch.nn.Module, outputs: list | None = None
) -> list[dict[str, Any]]:
    with Recorder({"transformer": model}) as recorder:
        recorder.start()
        found = outputs_of(name, model)
        if outputs is not None:
            outputs += found
        return recorder.finish().rows


def own_cache(
    model: torch.nn.Module, threshold: float, coefficients: tuple[float, ...] = (1.0, 0.0)
) -> Any:
    return apply_tea_cache(
        model, coefficients=coefficients, threshold=threshold, start=1, end=0
    )


def measured_of(name: str, model: torch.nn.Module) -> list[float | None]:
    """The change that the runtime hands to its gate at every step, while a constant prediction lets nothing skip.

    (A threshold near zero would not do: the part that holds only clean reference tokens does not change at all.)
    """
    with own_cache(model, 0.5, (0.0, 1.0)) as cache:
        xs = []
        for kwargs in zoo.trajectory(name, total=STEPS):
            float(call(model, kwargs).sum())
            xs.append(next(iter(cache.stats.branches.values())).last_x)
        assert cache.stats.pattern == "C" * STEPS
        return xs


def cached_of(
    name: str, model: torch.nn.Module, threshold: float
) -> tuple[str, list[torch.Tensor]]:
    with own_cache(model, threshold) as cache:
        outputs = outputs_of(name, model)
        return cache.stats.pattern, outputs


def forced_of(
    name: str, model: torch.nn.Module, **settings: Any
) -> tuple[str, list[torch.Tensor]]:
    with apply_tea_cache(model, schedule=SCHEDULE, **settings) as cache:
        outputs = outputs_of(name, model)
        return cache.stats.pattern, outputs


def planned_of(name: str, model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Two CFG branches under plans with forecasts: patterns of the branches, and all outputs."""
    found = []
    for kind, of in FORECASTS:
        with apply_tea_cache(model, schedule=PLAN, forecast=kind, forecast_of=of) as cache:
            outputs = []
            for both in zip(
                *(zoo.trajectory(name, total=STEPS, branch=branch) for branch in (0, 1)),
                strict=True,
            ):
                for kwargs in both:
                    outputs.append(call(model, kwargs).clone())
                    float(outputs[-1].sum())
            patterns = " ".join(stats.pattern for stats in cache.stats.branches.values())
            found.append((patterns, outputs))
    return found


def decisions(xs: list[float | None], threshold: float) -> str:
    gate = Gate(Polynomial((1.0, 0.0)), GateConfig(threshold=threshold, end=0))
    return "".join(
        "S" if gate.step(x, step=t, num_steps=len(xs)).skip else "C" for t, x in enumerate(xs)
    )


def some_threshold(xs: list[float | None]) -> float:
    """One that computes and skips."""
    return 2.2 * sorted(x for x in xs if x is not None)[len(xs) // 2]


# -- what the ranks do ------------------------------------------------------------------------------------------------


@contextmanager
def counted_reductions() -> Iterator[list]:
    calls: list = []
    real = distributed.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    with mock.patch.object(distributed, "all_reduce", counting):
        yield calls


@contextmanager
def each_for_itself() -> Iterator[None]:
    """The mistake: every rank takes its own part of the sequence for the whole."""
    nobody = {"lockstep_group": lambda module: None}
    with (
        mock.patch.multiple(runtime.cache, **nobody),
        mock.patch.multiple(runtime.watch.hooks, **nobody),
        mock.patch.multiple(calibrate.recording.handler, **nobody),
    ):
        yield


def split_over(model: torch.nn.Module, ranks: int, **config: Any) -> torch.nn.Module:
    from diffusers import ContextParallelConfig
    from diffusers.models import FluxTransformer2DModel

    # LongCat-Image brings no plan; its forward is FLUX's.
    plan = model._cp_plan or FluxTransformer2DModel._cp_plan
    model.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=ranks, **config), cp_plan=plan
    )
    return model


def sequence_parallel(rank: int, world: int) -> dict[str, Any]:
    """Every model split over all ranks."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = split_over(build(name), world)
        plain = outputs_of(name, model)
        recorded: list[torch.Tensor] = []
        rows = pairs_of(name, model, recorded)
        with each_for_itself():
            own_rows = pairs_of(name, model)
        xs = measured_of(name, model)
        with counted_reductions() as in_gate:
            pattern, outputs = cached_of(name, model, some_threshold(xs))
        with counted_reductions() as in_schedule:
            forced = [forced_of(name, model)]
        after = outputs_of(name, model, first=2)

        cached = [(pattern, outputs)]
        if world == 2:  # the other order: the cache first, then the split
            for settings, results in (
                ({"schedule": SCHEDULE}, forced),
                (
                    {"coefficients": [1.0, 0.0], "threshold": some_threshold(xs), "end": 0},
                    cached,
                ),
            ):
                later = build(name)
                with apply_tea_cache(later, **settings) as cache:
                    split_over(later, world)
                    late_outputs = outputs_of(name, later)
                    results.append((cache.stats.pattern, late_outputs))
                after += outputs_of(name, later, first=2)
        found[name] = {
            "plain": plain,
            "rows": rows,
            "own_rows": own_rows,
            "untouched": all(map(torch.equal, plain, recorded))
            and all(map(torch.equal, cycle(plain[:2]), after)),
            "xs": xs,
            "own_xs": [None, *(row["x"] for row in own_rows)],
            "cached": cached,
            "forced": forced,
            "outputs_reused": forced_of(name, model, forecast_of="output"),
            "reductions": (len(in_gate), len(in_schedule)),
        }
    return found


def planned(rank: int, world: int) -> dict[str, Any]:
    """Plans with forecasts; how often the ranks asked each other under a plan alone."""
    found: dict[str, Any] = {}
    for name in PLANNED_MODELS:
        model = split_over(build(name), world)
        found[name] = planned_of(name, model)
        with (
            counted_reductions() as asked,
            apply_tea_cache(model, schedule=PLAN, forecast=FITTED),
        ):
            outputs_of(name, model)
        found[name + " asked"] = len(asked)
    return found


def one_rank_reset(rank: int, world: int) -> dict[str, Any]:
    """The last rank loses its memory in the middle of a generation: all must notice."""
    model = split_over(build("flux"), world)
    with own_cache(model, 1e9) as cache:
        for step, kwargs in enumerate(zoo.trajectory("flux", total=8)):
            if step == 4 and rank == world - 1:
                next(iter(cache._watch.stacks[0].trajectories.values())).restart()
            float(call(model, kwargs).sum())
        return {"pattern": cache.stats.pattern}


def uneven_parts(rank: int, world: int) -> dict[str, Any]:
    """The text loses a token in the middle: only the last rank's part gets shorter, yet all must compute."""
    model = split_over(build("flux"), world, ulysses_anything=True)
    patterns = []
    for settings in (
        {"schedule": "C" + "S" * 7},
        {"coefficients": [1.0, 0.0], "threshold": 1e9, "end": 0},
    ):
        with apply_tea_cache(model, **settings) as cache:
            for step, kwargs in enumerate(zoo.trajectory("flux", total=8)):
                length = 12 if step < 4 else 11
                kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :length]
                kwargs["txt_ids"] = kwargs["txt_ids"][:length]
                float(call(model, kwargs).sum())
            patterns.append(cache.stats.pattern)
    return {"patterns": patterns}


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """Weights split inside the blocks: every rank holds the whole stream."""
    from diffusers import TensorParallelConfig

    model = build("flux")
    with mock.patch("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",)):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=world))
    rows, xs = pairs_of("flux", model), measured_of("flux", model)
    return {
        "rows": rows,
        "xs": xs,
        "cached": cached_of("flux", model, some_threshold(xs)),
        "plain": None,
    }


def guidance_parallel(rank: int, world: int) -> dict[str, Any]:
    """Each half of the ranks runs one branch of guidance, split over the sequence where there are four ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    model, branch = build("flux"), 2 * rank // world
    if world > 2:
        mesh = init_device_mesh(
            "cpu", (2, 1, world // 2), mesh_dim_names=("guidance", "ring", "ulysses")
        )
        split_over(model, world // 2, mesh=mesh["ring", "ulysses"])
    threshold = (0.05, 0.4)[branch]
    patterns = []
    with own_cache(model, threshold) as cache:
        for _generation in range(2):
            for kwargs in zoo.trajectory("flux", total=STEPS, branch=branch):
                prediction = call(model, kwargs).contiguous().clone()
                both = [torch.empty_like(prediction) for _ in range(world)]
                distributed.all_gather(both, prediction)
            patterns.append(cache.stats.pattern)
            cache.reset()
    return {"patterns": patterns}


def parameters_sharded(rank: int, world: int) -> dict[str, Any]:
    """Every rank serves a request of its own from parameters that all of them share."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for name in ("flux", "wan21"):
        model = build(name)
        for path in zoo.TINY[name].blocks:
            for block in model.get_submodule(path):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with own_cache(model, (0.05, 0.45)[rank % 2]) as cache:
            outputs = outputs_of(name, model, seed=rank)
            found[name] = {"pattern": cache.stats.pattern, "outputs": outputs}

    inner, wrapped = build("flux"), build("flux")
    fully_shard(inner.transformer_blocks[1].ff, mesh=mesh)
    wrapped.transformer_blocks[1] = FullyShardedDataParallel(
        wrapped.transformer_blocks[1],
        device_id=torch.device("cpu"),
        process_group=mesh.get_group(),
    )
    found["refused"] = []
    for model in (inner, wrapped):
        try:
            own_cache(model, 0.1)
        except ApplyError as error:
            found["refused"].append(str(error))
        hooked = any(
            module._forward_pre_hooks
            for module in model.modules()
            if type(module).__name__ == "ModuleList"
        )
        assert not hooked and not hasattr(model, "_teacal_hooks")
        with Recorder({"transformer": model}):  # recording skips nothing
            pass
    return found


SCENARIOS = {
    2: (
        sequence_parallel,
        planned,
        one_rank_reset,
        uneven_parts,
        tensor_parallel,
        guidance_parallel,
        parameters_sharded,
    ),
    4: (sequence_parallel, one_rank_reset, guidance_parallel),
}


def rank_main(rank: int, folder: str) -> None:
    """All scenarios of four ranks, then those of two, in which the last two have no part."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            rank_of_group(rank, world, folder)


def rank_of_group(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    with mock.patch.object(
        torch.accelerator, "device_count", lambda: 1
    ):  # diffusers divides by it
        for scenario in SCENARIOS[world]:
            torch.save(scenario(rank, world), file_of(folder, scenario, rank, world))
    distributed.barrier()
    distributed.destroy_process_group()


def file_of(folder: Path | str, scenario: Callable, rank: int, world: int) -> Path:
    return Path(folder) / f"{scenario.__name__}-{rank}-of-{world}.pt"


def run_ranks(folder: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """What every scenario returned on every rank of two and of four; a group that hangs is killed.

    The same processes for both, and forked: each would load torch and diffusers for 5 s first.
    """
    context = forked.context()
    ranks = [
        context.Process(target=rank_main, args=(rank, str(folder)), daemon=True)
        for rank in range(4)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(DEADLINE)
    finally:
        stuck = [process for process in ranks if process.is_alive()]
        for process in stuck:
            process.kill()
    assert not stuck, f"{len(stuck)} of 4 ranks did not finish in {DEADLINE} s"
    assert [process.exitcode for process in ranks] == [0] * 4
    return {
        world: {
            scenario.__name__: [
                torch.load(file_of(folder, scenario, rank, world)) for rank in range(world)
            ]
            for scenario in scenarios
        }
        for world, scenarios in SCENARIOS.items()
    }


@pytest.fixture(scope="module")
def groups() -> dict[int, dict[str, list[dict[str, Any]]]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(Path(folder))


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def ranks(request: pytest.FixtureRequest, groups: dict) -> dict[str, list[dict[str, Any]]]:
    return groups[request.param]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The same models in one process."""
    found = {}
    for name in MODELS:
        model = build(name)
        xs = measured_of(name, model)
        found[name] = {
            "plain": outputs_of(name, model),
            "rows": pairs_of(name, model),
            "xs": xs,
            "cached": cached_of(name, model, some_threshold(xs)),
            "forced": forced_of(name, model),
            "outputs_reused": forced_of(name, model, forecast_of="output"),
            "planned": planned_of(name, model) if name in PLANNED_MODELS else None,
        }
    return found


def scenario(ranks: dict, name: str) -> list[dict[str, Any]]:
    if name not in ranks:
        pytest.skip("runs on two ranks only")
    return ranks[name]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def figures(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor(
        [[row[name] for name in FIGURES] for row in rows], dtype=torch.float64
    )


# -- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_pairs_of_a_split_sequence_are_those_of_the_whole(
    name: str, ranks: dict, alone: dict
) -> None:
    parts = [rank[name] for rank in ranks["sequence_parallel"]]
    assert all(part["untouched"] for part in parts)
    assert len({repr(part["rows"]) for part in parts}) == 1
    for part in parts:
        assert_close(part["plain"], alone[name]["plain"])
        torch.testing.assert_close(
            figures(part["rows"]),
            figures(alone[name]["rows"]),
            rtol=0,
            atol=1e-6,
            equal_nan=True,
        )
        assert [row["step"] for row in part["rows"]] == list(range(1, STEPS))
    own = [figures(part["own_rows"]) for part in parts]
    assert any(
        (other - figures(alone[name]["rows"])).nan_to_num().abs().max() > 1e-3
        for other in own
    )


@pytest.mark.parametrize("name", MODELS)
def test_all_ranks_decide_alike_at_every_threshold(
    name: str, ranks: dict, alone: dict
) -> None:
    parts = [rank[name] for rank in ranks["sequence_parallel"]]
    whole = alone[name]["xs"]
    for part in parts:
        assert part["xs"] == parts[0]["xs"]
        assert part["xs"][0] is None
        assert part["xs"][1:] == pytest.approx(whole[1:], abs=1e-6)
    diverging = 0
    for threshold in THRESHOLDS:
        agreed = {decisions(part["xs"], threshold) for part in parts}
        assert agreed == {decisions(whole, threshold)}
        diverging += len({decisions(part["own_xs"], threshold) for part in parts}) > 1
    assert len(THRESHOLDS) == 190
    # Without the reduction the same ranks part, and one of them waits for ever.
    assert diverging > 0


@pytest.mark.parametrize("name", MODELS)
def test_gate_end_to_end(name: str, ranks: dict, alone: dict) -> None:
    """Real skips under a gate: one pattern on every rank, in both orders of applying, the whole model's outputs."""
    pattern, outputs = alone[name]["cached"]
    assert {"C", "S"} == set(pattern)
    for rank in ranks["sequence_parallel"]:
        for found in rank[name]["cached"]:
            assert found[0] == pattern
            assert_close(found[1], outputs)
        assert rank[name]["reductions"] == (STEPS, 0), (
            "one reduction per step for a gate, none for a schedule"
        )


@pytest.mark.parametrize("name", MODELS)
def test_forced_skips_are_exact_in_both_orders(name: str, ranks: dict, alone: dict) -> None:
    for rank in ranks["sequence_parallel"]:
        assert len(rank[name]["forced"]) == (2 if len(ranks["sequence_parallel"]) == 2 else 1)
        for pattern, outputs in rank[name]["forced"]:
            assert pattern == SCHEDULE
            assert_close(outputs, alone[name]["forced"][1])
        assert_close(rank[name]["outputs_reused"][1], alone[name]["outputs_reused"][1])


def test_a_rank_that_forgot_takes_all_with_it(ranks: dict) -> None:
    assert all(rank["pattern"] == "CSSSCSSS" for rank in ranks["one_rank_reset"])


@pytest.mark.parametrize("name", PLANNED_MODELS)
def test_plans_forecast_alike_on_every_rank(name: str, ranks: dict, alone: dict) -> None:
    """The whole model's patterns and outputs; a plan asks no other rank."""
    patterns = [pattern for pattern, _ in alone[name]["planned"]]
    assert set(patterns) == {f"{PLAN} {PLAN}"}
    for rank in scenario(ranks, "planned"):
        assert [pattern for pattern, _ in rank[name]] == patterns
        for (_, found), (_, expected) in zip(rank[name], alone[name]["planned"], strict=True):
            assert_close(found, expected)
        assert rank[name + " asked"] == 0


def test_a_shape_that_changes_on_one_rank_only(ranks: dict) -> None:
    for rank in scenario(ranks, "uneven_parts"):
        assert rank["patterns"] == ["CSSSCSSS"] * 2


def test_tensor_parallel_values_are_those_of_one_process(ranks: dict, alone: dict) -> None:
    parts, whole = scenario(ranks, "tensor_parallel"), alone["flux"]
    for part in parts:
        assert part["xs"] == parts[0]["xs"]
        assert part["xs"][1:] == pytest.approx(whole["xs"][1:], abs=1e-6)
        torch.testing.assert_close(
            figures(part["rows"]), figures(whole["rows"]), rtol=0, atol=1e-6, equal_nan=True
        )
        assert part["cached"][0] == whole["cached"][0]
        assert_close(part["cached"][1], whole["cached"][1])


def test_guidance_branches_decide_for_themselves(ranks: dict) -> None:
    patterns = [rank["patterns"] for rank in ranks["guidance_parallel"]]
    half = len(patterns) // 2
    assert all(first == second for first, second in patterns), (
        "a generation begins with nothing remembered"
    )
    assert (
        len({str(found) for found in patterns[:half]})
        == len({str(found) for found in patterns[half:]})
        == 1
    )
    assert patterns[0] != patterns[-1]


def test_sharded_parameters_are_safe_or_refused(ranks: dict) -> None:
    parts = scenario(ranks, "parameters_sharded")
    for name in ("flux", "wan21"):
        assert len({part[name]["pattern"] for part in parts}) == len(parts), (
            "the requests should decide differently"
        )
        for rank, part in enumerate(parts):
            model = build(name)
            with own_cache(model, (0.05, 0.45)[rank % 2]) as cache:
                expected = outputs_of(name, model, seed=rank)
                assert part[name]["pattern"] == cache.stats.pattern
            assert_close(part[name]["outputs"], expected)
    for part in parts:
        inner, wrapped = part["refused"]
        assert "transformer_blocks.1.ff is sharded apart from its block" in inner
        assert "transformer_blocks.1 is wrapped in FullyShardedDataParallel" in wrapped
        assert "fully_shard" in inner and "fully_shard" in wrapped


def test_figures_of_parts_are_those_of_the_whole() -> None:
    """Parts of unequal length, and what every part holds entire."""
    generator = torch.Generator().manual_seed(0)
    hidden, entry, before, entry_before = (
        torch.randn(1, 23, 8, generator=generator) for _ in range(4)
    )
    replicated = l1_sums(
        torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    )

    def row(piece: slice) -> torch.Tensor:
        found = exit_figures(
            hidden[:, piece], entry[:, piece], before[:, piece], entry_before[:, piece]
        )
        x = l1_sums(hidden[:, piece], before[:, piece])
        return torch.cat(
            [
                x,
                replicated,
                replicated,
                found["y_hidden"],
                found["y_residual"],
                found["ratios"],
            ]
        )[None]

    cuts = [slice(0, 3), slice(3, 10), slice(10, 23)]
    pooled = over_parts(
        torch.stack([row(cut) for cut in cuts]), torch.tensor([[3], [7], [13]])
    )[0]
    whole = row(slice(0, 23))[0].double()
    names = range(0, 10, 2)
    torch.testing.assert_close(
        pooled[names] / pooled[1:11:2], whole[names] / whole[1:11:2], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(pooled[10:], whole[10:], rtol=1e-5, atol=1e-7)


def test_private_places_of_diffusers() -> None:
    """The group is found where diffusers keeps it today; a release that moves it must fail here, not hang there."""
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

    model = build("flux")
    assert model._parallel_config is None
    assert ParallelConfig().context_parallel_config is None
    assert ParallelConfig().tensor_parallel_config is None
    assert ContextParallelConfig(ulysses_degree=2)._flattened_mesh is None
    assert TensorParallelConfig(tp_degree=2)._mesh is None
