"""Coefficients: what is exported is what the engine reads, and what it would misread is refused."""

import json
import math
from dataclasses import replace

import pytest
from coeffs_samples import sample_entry, two_experts
from engine_readers import (
    agrees,
    comfyui_reads,
    entry_for,
    lightx2v_reads,
    mlx_teacache_reads,
    sglang_reads,
    tensorrt_llm_reads,
    vllm_omni_reads,
)

import coeffs
from coeffs.engines import export_entry
from coeffs.engines.releases import releases
from coeffs.engines.setting import FORCED
from coeffs.entry.polynomial import negative_ranges
from coeffs.errors import EngineError

TEACACHE = [engine for engine, release in releases().items() if release.signals]


def one_fit(engine: str, fit: coeffs.Fit, **changes: object) -> coeffs.Entry:
    """An entry for an engine with one polynomial."""
    experts = {"transformer": {"recommended": "pooled", "branches": {"pooled": fit}}}
    return entry_for(engine, experts=experts, **changes)


def wan_for_two(**changes: object) -> coeffs.Entry:
    return two_experts(signal="time_embedding", **changes)


def test_vllm_omni_reads_the_entry():
    text = export_entry(sample_entry(), "vllm-omni", threshold=0.2)
    used = vllm_omni_reads(text)
    assert agrees(used, sample_entry()) and used.threshold == 0.2
    assert json.loads(text)["coefficients"][0] == 0.0  # degree 3, padded to five
    assert json.loads(text)["_comment"].startswith("longcat-image@v0 (measured)")


def test_sglang_reads_the_entry():
    entry = entry_for("sglang", start=3, end=0.25)
    used = sglang_reads(export_entry(entry, "sglang", threshold=0.2))
    assert agrees(used, entry) and (used.threshold, used.first, used.last) == (0.2, 3, 7)
    plain = sglang_reads(export_entry(entry_for("sglang"), "sglang", threshold=0.2))
    assert (plain.first, plain.last) == (1, 0)


def test_sglang_and_tensorrt_llm_take_the_projected_embedding_from_the_entry():
    for engine in ("sglang", "tensorrt-llm"):
        plain = export_entry(entry_for(engine), engine, threshold=0.2)
        entry = entry_for(engine, signal_note="projected time embedding")
        text = export_entry(entry, engine, threshold=0.2)
        flags = [line for line in (text + plain).splitlines() if "use_ret_steps" in line]
        assert ["rue" in flag for flag in flags] == [True, False]


def test_a_window_does_not_select_another_signal():
    """use_ret_steps computes the first five steps, but also compares the projected embedding."""
    with pytest.raises(
        EngineError,
        match="computes the first 5 and the last 0 steps, tensorrt-llm only 1 and 1",
    ):
        export_entry(entry_for("tensorrt-llm", start=5), "tensorrt-llm", threshold=0.2)


def test_tensorrt_llm_reads_the_entry():
    entry = entry_for(
        "tensorrt-llm", transformer_class="FluxTransformer2DModel", signal="modulated_input"
    )
    text = export_entry(entry, "tensorrt-llm", threshold=0.2)
    used = tensorrt_llm_reads(text)
    assert agrees(used, entry) and (used.threshold, used.first, used.last) == (0.2, 1, 1)
    assert text.startswith(
        "# longcat-image@v0 (measured), teacal registry; fitted on: modulated_input"
    )
    late = export_entry(replace(entry, start=4), "tensorrt-llm", threshold=0.2)
    assert tensorrt_llm_reads(late).first == 5


def test_tensorrt_llm_reads_both_experts():
    text = export_entry(wan_for_two(), "tensorrt-llm", threshold=0.3)
    assert agrees(tensorrt_llm_reads(text), wan_for_two())
    assert agrees(tensorrt_llm_reads(text, second=True), wan_for_two(), "transformer_2")


def test_mlx_teacache_reads_the_entry():
    entry = entry_for("mlx-teacache", start=2, end=1)
    used = mlx_teacache_reads(export_entry(entry, "mlx-teacache", threshold=0.2))
    assert agrees(used, entry) and (used.threshold, used.first, used.last) == (0.2, 2, 1)
    with pytest.raises(EngineError, match="mlx-teacache takes at most 1"):
        export_entry(entry, "mlx-teacache", threshold=1.5)


@pytest.mark.parametrize(
    ("transformer_class", "signal", "note", "window"),
    [
        ("WanTransformer3DModel", "time_embedding", None, (1, 1)),
        ("WanTransformer3DModel", "time_embedding", "projected time embedding", (5, 0)),
        ("HunyuanVideo15Transformer3DModel", "modulated_input", None, (1, 1)),
    ],
)
def test_lightx2v_reads_the_entry(transformer_class, signal, note, window):
    entry = sample_entry(transformer_class=transformer_class, signal=signal, signal_note=note)
    text = export_entry(entry, "lightx2v", threshold=0.2)
    used = lightx2v_reads(text, wan=transformer_class.startswith("Wan"))
    assert agrees(used, entry) and (used.threshold, (used.first, used.last)) == (
        0.2,
        window,
    )


@pytest.mark.parametrize(
    ("transformer_class", "signal"),
    [
        ("FluxTransformer2DModel", "modulated_input"),
        ("WanTransformer3DModel", "time_embedding"),
        ("Lumina2Transformer2DModel", "time_embedding"),
        ("LTXVideoTransformer3DModel", "modulated_input"),
    ],
)
def test_comfyui_reads_the_entry(transformer_class, signal):
    entry = sample_entry(
        model="my-flux-like-model",
        transformer_class=transformer_class,
        signal=signal,
        start=4,
        end=3,
    )
    used = comfyui_reads(export_entry(entry, "comfyui-teacache", threshold=0.2))
    assert agrees(used, entry) and (used.threshold, used.first, used.last) == (0.2, 4, 3)


READERS = {
    "vllm-omni": vllm_omni_reads,
    "sglang": sglang_reads,
    "tensorrt-llm": tensorrt_llm_reads,
    "comfyui-teacache": comfyui_reads,
    "mlx-teacache": mlx_teacache_reads,
}


def test_every_published_set_is_exported_faithfully_or_refused():
    """Whatever an engine accepts, it predicts as the entry does on 0 to 0.5; the rest is refused with a reason."""
    exported = dict.fromkeys(TEACACHE, 0)
    for entry in coeffs.entries():
        for engine in exported:
            try:
                text = export_entry(entry, engine, threshold=0.2)
            except EngineError as error:
                assert entry.label in str(error) and "\n" not in str(error)
                continue
            wan = entry.transformer_class == "WanTransformer3DModel"
            used = (
                lightx2v_reads(text, wan) if engine == "lightx2v" else READERS[engine](text)
            )
            assert agrees(used, entry), (entry.label, engine)
            exported[engine] += 1
    assert min(exported.values()) >= 10


def test_nothing_goes_to_an_engine_that_has_no_code_for_the_class_or_compares_another_signal():
    """Counted over all entries, from the table alone."""
    for entry in coeffs.entries():
        for engine in TEACACHE:
            signal = releases()[engine].signals.get(entry.transformer_class)
            own = signal != "other" or entry.engine == engine
            if signal == entry.signal and own:
                continue
            with pytest.raises(EngineError):
                export_entry(entry, engine, threshold=0.2)
            assert FORCED in forced(entry, engine)


def forced(entry: coeffs.Entry, engine: str) -> str:
    """The form written with force, or the warning's name where something else forbids it."""
    try:
        return export_entry(entry, engine, threshold=0.2, force=True)
    except EngineError as error:
        assert any(
            word in str(error) for word in ("negative", "steps", "degree", "no coefficients")
        ), error
        return FORCED


# --- refusals ---------------------------------------------------------------------------------------


def degree_five() -> coeffs.Fit:
    return coeffs.Fit(
        coefficients_high_to_low=(1.0, 0.0, 0.0, 0.0, 0.5, 0.1), domain=(0.0, 0.4)
    )


def test_a_degree_above_four_is_refused_by_vllm_omni_or_replaced_by_the_alternative():
    with pytest.raises(
        EngineError, match=r"degree 5, vllm-omni takes at most 4: .*--degree 4"
    ):
        export_entry(
            one_fit(
                "vllm-omni",
                degree_five(),
                transformer_class="FluxTransformer2DModel",
                signal="modulated_input",
            ),
            "vllm-omni",
            threshold=0.2,
        )
    other = coeffs.Candidate(coefficients_high_to_low=(0.75, 0.0, 0.125), domain=(0.0, 0.4))
    fit = replace(degree_five(), alternatives=(other,))
    entry = one_fit(
        "vllm-omni",
        fit,
        transformer_class="FluxTransformer2DModel",
        signal="modulated_input",
    )
    text = export_entry(entry, "vllm-omni", threshold=0.2)
    assert (
        "alternative of degree 2, since degree 5 is too much" in json.loads(text)["_comment"]
    )
    assert json.loads(text)["coefficients"] == [0.0, 0.0, 0.75, 0.0, 0.125]


@pytest.mark.parametrize("engine", ["sglang", "lightx2v", "comfyui-teacache"])
def test_two_experts_do_not_go_into_one_slot(engine):
    """SGLang's release has no expert_coefficients; forcing does not help."""
    for force in (False, True):
        with pytest.raises(EngineError, match="has one slot: use tensorrt-llm"):
            export_entry(wan_for_two(), engine, threshold=0.2, force=force)


def test_a_polynomial_that_another_sign_rule_reads_differently_is_refused():
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, -0.1), domain=(0.0, 0.4))
    for engine, rule in (("sglang", "signed"), ("tensorrt-llm", "abs")):
        entry = one_fit(engine, fit)
        with pytest.raises(
            EngineError,
            match=rf"negative on its domain \(x 0 to 0.1\): {engine} reads that as {rule}.*--constrained",
        ):
            export_entry(entry, engine, threshold=0.2)
        assert export_entry(replace(entry, sign_rule=rule), engine, threshold=0.2)
    assert export_entry(
        one_fit("sglang", replace(fit, domain=(0.2, 0.4))), "sglang", threshold=1
    )


def test_a_double_root_of_a_constrained_fit_is_not_negative():
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, -0.4, 0.04), domain=(0.0, 0.5))
    text = export_entry(one_fit("sglang", fit), "sglang", threshold=0.2)
    assert "falls with x from 0 to 0.2" in text


def test_a_narrow_dip_below_zero_is_not_stepped_over():
    coefficients = (1.0, -0.40012, 0.0400240036 - 1e-9)
    fit = coeffs.Fit(coefficients_high_to_low=coefficients, domain=(0.0, 0.5))
    assert negative_ranges(fit.polynomial(), (0.0, 0.5))


def test_a_threshold_always_travels_along():
    entry = entry_for("sglang")
    with pytest.raises(
        EngineError, match=r"has thresholds 0.2, 0.3: choose with --threshold"
    ):
        export_entry(entry, "sglang")
    with pytest.raises(EngineError, match="has no threshold: choose"):
        export_entry(replace(entry, thresholds=()), "sglang")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(EngineError, match="expected a number above 0"):
            export_entry(entry, "sglang", threshold=wrong)
    text = export_entry(entry, "sglang", threshold=0.7)
    assert "threshold 0.7 is not one that the entry reports on" in text


def test_a_window_that_an_engine_does_not_have_is_refused():
    for engine in ("vllm-omni", "tensorrt-llm"):
        flux = {"transformer_class": "FluxTransformer2DModel", "signal": "modulated_input"}
        with pytest.raises(EngineError, match="change start and end of a copy"):
            export_entry(entry_for(engine, start=10, **flux), engine, threshold=0.2)
    with pytest.raises(EngineError, match="the number of steps is not known"):
        export_entry(
            entry_for("tensorrt-llm", start=0.5, protocol={}), "tensorrt-llm", threshold=0.2
        )
    text = export_entry(sample_entry(end=1), "vllm-omni", threshold=0.2)
    assert "first 1 and last 0 steps (entry: 1 and 1)" in text


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm", "lightx2v", "comfyui-teacache"])
def test_another_signal_than_the_engines_is_refused(engine):
    entry = sample_entry(transformer_class="WanTransformer3DModel")
    with pytest.raises(
        EngineError,
        match=rf"{engine} compares the time_embedding there.*--signal time_embedding",
    ):
        export_entry(entry, engine, threshold=0.2)
    text = export_entry(entry, engine, threshold=0.2, force=True)
    assert FORCED in text and "was fitted on the modulated_input" in text


@pytest.mark.parametrize(
    "engine", ["sglang", "tensorrt-llm", "lightx2v", "comfyui-teacache", "mlx-teacache"]
)
def test_a_class_without_code_in_the_engine_is_refused(engine):
    """LongCat-Image: what other form takes it is said."""
    with pytest.raises(EngineError, match=r"has code for .* only; export it to vllm-omni"):
        export_entry(sample_entry(), engine, threshold=0.2)


def test_a_signal_without_a_name_goes_back_to_its_own_engine_only():
    entry = coeffs.load("mlx-teacache/z-image-base@v1")
    assert export_entry(entry, "mlx-teacache")
    with pytest.raises(EngineError, match="compares a signal of its own"):
        export_entry(
            replace(coeffs.load("sglang/z-image"), sign_rule="clamp"), "mlx-teacache"
        )
    with pytest.raises(EngineError, match="raises ValueError for Ref2VA"):
        export_entry(coeffs.load("vllm-omni/minimax-h3-ref2va"), "vllm-omni")


def test_a_release_that_is_not_known_is_refused():
    for release in ("0.5.22", "latest", ""):
        with pytest.raises(
            EngineError, match=r"of sglang: what it does is known for 0.5.23 only"
        ):
            export_entry(entry_for("sglang"), "sglang", threshold=0.2, release=release)
    assert export_entry(entry_for("sglang"), "sglang", threshold=0.2, release="0.5.23")
    with pytest.raises(EngineError, match="engine 'nope': expected one of vllm-omni"):
        export_entry(sample_entry(), "nope")
