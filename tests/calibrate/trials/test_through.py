"""Plans run by the engines' own code on real pipelines: the executed pattern is the exported one, in every branch."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import Case

import coeffs
from calibrate.errors import InvalidOption
from calibrate.trials.setting import Refused
from calibrate.trials.through import ENGINES, check_through, run_through, through_setting
from calibrate.verifying.verify import verify
from coeffs.errors import CheckFailed, EngineError

SCHEDULE = "CCSCSS"
FORECAST = {"forecast": "linear", "forecast_of": "output"}


def flux_without_guidance() -> Case:
    case = tiny_pipelines.flux()
    for name in (
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "true_cfg_scale",
    ):
        del case.arguments[name]
    case.branches = ("cond",)
    return case


CASES: dict[str, Callable[[], Case]] = {
    "flux": tiny_pipelines.flux,
    "flux without guidance": flux_without_guidance,
    "wan": tiny_pipelines.wan21,
    "sd3": tiny_pipelines.sd3,
    "qwen-image": tiny_pipelines.qwen_image_edit_plus,
    "longcat-image": tiny_pipelines.longcat_image,
    "chroma": tiny_pipelines.chroma,
}
NOT_IN_MAGCACHE = ("longcat-image", "chroma")


def entry_of(case: Case, **plan: object) -> coeffs.Entry:
    """A planned entry of the case's class, with the branches that its recording would have."""
    ratios = {branch: (1.0,) * len(SCHEDULE) for branch in case.branches}
    return coeffs.Entry(
        model="tiny",
        status="measured",
        transformer_class=type(case.transformer).__name__,
        signal="modulated_input",
        target="output",
        protocol={"num_steps": len(SCHEDULE)},
        experts={"transformer": coeffs.Expert(mag_ratios=ratios)},
        plans=(coeffs.Plan(schedule=SCHEDULE, **plan),),
    )


def run(case: Case, engine: str, entry: coeffs.Entry) -> dict[str, str]:
    if engine == "cache-dit":
        pytest.importorskip("cache_dit")
    session = SimpleNamespace(modules=case.experts, pipeline=case.pipe)
    with run_through(
        session, through_setting("plan", engine, entry, entry.plans[0])
    ) as executed:
        case.run()
        return executed()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", [{}, FORECAST], ids=["reuse", "forecast"])
def test_the_executed_pattern_is_the_exported_one(name, engine, plan):
    case = CASES[name]()
    entry = entry_of(case, **plan)
    if engine == "diffusers-magcache" and name in NOT_IN_MAGCACHE:
        with pytest.raises(EngineError, match=r"diffusers 0\.42\.1"):
            run(case, engine, entry)
        return
    assert list(run(case, engine, entry).values()) == [SCHEDULE] * len(case.branches)


@pytest.mark.parametrize("engine", ENGINES)
def test_afterwards_the_pipeline_is_as_before(engine):
    case = tiny_pipelines.flux()
    before = case.run()
    run(case, engine, entry_of(case))
    assert torch.equal(case.run(), before)


def test_a_mask_that_is_eaten_by_the_second_branch_is_found_out():
    """An entry that says one call a step, on a pipeline that makes two."""
    case = tiny_pipelines.flux()
    case.branches = ("cond",)
    with pytest.raises(
        CheckFailed, match=r"cache-dit executed \w+ in .*, exported was CCSCSS"
    ):
        run(case, "cache-dit", entry_of(case))


def test_two_denoisers_are_refused():
    case = tiny_pipelines.wan22()
    entry = entry_of(case)
    experts = dict.fromkeys(("transformer", "transformer_2"), entry.experts["transformer"])
    for engine in ENGINES:
        with pytest.raises(EngineError, match="counts the steps of each from 0"):
            run(case, engine, coeffs.Entry(**{**vars(entry), "experts": experts}))


def test_a_class_that_diffusers_does_not_know_is_refused_by_the_engine_too():
    """Our table says the same as the engine: forced past it, the engine raises."""
    case = tiny_pipelines.longcat_image()
    flux = coeffs.Entry(
        **{**vars(entry_of(case)), "transformer_class": "FluxTransformer2DModel"}
    )
    with pytest.raises(
        Refused, match=r"MagCache on LongCatImageTransformer2DModel: .* not registered"
    ):
        run(case, "diffusers-magcache", flux)


def test_what_cannot_be_run_is_said_before_anything_runs(monkeypatch):
    case = tiny_pipelines.flux()
    entry = entry_of(case)
    with pytest.raises(InvalidOption, match="has no plan of 28 steps"):
        check_through("diffusers-magcache", entry, 28)
    longcat = entry_of(tiny_pipelines.longcat_image())
    with pytest.raises(EngineError, match="cannot cache"):
        check_through("diffusers-magcache", longcat, len(SCHEDULE))
    monkeypatch.setattr("calibrate.trials.through.find_spec", lambda name: None)
    with pytest.raises(InvalidOption, match="pip install"):
        check_through("cache-dit", entry, len(SCHEDULE))


@pytest.mark.slow
def test_verify_compares_the_plan_with_the_engines_run_of_it(tmp_path):
    pytest.importorskip("cache_dit")
    verified = verify(
        "tiny-longcat-image",
        out=tmp_path,
        through=["cache-dit"],
        num_prompts=1,
        budgets=[14],
        progress=False,
    )
    rows = verified.summary.set_index("policy")
    assert rows.loc["plan through cache-dit", "computed_steps"] == 14
    assert rows.loc["plan", "psnr_db"] > rows.loc["plan through cache-dit", "psnr_db"] > 30
