"""A quality instead of a threshold: what was certified is in force, and only where the certificate covers it."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from coeffs_samples import certificate
from tiny_pipeline import TinyExperts, TinyPipeline

import coeffs
from coeffs.errors import EntryMismatch
from runtime import InvalidSetting, apply_tea_cache
from runtime.apply import denoisers
from runtime.asked import Asked, Model
from runtime.facts import facts_of
from runtime.settings import resolve

PROTOCOL = coeffs.Protocol(
    scheduler="FlowMatchEulerDiscreteScheduler", shift=3.0, num_steps=8, dtype="float32"
)
MODEL = Model(
    facts={"transformer_class": "FluxTransformer2DModel", "dtype": "float32"},
    classes={"transformer": "FluxTransformer2DModel"},
    has_scheduler=True,
)


def of(**changes):
    return certificate(num_steps=8, protocol=PROTOCOL, computed_steps=4.0, **changes)


def of_plan(schedule, **changes):
    plan = coeffs.Plan(schedule=schedule, forecast="linear")
    return of(policy="plan", threshold=None, plan=plan, **changes)


def entry(*certificates, **fields):
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, 0.0), domain=(0.0, 1.0))
    expert = coeffs.Expert(recommended="cond", branches={"cond": fit})
    facts = {"status": "measured", "transformer_class": "FluxTransformer2DModel"}
    return coeffs.Entry(
        model="tiny", signal="modulated_input", target="output", experts={"transformer": expert},
        certificates=certificates, **facts | fields,
    )  # fmt: skip


FEWER = of(policy="fewer_steps", threshold=None, speedup=3.0)


def test_the_fastest_certified_cache_of_the_tier_is_in_force():
    known = entry(
        of(speedup=1.5), of_plan("CSCSCSCS", speedup=1.9), of(tier="lossless", speedup=1.1)
    )
    settings = resolve(Asked(entry=known, quality="high"), MODEL)
    assert (settings.policy, settings.schedule) == ("plan", "CSCSCSCS")
    assert settings.forecast.kind == "linear" and settings.num_steps == 8
    described = settings.described()
    assert (
        described["quality"] == "high"
        and described["promise"] == known.certificates[1].promise
    )
    other = resolve(Asked(entry=known, quality="lossless"), MODEL)
    assert (other.policy, other.gate.threshold, other.gate.compat) == ("gate", 0.2, False)


def test_published_sets_decide_as_they_did_when_they_were_certified():
    settings = resolve(Asked(entry=entry(of(), status="published"), quality="high"), MODEL)
    assert settings.gate.compat and settings.branches == "apart"


def test_fewer_steps_are_the_users_to_take():
    with pytest.raises(
        InvalidSetting, match=r"by fewer steps only: .* num_inference_steps=4"
    ):
        resolve(Asked(entry=entry(FEWER), quality="high"), MODEL)
    settings = resolve(Asked(entry=entry(of(), FEWER), quality="high"), MODEL)
    assert settings.advice.startswith(
        "num_inference_steps=4 without a cache keeps the same promise"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quality": "ultra"}, "is certified for high, not for 'ultra'"),
        ({"quality": "high", "threshold": 0.1}, "expected exactly one of"),
        ({"quality": "high", "start": 3}, "start= has no meaning beside quality="),
        (
            {"quality": "high", "forecast": "linear"},
            "forecast= has no meaning beside quality=",
        ),
    ],
)
def test_what_would_void_the_promise_is_refused(asked, said):
    with pytest.raises(InvalidSetting, match=said):
        resolve(Asked(entry=entry(of()), **asked), MODEL)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype: float32 in the entry, bfloat16 here"),
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler: FlowMatch"),
        ({"quantization": "AffineQuantizedTensor"}, "quantization: none in the entry"),
        ({"lora": "style"}, "lora: none in the entry, style here"),
        ({"num_steps": 9}, "num_steps: 8 in the entry, 9 here"),
    ],
)
@pytest.mark.parametrize("status", ["measured", "published"])
def test_what_the_certificate_does_not_cover_is_refused_unless_told_otherwise(
    facts, said, status
):
    known = entry(of(), status=status)
    model = dataclasses.replace(MODEL, facts=MODEL.facts | facts)
    with pytest.raises(EntryMismatch, match=f"tiny@v0 was not measured like this: {said}"):
        resolve(Asked(entry=known, quality="high"), model)
    settings = resolve(Asked(entry=known, quality="high", strict=False), model)
    assert len(settings.mismatches) == 1 and settings.mismatches[0].startswith(said)


# --- on a pipeline


def image(pipe, steps=8):
    return pipe(
        "a", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
    ).images


@pytest.mark.parametrize("known", [entry(of()), entry(of_plan("CSCSCSCS"))])
def test_another_number_of_steps_is_refused_at_the_first_step(known, caplog):
    pipe = TinyPipeline()
    with apply_tea_cache(pipe, known, quality="high") as cache:
        image(pipe)
        assert cache.settings["promise"].startswith(
            "high: PSNR >= 25 dB for 95 % of all prompts"
        )
        with pytest.raises(InvalidSetting, match="num_steps: 8 in the entry, 10 here"):
            image(pipe, steps=10)
    with (
        caplog.at_level(logging.WARNING),
        apply_tea_cache(pipe, entry(of()), quality="high", strict=False),
    ):
        image(pipe, steps=10)
    assert "num_steps: 8 in the entry, 10 here" in caplog.text


def test_exact_applies_nothing_and_needs_no_entry():
    pipe = TinyPipeline()
    before = image(pipe)
    with apply_tea_cache(pipe, quality="exact") as cache:
        cache.reset()
        np.testing.assert_array_equal(image(pipe), before)
        assert cache.settings["quality"] == "exact" and not cache.stats.branches
    with pytest.raises(InvalidSetting, match="expected exactly one of"):
        apply_tea_cache(pipe, quality="exact", threshold=0.1)


# --- weights that are not what they were


class Packed(torch.Tensor):
    """As torchao and bitsandbytes hold quantised weights: a class of their own."""


def test_quantised_weights_and_adapters_of_any_denoiser_are_seen():
    def facts(pipe):
        return facts_of(pipe, denoisers(pipe))

    pipe = TinyExperts()
    assert facts(pipe)["quantization"] is facts(pipe)["lora"] is None
    layer = pipe.transformer_2.proj_out
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Packed))
    assert facts(pipe)["quantization"] == "Packed"
    pipe = TinyExperts()
    pipe.transformer_2.proj_out.to(torch.float8_e4m3fn)
    assert facts(pipe)["quantization"] == "float8_e4m3fn"
    pipe = TinyExperts()
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {torch.nn.Linear}, inplace=True)
    assert facts(pipe)["quantization"] == "Linear"
    pipe = TinyExperts()
    pipe.transformer_2.peft_config = {"style": object()}
    assert facts(pipe)["lora"] == "style"


def test_a_bare_denoiser_has_to_tell_its_number_of_steps():
    bare = dataclasses.replace(MODEL, has_scheduler=False)
    with pytest.raises(InvalidSetting, match="does not tell its own"):
        resolve(Asked(entry=entry(of()), quality="high"), bare)
    resolve(Asked(entry=entry(of()), quality="high", num_steps=8, strict=False), bare)


def test_a_shift_that_the_certified_runs_did_not_have_is_seen():
    dynamic = dataclasses.replace(PROTOCOL, shift=None)
    facts = {**MODEL.facts, "scheduler": PROTOCOL.scheduler, "shift": 3.0}
    fixed = dataclasses.replace(MODEL, facts=facts)
    known = entry(certificate(num_steps=8, protocol=dynamic, computed_steps=4.0))
    with pytest.raises(EntryMismatch, match="shift"):
        resolve(Asked(entry=known, quality="high"), fixed)
