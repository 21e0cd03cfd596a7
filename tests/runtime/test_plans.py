"""Applying a plan: what verified best at a speed-up, a plan's own forecast, its guard; and the gate's forecast."""

import dataclasses

import pytest
import torch
import zoo
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import TinyPipeline

import coeffs
from runtime import Forecast, apply_tea_cache
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


# -- the guard --------------------------------------------------------------------------------------------------------

SETTLES = [
    1e-9
]  # the gate predicts next to nothing at every step: a guard far above is never reached
STEADY = [0.1]  # 0.1 at every step, whatever x: a guard of 0.15 lets one skip in a row pass


def images_of(pipe, **settings):
    with apply_tea_cache(pipe, **settings) as cache:
        images = pipe("a fish", generator=torch.Generator().manual_seed(0)).images
    return images, cache


def patterns(cache):
    return {found.pattern for found in cache.stats.branches.values()}


@settings(deadline=None, max_examples=12)
@given(st.text("CS", min_size=7, max_size=7), st.sampled_from(["reuse", "linear", "quadratic", "fitted"]),
       st.sampled_from(["residual", "output"]), st.sampled_from(["together", "apart"]))  # fmt: skip
def test_a_guard_that_nothing_reaches_changes_no_bit(rest, kind, of, branches):
    plan = "C" + rest
    skipped = [step for step, letter in enumerate(plan) if letter == "S"]
    if kind == "fitted":
        kind = Forecast("fitted", {step: (1.2, -0.2) for step in skipped} or {1: (1.0,)})
    pipe, how = (
        TinyPipeline(),
        {"schedule": plan, "forecast": kind, "forecast_of": of, "branches": branches},
    )
    alone, _ = images_of(pipe, **how)
    guarded, cache = images_of(pipe, **how, guard=1e9, coefficients=SETTLES)
    assert (alone == guarded).all() and patterns(cache) == {plan}
    assert cache.settings["guard"] == 1e9 and cache.settings["policy"] == "schedule"


def test_a_guard_adds_computed_steps_only_and_for_all_branches():
    pipe, entry = TinyPipeline(), an_entry()
    _, free = images_of(pipe, entry=entry, threshold=0.0)
    for guard in (1e-6, 0.02, 0.1, 0.4, 1e6):
        _, cache = images_of(pipe, entry=entry, schedule=FITTED, guard=guard)
        (pattern,) = patterns(cache)
        assert all(
            found == "C"
            for found, planned in zip(pattern, FITTED.schedule, strict=True)
            if planned == "C"
        )
        assert (
            cache.stats.branches["transformer", "cond"].reasons["guarded"] == pattern.count("C") - 4
        )
        assert cache.settings["guard"] == guard and cache.settings["entry"] == "tiny@v0"
        if guard == 1e-6:
            assert pattern == "C" * 8
    assert pattern == FITTED.schedule and "guarded 4" not in str(cache.stats)
    assert free.settings["guard"] is None


def test_speedup_takes_a_guarded_plan():
    pipe = TinyPipeline()
    planned, _ = images_of(pipe, entry=an_entry(), schedule=FITTED)
    found, cache = images_of(pipe, entry=an_entry(), speedup=1.8, guard=1e6)
    assert (planned == found).all() and cache.settings["policy"] == "plan"
    with pytest.raises(InvalidSetting, match=r"for speedup 1\.4 the gate is taken"):
        apply_tea_cache(pipe, an_entry(), speedup=1.4, guard=0.2)
    assert patterns(images_of(pipe, entry=an_entry(), speedup=1.8, guard=1e-6)[1]) == {"C" * 8}


def test_weights_are_not_applied_to_anchors_they_were_not_made_for():
    """Predictions of 0.1 under a guard of 0.15: of CCSSSSCCSCSS it makes CCSCSCCCSCSC.

    Step 2 is planned (anchors 1, 0), steps 4 and 8 and 10: 4 has 3 and 1 instead, so 3 is reused; 8 has 7 and 6, and
    10 has 9 and 7, as planned again.
    """
    plan = "CCSSSSCCSCSS"
    weights = {step: (1.5, -0.5) for step in (2, 3, 4, 5, 8, 10, 11)}
    model = zoo.build("flux")
    steps = list(zoo.trajectory("flux", total=len(plan)))
    plain = [zoo.run(model, kwargs)[0] for kwargs in steps]
    for forecast in (Forecast("fitted", weights), Forecast("fitted", weights, schedule=plan)):
        with apply_tea_cache(
            model,
            schedule=plan,
            forecast=forecast,
            forecast_of="output",
            guard=0.15,
            coefficients=STEADY,
        ) as cache:
            found = [zoo.run(model, kwargs)[0] for kwargs in steps]
        assert cache.stats.pattern == "CCSCSCCCSCSC"
        assert torch.equal(found[4], plain[3])
        for step, newest, older in ((2, 1, 0), (8, 7, 6), (10, 9, 7)):
            torch.testing.assert_close(found[step], 1.5 * plain[newest] - 0.5 * plain[older])


@pytest.mark.parametrize("of", ["residual", "output"])
def test_after_an_added_step_a_fitted_forecast_is_reuse(of):
    """CCSSSS becomes CCSCSC: the weights of step 4 could tell it from reuse, and must not."""
    model = zoo.build("flux")
    steps = list(zoo.trajectory("flux", total=6))
    rows = [{2: (1.5, -0.5), 4: (1.5, -0.5)}, {2: (1.5, -0.5)}]
    found = []
    for weights in rows:
        how = {
            "forecast": Forecast("fitted", weights),
            "forecast_of": of,
            "guard": 0.15,
            "coefficients": STEADY,
        }
        with apply_tea_cache(model, schedule="CCSSSS", **how) as cache:
            found.append([zoo.run(model, kwargs)[0] for kwargs in steps])
        assert cache.stats.pattern == "CCSCSC"
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("guard", [None, 1e9])
def test_a_forced_step_makes_the_weights_wait_as_well(guard):
    """Another shape in the middle is computed against the plan: the only anchor is of a step that was not planned."""
    model = zoo.build("flux")
    steps = list(zoo.trajectory("flux", total=6))
    for kwargs in steps[3:]:
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :-1]
        kwargs["txt_ids"] = kwargs["txt_ids"][:-1]
    weights = {step: (2.0,) for step in (2, 3, 4, 5)}
    watched = {} if guard is None else {"guard": guard, "coefficients": SETTLES}
    with apply_tea_cache(
        model,
        schedule="CCSSSS",
        forecast=Forecast("fitted", weights),
        forecast_of="output",
        **watched,
    ) as cache:
        found = [zoo.run(model, kwargs)[0] for kwargs in steps]
    assert cache.stats.pattern == "CCSCSS"
    torch.testing.assert_close(found[2], 2 * found[1])
    assert torch.equal(found[4], found[3]) and torch.equal(found[5], found[3])


def test_weights_wait_in_the_second_expert_as_well():
    """It takes over at step 3, which it computes against the plan: step 5 has 4 and 3 before it, planned 4 and 1."""

    class Experts:
        components = {"transformer": zoo.build("flux"), "transformer_2": zoo.build("flux", seed=1)}
        scheduler = FlowMatchEulerDiscreteScheduler()

    target, outputs = Experts(), []
    target.scheduler.set_timesteps(7)
    weights = {step: (1.5, -0.5) for step in (2, 3, 5, 6)}
    with apply_tea_cache(
        target, schedule="CCSSCSS", forecast=Forecast("fitted", weights), forecast_of="output"
    ) as cache:
        for step, kwargs in enumerate(zoo.trajectory("flux", total=7)):
            target.scheduler._step_index = step
            model = list(target.components.values())[step >= 3]
            with model.cache_context("cond"):
                outputs.append(zoo.run(model, kwargs)[0])
    assert cache.stats.pattern == "CCSCCSS"
    torch.testing.assert_close(outputs[2], 1.5 * outputs[1] - 0.5 * outputs[0])
    assert torch.equal(outputs[5], outputs[4]) and torch.equal(outputs[6], outputs[4])


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"schedule": "CCSS", "guard": 0.1}, "guard= needs a polynomial"),
        ({"schedule": FITTED, "guard": 0.1}, "guard= needs a polynomial"),
        ({"entry": an_entry(), "threshold": 0.1, "guard": 0.1}, "guard= watches a plan"),
        ({"entry": an_entry(), "guard": 0.1}, "exactly one of"),
        ({"entry": an_entry(), "schedule": FITTED, "guard": 0.0}, "expected a number > 0"),
        ({"entry": an_entry(), "schedule": FITTED, "guard": float("inf")}, "expected a number > 0"),
        ({"entry": an_entry(), "schedule": FITTED, "guard": 0.1, "start": 2}, "no meaning beside"),
        (
            {"entry": an_entry(), "schedule": FITTED, "guard": 0.1, "coefficients": [1.0]},
            "expected one of them",
        ),
        ({"schedule": FITTED, "coefficients": [1.0]}, "no meaning beside"),
        ({"entry": an_entry(), "speedup": 1.8, "start": 2, "guard": 0.1}, "the gate is taken"),
    ],
    ids=str,
)
def test_a_guard_without_its_plan_or_polynomial_is_refused(given_, said):
    pipe = TinyPipeline()
    with pytest.raises(InvalidSetting, match=said):
        apply_tea_cache(pipe, **given_)
    bare = dataclasses.replace(an_entry(), experts={"transformer": coeffs.Expert()})
    with pytest.raises(coeffs.errors.EntryError, match="no coefficients for transformer"):
        apply_tea_cache(pipe, bare, schedule=FITTED, guard=0.1)
    assert not hasattr(pipe.transformer, "_teacal_hooks")


def test_a_guard_makes_the_entrys_settings_matter():
    """Its polynomial was measured at a number of steps, with a scheduler; a plan alone does not care."""
    entry = dataclasses.replace(an_entry(), protocol=coeffs.Protocol(num_steps=50))
    pipe = TinyPipeline()
    assert images_of(pipe, entry=entry, schedule=FITTED)[1].mismatches == []
    assert images_of(pipe, entry=entry, schedule=FITTED, guard=0.2)[1].mismatches == [
        "num_steps: 50 in the entry, 8 here"
    ]
    with pytest.raises(InvalidSetting, match="calibrate at 8 steps"):
        images_of(pipe, entry=entry, schedule=FITTED, guard=0.2, strict=True)


# -- the gate's own forecast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"threshold": 0.3}, {"speedup": 2.4}])
def test_the_gate_forecasts_as_its_entry_was_fitted(how):
    pipe, plain = TinyPipeline(), an_entry()
    entry = dataclasses.replace(
        plain, forecast="linear", forecast_of="output", target="forecast_error"
    )
    expected, _ = images_of(pipe, entry=plain, **how, forecast="linear", forecast_of="output")
    found, cache = images_of(pipe, entry=entry, **how)
    assert (found == expected).all() and "S" in cache.stats.pattern and cache.mismatches == []
    assert cache.settings["policy"] == "gate"
    assert (cache.settings["forecast"], cache.settings["forecast_of"]) == ("linear", "output")
    reused, cache = images_of(pipe, entry=plain, **how)
    assert (found != reused).any()
    assert (cache.settings["forecast"], cache.settings["forecast_of"]) == ("reuse", "residual")


def test_the_callers_forecast_comes_first_and_is_a_mismatch():
    pipe = TinyPipeline()
    entry = dataclasses.replace(an_entry(), forecast="linear", forecast_of="output")
    _, cache = images_of(pipe, entry=entry, threshold=0.3, forecast="reuse")
    assert (cache.settings["forecast"], cache.settings["forecast_of"]) == ("reuse", "residual")
    assert cache.mismatches == ["forecast: linear of output in the entry, reuse of residual here"]
    _, cache = images_of(pipe, entry=entry, threshold=0.3, forecast_of="residual")
    assert (cache.settings["forecast"], cache.settings["forecast_of"]) == ("linear", "residual")
    with pytest.raises(InvalidSetting, match="not fitted for this forecast"):
        apply_tea_cache(pipe, entry, threshold=0.3, forecast="reuse", strict=True)
    assert images_of(pipe, entry=entry, schedule=FITTED.schedule)[1].settings["forecast"] == "reuse"
