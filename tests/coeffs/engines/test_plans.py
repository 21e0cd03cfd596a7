"""Plans and magnitude ratios: what is exported is what the engine executes."""

import json
import shlex
from dataclasses import replace

import pytest
import yaml
from coeffs_samples import sample_entry, two_experts
from engine_readers import entry_for, magcache_reads, plan_of
from hypothesis import given
from hypothesis import strategies as st

import coeffs
from coeffs.engines import export_entry, import_entry
from coeffs.engines.releases import plan_forms
from coeffs.engines.setting import FORCED
from coeffs.errors import EngineError

MAGCACHE = [engine for engine in plan_forms() if engine.endswith("magcache")]
SCHEDULES = st.text("CS", max_size=40).map(lambda letters: f"C{letters}S")


def bare(engine: str, schedule: str, **changes: object) -> coeffs.Entry:
    """An entry for the engine that has the plan and nothing else."""
    plan = coeffs.Plan(schedule=schedule)
    experts = {"transformer": {"recommended": None}}
    facts = {"experts": experts, "plans": (plan,), "protocol": {"num_steps": len(schedule)}}
    return entry_for(engine, **facts | changes)


@pytest.mark.parametrize("engine", plan_forms())
@given(schedule=SCHEDULES)
def test_the_engine_executes_the_plan(engine, schedule):
    text = export_entry(bare(engine, schedule), engine)
    assert plan_of(engine, text) == schedule
    imported = import_entry(text, engine, model="mine")
    assert [plan.schedule for plan in imported.plans] == [schedule]


@pytest.mark.parametrize("engine", plan_forms())
def test_a_schedule_that_no_engine_can_run_is_refused(engine):
    for schedule in ("SCC", "", "CXC", "CCC"):
        with pytest.raises(EngineError, match="begin with C, and a step to skip"):
            export_entry(entry_for(engine), engine, schedule=schedule)


@pytest.mark.parametrize("engine", plan_forms())
def test_another_number_of_steps_is_refused(engine):
    with pytest.raises(EngineError, match=r"schedule of 7 steps: .* was measured with 28"):
        export_entry(entry_for(engine), engine, schedule="CSSCSSC")


@pytest.mark.parametrize("engine", plan_forms())
def test_two_denoisers_are_refused(engine):
    """Every engine counts the steps of each from 0, so the mask would begin again for the second."""
    entry = two_experts(plans=(coeffs.Plan(schedule="CCSC"),), protocol={"num_steps": 4})
    if engine == "angelslim":
        entry = replace(entry, transformer_class=None)
    with pytest.raises(EngineError, match=r"counts the steps of each from 0|has code for"):
        export_entry(entry, engine, schedule="CCSC")


FORECAST = coeffs.Plan(schedule="CCSC", forecast="linear", forecast_of="output")


@pytest.mark.parametrize("engine", plan_forms())
def test_a_forecast_is_replaced_by_the_engines_and_that_is_said(engine):
    text = export_entry(bare(engine, "CCSC", plans=(FORECAST,)), engine)
    assert (
        "in place of ours (linear of the output); the entry's figures were measured with ours"
        in text
    )
    order = {"cache-dit-mask": 2, "sglang-cache-dit": 2, "xfuser": 1}.get(engine, 0)
    assert ("TaylorSeer of order" in text) == bool(order)
    assert "in place of ours" not in export_entry(bare(engine, "CCSC"), engine)


def test_long_runs_of_skips_are_reused():
    for skips, extrapolates in ((4, True), (5, False)):
        schedule = "C" + "S" * skips
        plan = coeffs.Plan(schedule=schedule, forecast="linear", forecast_of="guided")
        text = export_entry(bare("cache-dit-mask", schedule, plans=(plan,)), "cache-dit-mask")
        assert ("enable_taylorseer: true" in text) == extrapolates
        assert "in place of ours (linear of the guided)" in text


def test_cache_dit_and_sglang_switch_taylorseer_on_for_a_forecast():
    text = export_entry(bare("cache-dit-mask", "CCSC", plans=(FORECAST,)), "cache-dit-mask")
    config = yaml.safe_load(text)["cache_config"]
    assert (config["enable_taylorseer"], config["taylorseer_order"]) == (True, 2)
    words = shlex.split(export_entry(bare("xfuser", "CCSC"), "xfuser"), comments=True)
    assert json.loads(words[-1])["enable_taylorseer"] is False
    plain = yaml.safe_load(export_entry(bare("cache-dit-mask", "CCSC"), "cache-dit-mask"))
    assert "enable_taylorseer" not in plain["cache_config"]


def with_branches(
    *names: str, engine: str = "cache-dit-mask", **changes: object
) -> coeffs.Entry:
    ratios = {name: (1.0, 0.9, 0.9, 0.9) for name in names}
    expert = coeffs.Expert(mag_ratios=ratios)
    return bare(engine, "CCSC", experts={"transformer": expert}, **changes)


def test_cache_dit_is_told_whether_guidance_takes_two_calls():
    def separate(entry: coeffs.Entry) -> object:
        text = export_entry(entry, "cache-dit-mask", schedule="CCSC")
        return yaml.safe_load(text)["cache_config"].get("enable_separate_cfg")

    assert separate(with_branches("cond", "uncond")) is True
    assert separate(with_branches("branch0", "branch1")) is True
    assert separate(with_branches("cond")) is False
    assert separate(with_branches("pooled")) is None
    call = {"num_steps": 4, "call_arguments": {"true_cfg_scale": 4.0}}
    assert separate(with_branches("pooled", protocol=call)) is True


def test_two_calls_a_step_are_refused_where_the_engine_has_no_setting_for_them():
    flux = {"transformer_class": "FluxTransformer2DModel"}
    for engine in ("sglang-cache-dit", "vllm-omni-magcache"):
        entry = with_branches("cond", "uncond", engine=engine, **flux)
        with pytest.raises(EngineError, match="has two calls of the denoiser a step"):
            export_entry(entry, engine, schedule="CCSC")
        assert FORCED in export_entry(entry, engine, schedule="CCSC", force=True)
        assert export_entry(
            with_branches("cond", engine=engine, **flux), engine, schedule="CCSC"
        )
    one = with_branches("cond", engine="sglang-cache-dit")  # Wan: counted as two calls there
    with pytest.raises(
        EngineError, match=r"has one call of the denoiser a step, .* expects two"
    ):
        export_entry(one, "sglang-cache-dit", schedule="CCSC")


# --- magnitude ratios -------------------------------------------------------------------------------


def test_diffusers_reads_the_ratios():
    entry = entry_for("diffusers-magcache")
    config = magcache_reads(export_entry(entry, "diffusers-magcache"))[
        "transformer_mag_cache"
    ]
    assert tuple(config["mag_ratios"]) == entry.experts["transformer"].mag_ratios["cond"]
    assert config["max_skip_steps"] == 4


def test_lightx2v_gets_the_ratios_of_both_branches():
    entry = entry_for("lightx2v-magcache")
    form = json.loads(export_entry(entry, "lightx2v-magcache"))
    ratios = entry.experts["transformer"].mag_ratios
    assert form["magcache_ratios"] == [list(ratios["cond"]), list(ratios["uncond"])]
    assert (form["magcache_K"], form["magcache_calibration"]) == (4, False)


def test_ratios_of_unequal_length_are_refused():
    ratios = {"cond": (1.0, 0.9, 0.9), "uncond": (1.0, 0.9)}
    entry = entry_for(
        "lightx2v-magcache", experts={"transformer": coeffs.Expert(mag_ratios=ratios)}
    )
    with pytest.raises(EngineError, match="have ratios for 2 and 3 steps, expected as many"):
        export_entry(entry, "lightx2v-magcache")


@pytest.mark.parametrize("engine", MAGCACHE)
def test_a_plan_is_written_as_crafted_ratios_only_when_it_is_asked_for(engine):
    entry = entry_for(engine)
    assert plan_of(engine, export_entry(entry, engine, schedule="CCSC")) == "CCSC"
    assert "100.0" not in export_entry(entry, engine)


def test_ratios_and_plans_that_are_not_there():
    flux = coeffs.load("alivilab/flux1-dev")
    with pytest.raises(EngineError, match="has no mag_ratios for transformer"):
        export_entry(flux, "diffusers-magcache")
    with pytest.raises(EngineError, match=r"has no plan: give one with --schedule CCSC"):
        export_entry(flux, "cache-dit-mask")
    with pytest.raises(EngineError, match=r"has the plans .*: give one with --schedule"):
        export_entry(coeffs.load("tiny-longcat-image"), "cache-dit-mask")


def test_longcat_is_refused_by_diffusers_magcache():
    with pytest.raises(
        EngineError,
        match="cannot cache: its blocks are not in the release's TransformerBlockRegistry",
    ):
        export_entry(sample_entry(), "diffusers-magcache")
    assert FORCED in export_entry(sample_entry(), "diffusers-magcache", force=True)
