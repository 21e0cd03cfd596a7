"""The second-order solver (levels, error at equal steps, nothing left behind) and diffusers' caches."""

import contextlib
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipeline import TinyPipeline, tiny_session

from calibrate.model.checkpoint import find_checkpoint
from calibrate.model.loading import load_pipeline
from calibrate.model.prompts import load_prompts
from calibrate.trials.baselines import magcache
from calibrate.trials.rivals import counted, diffusers_cache, second_order
from calibrate.trials.sampler import Sampler
from calibrate.trials.setting import Refused, Setting
from runtime import UnsupportedModel

pytestmark = pytest.mark.slow

Euler = diffusers.FlowMatchEulerDiscreteScheduler
CAPTION = (
    "a handwritten digit seven in red ink on white paper"  # one that the model was trained on
)
FEWER, FEWER_2 = (
    Setting("fewer steps", "fewer_steps", 10, options=more)
    for more in ({}, {"solver_order": 2})
)
# Configurations as shipped with the checkpoints, and how their pipelines set the steps.
SCHEDULES = {
    "SD3 with levels": ({"shift": 3.0}, {"sigmas": np.linspace(1, 1 / 9, 9)}),
    "Flux": (
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        {"mu": 0.8},
    ),
    "Qwen-Image": (
        {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02},
        {"mu": 0.7},
    ),
    "linear time shift": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"mu": 1.3},
    ),
    "Karras levels": ({"use_karras_sigmas": True}, {"num_inference_steps": 9}),
}


@pytest.fixture(scope="module")
def longcat():
    pipe = load_pipeline(find_checkpoint("tiny-longcat-image"), dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def levels(pipe, options):
    if "mu" in options:
        options = {**options, "sigmas": np.linspace(1, 1 / 9, 9)}
    pipe.scheduler.set_timesteps(**options)
    return pipe.scheduler.sigmas, pipe.scheduler.timesteps


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_and_times_are_those_of_the_pipelines_own_scheduler(name):
    config, options = SCHEDULES[name]
    pipe = SimpleNamespace(scheduler=Euler(**config))
    own = levels(pipe, options)
    with second_order(pipe) as solver:
        found = levels(pipe, options)
        used = solver._solver.sigmas
    assert all(map(torch.equal, own, found))
    assert (used - own[0]).abs().max() <= 2e-6
    assert pipe.scheduler.config.items() >= config.items()


def test_a_shift_that_was_set_later_is_kept():
    pipe = SimpleNamespace(scheduler=Euler(shift=1.0))
    pipe.scheduler.set_shift(5.0)
    even = {"sigmas": np.linspace(1, 1 / 7, 7)}
    own = levels(pipe, even)
    with second_order(pipe):
        assert torch.equal(levels(pipe, even)[0], own[0])


def test_where_the_scheduler_chooses_the_levels_are_even_and_shifted():
    """Bug: Euler's own levels end at 0.009 before 0, a leap at which the solver fell far behind Euler itself."""
    pipe = SimpleNamespace(scheduler=Euler(shift=3.0))
    with second_order(pipe):
        found, times = levels(pipe, {"num_inference_steps": 5})
    even = np.array([1, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(found[:5], 3 * even / (1 + 2 * even), rtol=1e-6)
    np.testing.assert_allclose(times, 1000 * found[:5])
    assert found[5] == 0


def gaussian_error(scheduler, steps):
    """Error at the end of the flow from N(0, 1) to N(1.5, 0.5^2), whose velocity and map are known."""
    x = torch.tensor([[[0.7, -1.2, 2.0]]])
    exact = 1.5 + 0.5 * x
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    for time in scheduler.timesteps:
        level = float(time) / 1000
        clean, variance = 1 - level, (1 - level) ** 2 / 4 + level**2
        off = x - clean * 1.5
        velocity = level / variance * off - (1.5 + clean / 4 / variance * off)
        x = scheduler.step(velocity, time, x, return_dict=False)[0]
    return float((x - exact).abs().max())


def test_the_order_is_two_where_the_solution_is_known():
    """Halving the steps nearly quarters the error (the first and last are of order 1); Euler's is halved."""
    pipe = SimpleNamespace(scheduler=Euler())
    own = [gaussian_error(pipe.scheduler, steps) for steps in (80, 160)]
    with second_order(pipe) as solver:
        found = [gaussian_error(solver, steps) for steps in (80, 160)]
    assert 1.8 < own[0] / own[1] < 2.2
    assert 3.1 < found[0] / found[1] < 4.5 and found[1] < own[1] / 10


def test_it_comes_nearer_to_a_very_fine_solution_than_euler_at_equal_steps(longcat):
    arguments = {
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "enable_prompt_rewrite": False,
    }
    sampler, prompt = (
        Sampler(tiny_session(longcat, **arguments)),
        load_prompts([CAPTION]).prompts[0],
    )
    fine = sampler(prompt, num_steps=120).latents
    euler, better = (
        np.linalg.norm(sampler.run(setting, prompt).latents - fine)
        for setting in (FEWER, FEWER_2)
    )
    assert better < 0.75 * euler
    assert type(longcat.scheduler) is Euler


def test_float16_models_are_stepped_in_float32_as_euler_does():
    pipe, even = SimpleNamespace(scheduler=Euler()), np.linspace(1, 1 / 4, 4)
    pipe.scheduler.set_timesteps(sigmas=even)
    x, velocity = (
        torch.ones(1, 2, 3, dtype=torch.float16),
        torch.full((1, 2, 3), 0.1, dtype=torch.float16),
    )
    with second_order(pipe) as solver:
        solver.set_timesteps(sigmas=even)
        found = solver.step(velocity, solver.timesteps[0], x).prev_sample
        assert solver._solver.model_outputs[-1].dtype == torch.float32
    own = pipe.scheduler.step(velocity, pipe.scheduler.timesteps[0], x).prev_sample
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, own)  # the first step has nothing to be better with


def test_the_scheduler_is_put_back_whatever_happens():
    pipe = TinyPipeline()
    own, prompt = pipe.scheduler, load_prompts(["x"]).prompts[0]
    sampler = Sampler(tiny_session(pipe, num_inference_steps=8))
    before = sampler(prompt).media[0]
    found = sampler.run(FEWER_2, prompt)
    assert pipe.scheduler is own and found.computed_steps == 10.0

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    pipe.transformer.forward = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.run(FEWER_2, prompt)
    del pipe.transformer.forward
    assert pipe.scheduler is own
    np.testing.assert_array_equal(sampler(prompt).media[0], before)


def test_a_diffusers_pipeline_has_its_scheduler_and_config_back(longcat):
    own, config = longcat.scheduler, dict(longcat.config)
    with second_order(longcat):
        assert (
            longcat.scheduler is not own
            and longcat.components["scheduler"] is longcat.scheduler
        )
    assert longcat.scheduler is own and dict(longcat.config) == config


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            diffusers.UniPCMultistepScheduler(),
            "UniPCMultistepScheduler is of order 2 already: fewer-steps",
        ),
        (
            diffusers.FlowMatchHeunDiscreteScheduler(),
            "FlowMatchHeunDiscreteScheduler is of order 2 already",
        ),
        (diffusers.DDIMScheduler(), "DDIMScheduler: only FlowMatchEulerDiscreteScheduler"),
        (Euler(stochastic_sampling=True), "adds noise at every step"),
        (Euler(invert_sigmas=True), "counts noise levels upwards"),
        (None, "no scheduler"),
    ],
)
def test_other_schedulers_are_refused_in_one_line(scheduler, words):
    pipe = SimpleNamespace(scheduler=scheduler)
    with pytest.raises(Refused, match=words) as refused, second_order(pipe):
        pass
    assert "\n" not in str(refused.value) and pipe.scheduler is scheduler


def test_times_of_single_tokens_are_refused():
    pipe = SimpleNamespace(scheduler=Euler())
    with second_order(pipe) as solver, pytest.raises(Refused, match="every token"):
        solver.set_timesteps(4)
        solver.step(
            torch.ones(1, 2),
            solver.timesteps[0],
            torch.ones(1, 2),
            per_token_timesteps=torch.ones(1, 2),
        )


def test_magcache_plan_agrees_with_diffusers_decisions():
    pipe, rng = TinyPipeline(), np.random.default_rng(0)
    curve = [1.0, *(1 - 0.2 * rng.random(9))]
    options = {
        "mag_ratios": torch.tensor(curve),
        "num_inference_steps": 10,
        "threshold": 0.15,
    }
    assert diffusers.MagCacheConfig(**options).max_skip_steps == 3
    with diffusers_cache({"transformer": pipe.transformer}, "MagCache", options) as patterns:
        pipe("a", num_inference_steps=10, generator=torch.Generator().manual_seed(0))
        found = patterns()
    expected = magcache(curve[1:], 10, 0.15, max_skips=3, retention=0.2)
    assert set(found.values()) == {expected} and "S" in expected


def test_a_cache_of_diffusers_that_fails_while_running_is_refused_and_taken_off():
    class Forgetful(TinyPipeline):
        @contextlib.contextmanager
        def _branch(self, *_):  # as pipelines that never announce their branches
            yield

    forgetful = Forgetful()
    prompt = load_prompts(["x"]).prompts[0]
    sampler = Sampler(tiny_session(forgetful))
    before = sampler(prompt).media[0]
    with pytest.raises(Refused, match="FirstBlockCache fails on this model"):
        options = {"threshold": 0.1}
        sampler.run(Setting("FirstBlockCache", "FirstBlockCache", 4, options=options), prompt)
    np.testing.assert_array_equal(sampler(prompt).media[0], before)


def test_no_hook_stays_where_a_later_denoiser_cannot_be_watched():
    pipe = TinyPipeline()
    modules = {"transformer": pipe.transformer, "transformer_2": torch.nn.Linear(2, 2)}
    with pytest.raises(UnsupportedModel), counted(modules):
        pass
    hooks = [part._forward_hooks for part in pipe.transformer.modules()]
    assert not any(hooks)
