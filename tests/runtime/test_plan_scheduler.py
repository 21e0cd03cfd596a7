"""A plan as a scheduler of its own: the bits of the hooks, without hooks."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_pipeline import TinyPipeline

import coeffs
from runtime import InvalidSetting, apply_tea_cache, plan_scheduler

SCHEDULE = "CCSCSSCS"
ROWS = ((1.5, -0.5), (1.3, -0.2, -0.1), (1.6, -0.5, -0.1), (1.2, 0.1, -0.2, -0.1))
FORECASTS = {
    "fitted": {"forecast": "fitted", "weights": ROWS},
    "linear": {"forecast": "linear"},
    "reuse": {},
}
SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": DDIMScheduler(clip_sample=False),
    "multistep": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "stochastic": DDPMScheduler(clip_sample=False),
}


def run(pipe, steps=8):
    torch.manual_seed(0)  # of a stochastic scheduler
    return pipe(
        "a fish", num_inference_steps=steps, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("forecast", FORECASTS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_gives_the_bits_of_the_hooks_with_as_many_evaluations(name, forecast):
    plan = coeffs.Plan(schedule=SCHEDULE, forecast_of="guided", **FORECASTS[forecast])
    pipe = TinyPipeline()
    pipe.scheduler = copy.deepcopy(SCHEDULERS[name])
    uncached = run(pipe).images
    with apply_tea_cache(pipe, schedule=plan):
        hooked = run(pipe).images
    calls = []
    pipe.transformer.register_forward_hook(lambda *given: calls.append(1))
    pipe.scheduler = plan_scheduler(pipe.scheduler, plan)
    assert type(pipe.scheduler).__name__ == type(SCHEDULERS[name]).__name__
    for _ in range(2):
        assert (run(pipe).images == hooked).all() and (hooked != uncached).any()
    assert len(pipe.scheduler.timesteps) == SCHEDULE.count("C")
    assert len(calls) == 2 * 2 * SCHEDULE.count("C")  # two runs, two branches


def test_another_number_of_steps_is_refused():
    pipe = TinyPipeline()
    plan = coeffs.Plan(schedule=SCHEDULE, forecast_of="guided")
    pipe.scheduler = plan_scheduler(pipe.scheduler, plan)
    with pytest.raises(InvalidSetting, match="9 steps: the plan is one of 8"):
        run(pipe, 9)


def test_a_plan_of_residuals_is_refused():
    with pytest.raises(InvalidSetting, match="a scheduler receives the guided"):
        plan_scheduler(TinyPipeline().scheduler, coeffs.Plan(schedule=SCHEDULE))
