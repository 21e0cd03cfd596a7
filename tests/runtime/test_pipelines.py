"""The cache and the recorder in real pipelines: the right state in every call of every step.

What a cached generation must give is computed by :class:`tiny_pipelines.Reference`, which runs all blocks on every
call and tells the guidance branches apart by the values of their embeddings. Latents must agree bit for bit, so a
residual of the wrong branch, expert, generation or pipeline anywhere shows.
"""

from collections.abc import Callable

import pytest
import torch
from tiny_pipelines import CASES, STEPS, Case, Reference, flow_match, flux_img2img

from calibrate.recording.recorder import Recorder
from runtime import InvalidSetting, apply_tea_cache, denoisers
from runtime.apply import TeaCache

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
# Seven random blocks change far more from step to step than a trained model's; nothing here depends on how much.
GATED = dict(coefficients=[1.0, 0.0], threshold=0.6, start=1, end=1)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def schedule_for(case: Case) -> str:
    """A plan for the whole schedule with single and double skips; img2img enters it late."""
    steps = case.evaluations if case.evaluations >= STEPS else STEPS
    return "".join("CSCSSCSCCSS"[i % 11] for i in range(steps))


def first_step(case: Case) -> int:
    return len(schedule_for(case)) - case.evaluations


def by_plan(case: Case, plan: str) -> Callable[[int, bool], bool]:
    """Skips of a plan, letter by letter; every expert computes when it begins."""
    return lambda call, first: not first and plan[first_step(case) + call] == "S"


class Decisions:
    """The decisions of a cached generation, call by call, for a reference to follow."""

    def __init__(self, cache: TeaCache) -> None:
        self.skips: list[bool] = []
        add = cache.stats.add

        def recording(expert: str, branch: str, decision: object) -> None:
            self.skips.append(decision.skip)
            add(expert, branch, decision)

        cache.stats.add = recording

    def followed(self) -> Callable[[int, bool], bool]:
        left = iter(self.skips)
        return lambda call, first: next(left)


def kept(cache: TeaCache) -> int:
    return sum(len(stack.trajectories) for stack in cache._watch.stacks)


# -- every pipeline ---------------------------------------------------------------------------------------------------


def test_threshold_zero_changes_no_bit(case: Case) -> None:
    plain = case.run(), case.run(seed=1)
    with apply_tea_cache(case.pipe, coefficients=[1.0, 0.0], threshold=0.0) as cache:
        assert torch.equal(case.run(), plain[0])
        assert torch.equal(case.run(seed=1), plain[1])
        assert cache.stats.skipped == 0
        assert cache.stats.computed == case.evaluations * len(case.branches)
        assert cache.stats.generations == 2
        assert kept(cache) == 0
    assert torch.equal(case.run(), plain[0])


def test_plan_is_followed_in_every_branch(case: Case) -> None:
    plan = schedule_for(case)
    plain = case.run()
    with Reference(case, by_plan(case, plan)) as reference:
        expected = case.run()
        reference.begin()
        other = case.run(seed=1)
    with apply_tea_cache(case.pipe, schedule=plan) as cache:
        assert torch.equal(case.run(), expected)
        assert torch.equal(case.run(seed=1), other), "the second generation"
        assert torch.equal(case.run(), expected), "the first one again"
        wanted = "C" + plan[first_step(case) + 1 :]
        for branch in case.branches:
            parts = {
                expert: cache.stats.branches[expert, branch].pattern
                for expert in case.experts
            }
            begins = 0
            for pattern in parts.values():
                assert pattern == "C" + wanted[begins + 1 : begins + len(pattern)]
                begins += len(pattern)
            assert begins == case.evaluations
        assert {branch for _, branch in cache.stats.branches} == set(case.branches)
        assert kept(cache) == 0
    assert not torch.equal(expected, plain)
    assert torch.equal(case.run(), plain)


def test_gate_skips_with_residuals_of_its_own_branch(case: Case) -> None:
    with apply_tea_cache(case.pipe, **GATED) as cache:
        decisions = Decisions(cache)
        found = case.run()
        skipped = cache.stats.skipped
    with Reference(case, decisions.followed()):
        assert torch.equal(case.run(), found)
    assert 0 < skipped < case.evaluations * len(case.branches)


def test_recorder_measures_every_branch_apart(case: Case) -> None:
    plain = case.run()
    with Recorder(denoisers(case.pipe), case.pipe) as recorder:
        recorder.start()
        assert torch.equal(case.run(), plain)
        recording = recorder.finish()
        recorder.start()
        case.run()
        again = recorder.finish()
    assert repr(again.rows) == repr(recording.rows)  # nan is equal to nan there
    sigmas = getattr(case.pipe.scheduler, "sigmas", None)
    with Reference(case, lambda *_: False) as naive:
        times: dict[tuple[str, int], list[float]] = {}

        def remember(expert: str) -> Callable:
            def hook(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
                value = args[1] if len(args) > 1 else kwargs["timestep"]
                times.setdefault((expert, naive.key[1]), []).append(float(value.max()))

            return hook

        handles = [
            m.register_forward_pre_hook(remember(e), with_kwargs=True)
            for e, m in case.experts.items()
        ]
        case.run()
        for handle in handles:
            handle.remove()
    begins = {expert: first_step(case) for expert in case.experts}
    if len(begins) == 2:
        begins["transformer_2"] = len(times["transformer", 0])
    assert len(recording.rows) == (case.evaluations - len(case.experts)) * len(case.branches)
    for (expert, number), outputs in naive.outputs.items():
        rows = [
            r
            for r in recording.rows
            if (r["expert"], r["branch"]) == (expert, case.branches[number])
        ]
        exits = naive.exits[expert, number]
        assert [row["step"] for row in rows] == list(
            range(begins[expert] + 1, begins[expert] + len(outputs))
        )
        assert [row["num_steps"] for row in rows] == [len(schedule_for(case))] * len(rows)
        assert [row["timestep"] for row in rows] == times[expert, number][1:]
        if sigmas is not None:
            assert [row["sigma"] for row in rows] == [
                float(sigmas[row["step"]]) for row in rows
            ]
        for index, row in enumerate(rows):
            assert row["y_output"] == pytest.approx(
                distance(outputs[index + 1], outputs[index]), rel=1e-5
            )
            assert row["y_hidden"] == pytest.approx(
                distance(exits[index + 1], exits[index]), rel=1e-5
            )


def distance(now: torch.Tensor, before: torch.Tensor) -> float:
    now, before = now.double(), before.double()
    return ((now - before).abs().sum() / before.abs().sum()).item()


@pytest.mark.parametrize("inside", [True, False], ids=["in_the_blocks", "between_calls"])
@pytest.mark.parametrize("call", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "name", ["flux", "flux_img2img", "wan22", "lumina2", "dit", "stable_audio"]
)
def test_generation_after_an_interrupted_one_is_fresh(
    name: str, call: int, inside: bool
) -> None:
    """An error in the middle of a generation leaves nothing that the next one could see."""
    case = CASES[name]()
    with apply_tea_cache(case.pipe, **GATED) as cache:
        expected = case.run()
        interrupt(case, call, inside)
        with pytest.raises(KeyError, match="interrupted"):
            case.run(seed=1)
        decisions = Decisions(cache)
        assert torch.equal(case.run(), expected)
    with Reference(case, decisions.followed()):
        assert torch.equal(case.run(), expected)


def interrupt(case: Case, call: int, inside: bool) -> None:
    """Make denoiser call number ``call`` raise once, before its end or before its beginning."""
    handles, seen = [], [-1]

    def count(*_: object) -> None:
        seen[0] += 1

    def fail(*_: object) -> None:
        if seen[0] >= call:
            for handle in handles:
                handle.remove()
            raise KeyError("interrupted")

    for module in case.experts.values():
        handles.append(module.register_forward_pre_hook(count))
        if inside:
            handles.append(
                dict(module.named_modules())[case.exit].register_forward_hook(fail)
            )
        else:
            handles.append(module.register_forward_hook(fail))


# -- guidance that comes and goes -------------------------------------------------------------------------------------


def assert_follows(case: Case, settings: dict, **changes: object) -> TeaCache:
    """A cached generation equals the reference that follows its decisions; the removed cache's handle."""
    with apply_tea_cache(case.pipe, **settings) as cache:
        decisions = Decisions(cache)
        found = case.run(**changes)
    with Reference(case, decisions.followed()):
        assert torch.equal(case.run(**changes), found)
    return cache


def guidance(*, off_at: int, on_at: int) -> Callable:
    """A callback that turns guidance off and on again between two steps."""

    def callback(pipe: object, step: int, timestep: object, kwargs: dict) -> dict:
        if step + 1 in (off_at, on_at):
            pipe._guidance_scale = 1.0 if step + 1 == off_at else 3.0
        return {}

    return callback


@pytest.mark.parametrize("name", ["chroma", "wan21"])
def test_guidance_that_stops_and_starts_midway(name: str) -> None:
    """A branch that was left out for a step computes when it comes back, whatever the plan says."""
    case = CASES[name]()
    callback = guidance(off_at=2, on_at=4)
    cache = assert_follows(case, {"schedule": "CSCSSC"}, callback_on_step_end=callback)
    cond, uncond = (cache.stats.branches["transformer", branch] for branch in case.branches)
    assert (cond.pattern, uncond.pattern) == ("CSCSSC", "CSCC")
    with Recorder(denoisers(case.pipe), case.pipe) as recorder:
        recorder.start()
        case.run(callback_on_step_end=callback)
        rows = recorder.finish().rows
    assert [row["step"] for row in rows if row["branch"] == case.branches[0]] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert [row["step"] for row in rows if row["branch"] == case.branches[1]] == [1, 5]


def test_guidance_that_ends_early_by_the_pipelines_own_setting() -> None:
    case = CASES["lumina2"]()
    cache = assert_follows(case, {"schedule": "CSCSSC"}, cfg_trunc_ratio=0.5)
    patterns = [stats.pattern for stats in cache.stats.branches.values()]
    assert patterns == ["CSCSSC", "CSC"]


@pytest.mark.parametrize("name", ["longcat_image", "flux"])
def test_without_guidance_there_is_one_branch(name: str) -> None:
    case = CASES[name]()
    off = {"guidance_scale": 1.0} if name == "longcat_image" else {"true_cfg_scale": 1.0}
    cache = assert_follows(case, {"schedule": "CSCSSC"}, **off)
    assert {key: stats.pattern for key, stats in cache.stats.branches.items()} == {
        ("transformer", "cond"): "CSCSSC"
    }


def test_skip_layer_guidance_is_a_branch_of_its_own() -> None:
    """A further call of half the batch that leaves a block out, in the middle steps only."""
    case = CASES["sd3"]()
    extra = dict(
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.8,
    )
    cache = assert_follows(case, {"schedule": "CSCSSC"}, **extra)
    patterns = [stats.pattern for stats in cache.stats.branches.values()]
    assert patterns == ["CSCSSC", "CCSS"]
    plain = case.run(**extra)
    with apply_tea_cache(case.pipe, coefficients=[1.0, 0.0], threshold=0.0):
        assert torch.equal(case.run(**extra), plain)


# -- sizes, batches, lengths ------------------------------------------------------------------------------------------


def doubled(case: Case) -> dict[str, torch.Tensor]:
    return {
        k: torch.cat([v] * 2)
        for k, v in case.arguments.items()
        if isinstance(v, torch.Tensor)
    }


@pytest.mark.parametrize("name", ["flux", "wan22", "chroma", "sd3"])
def test_size_batch_and_length_may_change_between_generations(name: str) -> None:
    case = CASES[name]()
    height = 128 if name == "wan22" else 32
    changes = [{}, {"height": height}, {}, doubled(case), {"num_inference_steps": 4}, {}]
    alone = []
    for change in changes:
        with apply_tea_cache(case.pipe, **GATED):
            alone.append(case.run(**change))
    with apply_tea_cache(case.pipe, **GATED) as cache:
        for change, expected in zip(changes, alone, strict=True):
            assert torch.equal(case.run(**change), expected)
        assert cache.stats.generations == len(changes)
        assert "shape_changed" not in cache.stats.totals


def test_shape_that_changes_within_a_generation_computes() -> None:
    """The batch is doubled between two steps: nothing of before fits."""
    case = CASES["flux"]()

    def double(pipe: object, step: int, timestep: object, kwargs: dict) -> dict:
        return (
            {name: torch.cat([tensor] * 2) for name, tensor in kwargs.items()}
            if step == 2
            else {}
        )

    changes = dict(
        true_cfg_scale=1.0,
        callback_on_step_end=double,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    with apply_tea_cache(case.pipe, schedule="CSSSSC") as cache:
        found = case.run(**changes)
        assert cache.stats.pattern == "CSSCSC"
        assert cache.stats.totals["shape_changed"] == 1
    assert found.shape[0] == 2
    assert torch.equal(found[0], found[1])


def test_plan_of_another_length_is_refused() -> None:
    case = CASES["flux"]()
    plain = case.run()
    cache = apply_tea_cache(case.pipe, schedule="CSCSSCC")
    with pytest.raises(InvalidSetting, match="schedule of 7 steps on a run of 6"):
        case.run()
    cache.remove()
    assert torch.equal(case.run(), plain)


# -- one denoiser in two pipelines ------------------------------------------------------------------------------------


def img2img_of(one: Case, own_scheduler: bool) -> Case:
    return flux_img2img(one, **({"scheduler": flow_match()} if own_scheduler else {}))


@pytest.mark.parametrize(
    "own_scheduler", [False, True], ids=["shared_scheduler", "own_scheduler"]
)
def test_two_pipelines_may_share_a_denoiser(own_scheduler: bool) -> None:
    """The cache is applied to the first; whichever runs, every skip uses a residual of the same generation."""
    one = CASES["flux"]()
    other = img2img_of(one, own_scheduler)
    order = [other, one, other, other, one, one, other]
    with apply_tea_cache(one.pipe, **GATED) as cache:
        decisions = Decisions(cache)
        found, skips = [], []
        for case in order:
            decisions.skips.clear()
            found.append(case.run())
            skips.append(list(decisions.skips))
            assert len(cache.stats.branches) <= 8
            assert kept(cache) <= 8
        assert all(any(taken) for taken in skips[1:])
    for case, latents, taken in zip(order, found, skips, strict=True):
        decisions.skips = taken
        with Reference(case, decisions.followed()):
            assert torch.equal(case.run(), latents)


def test_plan_in_a_second_pipeline_after_the_first_has_finished() -> None:
    """The first pipeline's scheduler stands at its end while the second one drives the denoiser with its own."""
    one = CASES["flux"]()
    other = img2img_of(one, own_scheduler=True)
    with apply_tea_cache(one.pipe, schedule="CSCSSC") as cache:
        one.run()
        other.run()
        assert [stats.pattern for stats in cache.stats.branches.values()] == [
            "CSCSS",
            "CSCSS",
        ]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_first_expert_is_freed_once_the_second_has_taken_over() -> None:
    case = CASES["wan22"]()
    held = []
    with apply_tea_cache(case.pipe, **GATED) as cache:
        stacks = cache._watch.stacks

        def look(pipe: object, step: int, timestep: object, kwargs: dict) -> dict:
            held.append(tuple(len(stack.trajectories) for stack in stacks))
            return {}

        case.run(callback_on_step_end=look)
        assert held == [(2, 0), (2, 0), (2, 2), (0, 2), (0, 2), (0, 2)]
        assert kept(cache) == 0
        interrupt(case, 5, inside=False)
        with pytest.raises(KeyError):
            case.run()
        assert kept(cache) > 0
        cache.reset()
        assert kept(cache) == 0


def test_statistics_are_those_of_the_latest_generation() -> None:
    case = CASES["wan22"]()
    with apply_tea_cache(case.pipe, schedule="CSCSSC") as cache:
        case.run()
        assert cache.stats.pattern == "CSCSSC"
        interrupt(case, 1, inside=False)
        with pytest.raises(KeyError):
            case.run()
        assert cache.stats.pattern == "C"
        assert cache.stats.generations == 2
        case.run()
        assert cache.stats.pattern == "CSCSSC"
        assert cache.stats.generations == 3
