"""The cache and the recorder in real pipelines: the right state in every call of every step.

What a cached generation must give is computed by :class:`tiny_pipelines.Reference`, which runs all blocks on every
call and tells the guidance branches apart by the values of their embeddings. Latents must agree bit for bit, so a
residual of the wrong branch, expert, generation or pipeline anywhere shows.
"""

import copy
from collections.abc import Callable

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import CASES, STEPS, Case, Reference, flow_match

from calibrate.recorder import Recorder
from runtime import InvalidSetting, apply_tea_cache, denoisers
from runtime.apply import TeaCache

torch.set_num_threads(1)
# Seven random blocks change far more from step to step than a trained model's; nothing here depends on how much.
GATED = dict(coefficients=[1.0, 0.0], threshold=0.6, start=1, end=1)
SWITCH = 2  # the step at which Wan 2.2's second expert takes over, in the tiny pipeline's schedule


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
    return sum(len(handler._trajectories) for _, handler in cache._parts)


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
            parts = {expert: cache.stats.branches[expert, branch].pattern for expert in case.experts}
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

        handles = [m.register_forward_pre_hook(remember(e), with_kwargs=True) for e, m in case.experts.items()]
        case.run()
        for handle in handles:
            handle.remove()
    begins = {expert: first_step(case) for expert in case.experts}
    if len(begins) == 2:
        begins["transformer_2"] = len(times["transformer", 0])
    assert len(recording.rows) == (case.evaluations - len(case.experts)) * len(case.branches)
    for (expert, number), outputs in naive.outputs.items():
        rows = [r for r in recording.rows if (r["expert"], r["branch"]) == (expert, case.branches[number])]
        exits = naive.exits[expert, number]
        assert [row["step"] for row in rows] == list(range(begins[expert] + 1, begins[expert] + len(outputs)))
        assert [row["num_steps"] for row in rows] == [len(schedule_for(case))] * len(rows)
        assert [row["timestep"] for row in rows] == times[expert, number][1:]
        if sigmas is not None:
            assert [row["sigma"] for row in rows] == [float(sigmas[row["step"]]) for row in rows]
        for index, row in enumerate(rows):
            assert row["y_output"] == pytest.approx(distance(outputs[index + 1], outputs[index]), rel=1e-5)
            assert row["y_hidden"] == pytest.approx(distance(exits[index + 1], exits[index]), rel=1e-5)


def distance(now: torch.Tensor, before: torch.Tensor) -> float:
    now, before = now.double(), before.double()
    return ((now - before).abs().sum() / before.abs().sum()).item()


@pytest.mark.parametrize("inside", [True, False], ids=["in_the_blocks", "between_calls"])
@pytest.mark.parametrize("call", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["flux", "flux_img2img", "wan22", "lumina2", "dit", "stable_audio"])
def test_generation_after_an_interrupted_one_is_fresh(name: str, call: int, inside: bool) -> None:
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
            handles.append(dict(module.named_modules())[case.exit].register_forward_hook(fail))
        else:
            handles.append(module.register_forward_hook(fail))
