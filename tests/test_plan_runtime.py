"""Applying a plan: what verified best at a speed-up, and a plan's own forecast."""

import dataclasses

import pytest
import torch
from tiny_pipeline import TinyPipeline

import coeffs
from runtime import apply_tea_cache
from runtime.apply import best_for
from runtime.errors import InvalidSetting

FITTED = coeffs.Plan(
    schedule="CCSCSCSS", forecast="fitted", forecast_of="output",
    weights=((1.5, -0.5), (1.4, -0.4), (1.3, -0.3), (1.6, -0.6)), figures={"speedup": 1.9, "psnr_db": 40.0},
)  # fmt: skip


def an_entry(plans=(FITTED,), gate=((1.5, 44.0), (2.5, 35.0))):
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, 0.0), domain=(0.0, 1.0))
    thresholds = [
        coeffs.Threshold(threshold=0.1 * (i + 1), speedup=speedup, psnr_db=psnr, kind="verified")
        for i, (speedup, psnr) in enumerate(gate)
    ]
    return coeffs.Entry(
        model="tiny", status="measured", transformer_class="FluxTransformer2DModel", signal="modulated_input",
        target="output", experts={"transformer": coeffs.Expert(recommended="cond", branches={"cond": fit})},
        thresholds=tuple(thresholds), plans=plans,
    )  # fmt: skip


def test_the_better_of_gate_and_plan_is_taken():
    assert best_for(an_entry(), 1.8) is FITTED  # the gate that reaches 1.8 was verified at 35 dB
    assert best_for(an_entry(), 1.4) == pytest.approx(0.08)  # the gate, at 44 dB, beats the plan's 40
    assert best_for(an_entry(gate=()), 1.8) is FITTED
    assert best_for(an_entry(plans=None), 2.0) == pytest.approx(0.15)
    assert best_for(an_entry(), 2.4) == pytest.approx(0.19)  # too fast for the plan
    with pytest.raises(InvalidSetting, match="verified"):
        best_for(an_entry(gate=()), 2.2)


def test_speedup_runs_the_plan_with_its_forecast_and_says_so():
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, an_entry(), speedup=1.8) as cache:
        images = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    assert cache.settings["policy"] == "plan" and cache.settings["schedule"] == FITTED.schedule
    assert cache.settings["forecast"] == "fitted" and cache.settings["forecast_of"] == "output"
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
    assert cache.settings["policy"] == "gate" and cache.settings["threshold"] == pytest.approx(0.13)


def test_a_plan_of_another_number_of_steps_is_refused():
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, an_entry(), speedup=1.8), pytest.raises(InvalidSetting, match="plan again"):
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
    with apply_tea_cache(pipe, schedule=other, strict=True), pytest.raises(InvalidSetting, match="not planned for"):
        pipe("a fish", generator=torch.Generator().manual_seed(0))
