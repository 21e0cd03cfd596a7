"""Forecasts of the guided prediction, against a reference that wraps the scheduler's step by hand."""

import copy

import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import TinyExperts, TinyPipeline

import coeffs
from runtime import Forecast, InvalidSetting, apply_tea_cache
from runtime.anchors import Guided
from runtime.decide.forecast import extrapolation

torch.set_num_threads(1)


def length_of(name, case) -> int:
    """Steps of the schedule; image to image leaves out the first."""
    return tiny_pipelines.STEPS if name == "flux_img2img" else case.evaluations


def plan_of(steps: int) -> str:
    return ("CCSCSSCSSSCS" * 2)[:steps]


def all_anchors(schedule: str) -> dict[int, tuple[float, ...]]:
    """Weights of every computed step so far, newest first; they sum to 1."""
    rows = {}
    for step, letter in enumerate(schedule):
        count = schedule[:step].count("C")
        if letter == "S":
            older = [0.1 * (-1) ** index / (index + 1) for index in range(count - 1)]
            rows[step] = (1 - sum(older), *older)
    return rows


def referred(pipe, run, pattern: str, weights):
    """A generation whose scheduler is given ``weights(step, steps of the anchors)`` of what it received before.

    A pattern may begin with blanks, for steps of the schedule that are not run (image to image).
    """
    own, anchors, step = pipe.scheduler.step, [], pattern.count(" ")

    def wrapped(model_output, *args, **kwargs):
        nonlocal step
        if pattern[step] == "C":
            anchors.insert(0, (step, model_output.clone()))
        else:
            row = weights(step, [number for number, _ in anchors])
            total = anchors[0][1].float() * row[0]
            for weight, (_, value) in zip(row[1:], anchors[1:], strict=False):
                total.add_(value, alpha=weight)
            model_output = total.to(model_output.dtype)
        step += 1
        return own(model_output, *args, **kwargs)

    pipe.scheduler.step = wrapped
    try:
        return run()
    finally:
        del pipe.scheduler.step


def linear_in(levels):
    return lambda step, anchors: extrapolation(
        levels[step], [levels[at] for at in anchors[:2]]
    )


@pytest.mark.parametrize("name", tiny_pipelines.CASES)
def test_a_plan_that_computes_everything_changes_no_bit(name):
    case = tiny_pipelines.CASES[name]()
    with torch.inference_mode():
        plain = case.run()
        schedule = "C" * length_of(name, case)
        with apply_tea_cache(case.pipe, schedule=schedule, forecast_of="guided") as cache:
            assert torch.equal(case.run(), plain)
        assert cache.settings["forecast_of"] == "guided"
        assert torch.equal(case.run(), plain)


@pytest.mark.parametrize("kind", ["reuse", "linear", "fitted"])
@pytest.mark.parametrize("name", tiny_pipelines.CASES)
def test_a_forced_pattern_equals_the_reference_at_the_schedulers_step(name, kind):
    if (name, kind) == ("wan22", "linear"):
        pytest.skip("nothing is extrapolated from one expert to the other; tested below")
    case = tiny_pipelines.CASES[name]()
    schedule = plan_of(length_of(name, case))
    rows = all_anchors(schedule)
    forecast = Forecast("fitted", rows) if kind == "fitted" else kind
    how = {"schedule": schedule, "forecast": forecast, "forecast_of": "guided"}
    with torch.inference_mode():
        plain = case.run()
        levels = getattr(case.pipe.scheduler, "sigmas", -torch.arange(100.0)).tolist()
        with apply_tea_cache(case.pipe, **how) as cache:
            found = case.run()
            assert torch.equal(case.run(), found)
        pattern = cache.stats.pattern
        if name not in ("wan22", "lumina2"):
            patterns = {branch.pattern for branch in cache.stats.branches.values()}
            assert patterns == {schedule[-case.evaluations :]}
        pattern = pattern.rjust(len(schedule))

        def weights(step, anchors):
            planned = [at for at in range(step - 1, -1, -1) if schedule[at] == "C"]
            if kind == "linear":
                return linear_in(levels)(step, anchors)
            return rows[step] if kind == "fitted" and planned == anchors else (1.0,)

        expected = referred(case.pipe, case.run, pattern, weights)
    assert "S" in pattern and not torch.equal(found, plain)
    assert torch.equal(found, expected)


def test_reuse_under_euler_is_fewer_steps():
    case = tiny_pipelines.flux()
    with torch.inference_mode():
        coarser = case.run(num_inference_steps=3)
        with apply_tea_cache(case.pipe, schedule="CSCSCS", forecast_of="guided"):
            found = case.run()
    torch.testing.assert_close(found, coarser, rtol=1e-6, atol=1e-6)


def generate(pipe, **options):
    return torch.as_tensor(
        pipe("a fish", generator=torch.Generator().manual_seed(0), **options).images
    )


PLAN = coeffs.Plan(
    schedule="CCSCSSCS", forecast="fitted", forecast_of="guided",
    weights=tuple(all_anchors("CCSCSSCS").values()),
)  # fmt: skip


def test_a_plan_brings_weights_of_all_computed_steps():
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, schedule=PLAN) as cache:
        found = generate(pipe)
    assert cache.settings["forecast_of"] == "guided" and cache.settings["policy"] == "plan"
    expected = referred(
        pipe,
        lambda: generate(pipe),
        PLAN.schedule,
        lambda step, _: PLAN.weights_by_step[step],
    )
    assert torch.equal(found, expected)


def test_the_second_expert_starts_anew_but_for_weights():
    """It takes over at step 4, which it computes; linear forecasts need two steps of its own, weights reach back."""
    pipe, schedule, takes_over = TinyExperts(), "CCSCCSCS", 4
    rows = all_anchors(schedule)
    for forecast in ("linear", Forecast("fitted", rows)):
        how = {"schedule": schedule, "forecast": forecast, "forecast_of": "guided"}
        with apply_tea_cache(pipe, **how) as cache:
            found = generate(pipe)
        assert cache.stats.branches["transformer", "cond"].pattern == schedule[:takes_over]
        assert cache.stats.pattern == schedule
        levels = pipe.scheduler.sigmas.tolist()

        def weights(step, anchors, forecast=forecast, levels=levels):
            own = [at for at in anchors if (at >= takes_over) == (step >= takes_over)]
            return linear_in(levels)(step, own) if forecast == "linear" else rows[step]

        assert torch.equal(found, referred(pipe, lambda: generate(pipe), schedule, weights))


def test_a_gate_may_forecast_it_too():
    pipe = TinyPipeline()
    with apply_tea_cache(
        pipe,
        coefficients=[1.0, 0.0],
        threshold=0.6,
        forecast="linear",
        forecast_of="guided",
    ) as cache:
        found = generate(pipe)
    assert "S" in cache.stats.pattern
    levels = pipe.scheduler.sigmas.tolist()
    expected = referred(pipe, lambda: generate(pipe), cache.stats.pattern, linear_in(levels))
    assert torch.equal(found, expected)


def test_no_branch_runs_its_blocks_on_a_skipped_step():
    pipe = TinyPipeline()
    ran = []
    handle = pipe.transformer.single_transformer_blocks[-1].attn.register_forward_hook(
        lambda *_: ran.append(1)
    )
    with apply_tea_cache(pipe, schedule="CCSCSSCS", forecast_of="guided"):
        generate(pipe)
    handle.remove()
    assert len(ran) == 2 * 4


def test_a_model_output_given_by_name_is_replaced_as_well():
    class Named(TinyPipeline):
        def __call__(self, *args, **kwargs):
            own = self.scheduler

            class ByName:
                def __getattr__(self, name):
                    return getattr(own, name)

                def step(self, value, time, sample, **options):
                    return own.step(
                        sample=sample, model_output=value, timestep=time, **options
                    )

            self.scheduler = ByName()
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = own

    pipe, named = TinyPipeline(), Named()
    with apply_tea_cache(named, schedule=PLAN):
        by_name = generate(named)
    with apply_tea_cache(pipe, schedule=PLAN):
        assert torch.equal(by_name, generate(pipe))


def test_a_step_that_passes_all_its_arguments_on_is_forecast():
    class PassesOn(FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    pipe, plain = TinyPipeline(), TinyPipeline()
    pipe.scheduler = PassesOn.from_config(pipe.scheduler.config)
    with apply_tea_cache(pipe, schedule=PLAN), apply_tea_cache(plain, schedule=PLAN):
        assert torch.equal(generate(pipe), generate(plain))


def test_a_copy_of_the_scheduler_is_forecast_as_itself():
    """Pipelines with sound step a copy; the copy of a wrapped step would drive the original."""

    class WithSound(TinyPipeline):
        def __call__(self, *args, **kwargs):
            own, sound = self.scheduler, copy.deepcopy(self.scheduler)
            sound.set_timesteps(8)
            self.sound, outer = torch.ones(16), self

            class Both:
                def __getattr__(self, name):
                    return getattr(own, name)

                def step(self, value, time, sample, **options):
                    part = value.flatten()[:16]
                    outer.sound = sound.step(part, time, outer.sound, **options)[0]
                    return own.step(value, time, sample, **options)

            self.scheduler = Both()
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = own

    pipe, plain = WithSound(), TinyPipeline()
    latents = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda value: (latents.append(value), decode(value))[1]
    with apply_tea_cache(pipe, schedule=PLAN):
        images = generate(pipe)
    with apply_tea_cache(plain, schedule=PLAN):
        assert torch.equal(images, generate(plain))
    start = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    moved = (latents[0] - start).flatten()[:16]
    torch.testing.assert_close(pipe.sound - 1, moved, rtol=1e-5, atol=1e-5)


def test_removal_gives_the_scheduler_its_own_step_back():
    pipe = TinyPipeline()
    own, step, state = (
        type(pipe.scheduler),
        pipe.scheduler.step,
        set(pipe.scheduler.__dict__),
    )
    cache = apply_tea_cache(pipe, schedule=PLAN)
    assert type(pipe.scheduler) is not own and isinstance(pipe.scheduler, own)
    assert type(pipe.scheduler).__name__ == own.__name__
    stepped = copy.deepcopy(pipe.scheduler)
    cache.remove()
    assert type(pipe.scheduler) is own and pipe.scheduler.step == step
    assert set(pipe.scheduler.__dict__) == state
    plain = generate(pipe)
    pipe.scheduler = stepped  # a copy that outlives the cache
    assert torch.equal(generate(pipe), plain)


def test_an_exception_in_the_middle_leaves_nothing_stale():
    pipe = TinyPipeline()
    step = pipe.vae.decode
    with apply_tea_cache(pipe, schedule=PLAN):
        expected = generate(pipe)
        for stop in range(1, 7):
            calls = []

            def interrupt(*args, stop=stop, calls=calls):
                calls.append(1)
                if len(calls) > 2 * stop:
                    raise KeyError("stop")

            handle = pipe.transformer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyError):
                generate(pipe)
            handle.remove()
            assert torch.equal(generate(pipe), expected)
    assert pipe.vae.decode == step


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"branches": "apart"}, "all branches together"),
        ({"forecast_of": "guide"}, "expected residual, output, guided"),
    ],
)
def test_what_cannot_be_is_refused(how, said):
    pipe = TinyPipeline()
    with pytest.raises(InvalidSetting, match=said):
        apply_tea_cache(pipe, schedule=PLAN, **how)
    assert not hasattr(pipe.transformer, "_teacal_hooks")


def test_a_bare_denoiser_has_no_scheduler():
    with pytest.raises(InvalidSetting, match="a bare denoiser has none"):
        apply_tea_cache(TinyPipeline().transformer, schedule="CCSS", forecast_of="guided")


def test_a_pipeline_that_never_steps_its_scheduler_is_refused():
    class Own(TinyPipeline):
        """Steps by arithmetic of its own."""

        def __call__(self, *args, **kwargs):
            own = self.scheduler

            class Mine:
                def __getattr__(self, name):
                    return getattr(own, name)

                def step(self, value, time, sample, return_dict=False):
                    own._step_index = (own._step_index or 0) + 1
                    return (sample - value / 8,)

            self.scheduler = Mine()
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = own

    pipe = Own()
    with (
        apply_tea_cache(pipe, schedule=PLAN),
        pytest.raises(InvalidSetting, match="without calling step"),
    ):
        generate(pipe)
    with apply_tea_cache(pipe, schedule=PLAN, forecast="reuse", forecast_of="output"):
        generate(pipe)


def test_only_what_later_rows_use_is_kept(monkeypatch):
    schedule = "CCCCSCSS"
    forecast = Forecast(
        "fitted", {4: (1.0, 0.1, 0.2, 0.3), 6: (0.5, 0.5), 7: (0.5, 0.5)}, schedule=schedule
    )
    kept = [forecast.kept_from(step) for step in range(8)]
    assert [kept[0], kept[3], kept[5]] == [1, 4, 2]
    assert kept[7] == 1
    growing = Forecast("fitted", all_anchors("CCSCSSCS"), schedule="CCSCSSCS")
    assert [growing.kept_from(step) for step in (0, 1, 3, 6)] == [1, 2, 3, 4]
    pipe = TinyPipeline()
    held, step = [], Guided.step

    def counted(guided, value):
        result = step(guided, value)
        held.append(len(guided._anchors))
        return result

    monkeypatch.setattr(Guided, "step", counted)
    with apply_tea_cache(
        pipe, schedule=schedule, forecast=forecast, forecast_of="guided"
    ) as cache:
        generate(pipe)
        assert held == [1, 2, 3, 4, 4, 2, 2, 2]
        assert not cache._watch.stacks[0].handler._guided._anchors  # the generation is over
