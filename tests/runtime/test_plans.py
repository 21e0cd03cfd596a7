"""Applying a plan: what verified best at a speed-up, a plan's own forecast and its weights."""

import dataclasses

import pytest
import torch
import zoo
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import TinyPipeline

import coeffs
from runtime import Forecast, apply_tea_cache
from runtime.decide.choice import best_for
from runtime.errors import InvalidSetting

FITTED = coeffs.Plan(
    schedule="CCSCSCSS", forecast="fitted", forecast_of="output",
    weights=((1.5, -0.5), (1.4, -0.4), (1.3, -0.3), (1.6, -0.6)), figures={"speedup": 1.9, "psnr_db": 40.0},
)  # fmt: skip


def an_entry(plans=(FITTED,), gate=((1.5, 44.0), (2.5, 35.0))):
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, 0.0), domain=(0.0, 1.0))
    thresholds = [
        coeffs.Threshold(
            threshold=0.1 * (i + 1), speedup=speedup, psnr_db=psnr, kind="verified"
        )
        for i, (speedup, psnr) in enumerate(gate)
    ]
    return coeffs.Entry(
        model="tiny", status="measured", transformer_class="FluxTransformer2DModel", signal="modulated_input",
        target="output", experts={"transformer": coeffs.Expert(recommended="cond", branches={"cond": fit})},
        thresholds=tuple(thresholds), plans=plans,
    )  # fmt: skip


def test_the_better_of_gate_and_plan_is_taken():
    assert (
        best_for(an_entry(), 1.8) is FITTED
    )  # the gate that reaches 1.8 was verified at 35 dB
    assert best_for(an_entry(), 1.4) == pytest.approx(
        0.08
    )  # the gate, at 44 dB, beats the plan's 40
    assert best_for(an_entry(gate=()), 1.8) is FITTED
    assert best_for(an_entry(plans=None), 2.0) == pytest.approx(0.15)
    assert best_for(an_entry(), 2.4) == pytest.approx(0.19)  # too fast for the plan
    with pytest.raises(InvalidSetting, match="verified"):
        best_for(an_entry(gate=()), 2.2)


def test_speedup_runs_the_plan_with_its_forecast_and_says_so():
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, an_entry(), speedup=1.8) as cache:
        images = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    assert (
        cache.settings["policy"] == "plan" and cache.settings["schedule"] == FITTED.schedule
    )
    assert (
        cache.settings["forecast"] == "fitted" and cache.settings["forecast_of"] == "output"
    )
    assert cache.settings["entry"] == "tiny@v0" and cache.settings["threshold"] is None
    assert {found.pattern for found in cache.stats.branches.values()} == {FITTED.schedule}
    with apply_tea_cache(pipe, an_entry(), schedule=FITTED) as same:
        again = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    assert same.settings["policy"] == "plan" and (images == again).all()
    with apply_tea_cache(pipe, schedule=FITTED.schedule):
        reused = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    assert (images != reused).any()


def test_speedup_takes_the_gate_where_its_settings_are_given():
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, an_entry(), speedup=1.8, start=2) as cache:
        pass
    assert cache.settings["policy"] == "gate" and cache.settings[
        "threshold"
    ] == pytest.approx(0.13)


def test_a_plan_of_another_number_of_steps_is_refused():
    pipe = TinyPipeline()
    with (
        apply_tea_cache(pipe, an_entry(), speedup=1.8),
        pytest.raises(InvalidSetting, match="plan again"),
    ):
        pipe("a fish", num_inference_steps=6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"forecast": "linear", "weights": ((1.0,),)}, "only fitted"),
        ({"forecast": "fitted"}, "only fitted"),
        ({"forecast": "fitted", "weights": ((1.0,), (1.0,))}, "one per skipped"),
    ],
)
def test_weights_belong_to_a_fitted_forecast(fields, said):
    with pytest.raises(coeffs.errors.EntryError, match=said):
        coeffs.Plan(schedule="CS", **fields)


def test_other_noise_levels_than_the_plans_are_a_mismatch():
    """Bug: weights made for one shift applied under another without a word."""
    pipe = TinyPipeline()
    pipe.scheduler.set_timesteps(8)
    sigmas = tuple(pipe.scheduler.sigmas.tolist())
    same = dataclasses.replace(FITTED, sigmas=sigmas)
    other = dataclasses.replace(FITTED, sigmas=tuple(sigma**2 for sigma in sigmas))
    for plan, expected in ((same, []), (other, ["sigma of step 1"])):
        with apply_tea_cache(pipe, schedule=plan) as cache:
            pipe("a fish", generator=torch.Generator().manual_seed(0))
        assert [text[:15] for text in cache.mismatches] == expected
    with (
        apply_tea_cache(pipe, schedule=other, strict=True),
        pytest.raises(InvalidSetting, match="not planned for"),
    ):
        pipe("a fish", generator=torch.Generator().manual_seed(0))


# -- weights and the steps that they were made for -------------------------------------------------------------------


def images_of(pipe, **settings):
    with apply_tea_cache(pipe, **settings) as cache:
        images = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    return images, cache


def test_a_forced_step_makes_the_weights_wait():
    """Another shape in the middle is computed against the plan: the only anchor is of a step that was not planned."""
    model = zoo.build("flux")
    steps = list(zoo.trajectory("flux", total=6))
    for kwargs in steps[3:]:
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :-1]
        kwargs["txt_ids"] = kwargs["txt_ids"][:-1]
    weights = {step: (2.0,) for step in (2, 3, 4, 5)}
    with apply_tea_cache(
        model,
        schedule="CCSSSS",
        forecast=Forecast("fitted", weights),
        forecast_of="output",
    ) as cache:
        found = [zoo.run(model, kwargs)[0] for kwargs in steps]
    assert cache.stats.pattern == "CCSCSS"
    torch.testing.assert_close(found[2], 2 * found[1])
    assert torch.equal(found[4], found[3]) and torch.equal(found[5], found[3])


def test_weights_wait_in_the_second_expert_as_well():
    """It takes over at step 3, which it computes against the plan: step 5 has 4 and 3 before it, planned 4 and 1."""

    class Experts:
        components = {
            "transformer": zoo.build("flux"),
            "transformer_2": zoo.build("flux", seed=1),
        }
        scheduler = FlowMatchEulerDiscreteScheduler()

    target, outputs = Experts(), []
    target.scheduler.set_timesteps(7)
    weights = {step: (1.5, -0.5) for step in (2, 3, 5, 6)}
    with apply_tea_cache(
        target,
        schedule="CCSSCSS",
        forecast=Forecast("fitted", weights),
        forecast_of="output",
    ) as cache:
        for step, kwargs in enumerate(zoo.trajectory("flux", total=7)):
            target.scheduler._step_index = step
            model = list(target.components.values())[step >= 3]
            with model.cache_context("cond"):
                outputs.append(zoo.run(model, kwargs)[0])
    assert cache.stats.pattern == "CCSCCSS"
    torch.testing.assert_close(outputs[2], 1.5 * outputs[1] - 0.5 * outputs[0])
    assert torch.equal(outputs[5], outputs[4]) and torch.equal(outputs[6], outputs[4])


# -- an entry whose polynomial was fitted to a forecast's error -------------------------------------------------------


@pytest.mark.parametrize("how", [{"threshold": 0.3}, {"speedup": 2.4}])
@pytest.mark.parametrize(
    "fields",
    [
        {"forecast": "linear", "forecast_of": "output", "target": "forecast_error"},
        {"forecast": "linear", "forecast_of": "output"},
    ],
)
def test_an_entry_of_a_forecasts_error_loads_and_is_refused_as_a_gate(how, fields):
    pipe, entry = TinyPipeline(), dataclasses.replace(an_entry(), **fields)
    with pytest.raises(InvalidSetting, match="fit its run again"):
        apply_tea_cache(pipe, entry, **how)
    assert not hasattr(pipe.transformer, "_teacal_hooks")
    assert images_of(pipe, entry=entry, schedule=FITTED)[1].settings["forecast"] == "fitted"


def test_fewer_steps_are_advised_where_they_were_measured_better(caplog):
    figures = {"speedup": 1.9, "psnr_db": 40.0, "fewer_steps_psnr_db": 40.2}
    figures["fewer_steps_second_order_solver_psnr_db"] = 43.0
    worse = dataclasses.replace(FITTED, figures=figures)
    with apply_tea_cache(TinyPipeline(), an_entry((worse,)), speedup=1.8) as cache:
        advice = cache.settings["advice"]
    assert (
        "num_inference_steps=4 and DPM-Solver++ of order 2" in advice and "43.0 dB" in advice
    )
    assert advice in caplog.text
    figures = figures | {"fewer_steps_second_order_solver_psnr_db": 40.1}
    alike = dataclasses.replace(FITTED, figures=figures)
    with apply_tea_cache(TinyPipeline(), an_entry((alike,)), speedup=1.8) as cache:
        assert "advice" not in cache.settings  # no better than noise
