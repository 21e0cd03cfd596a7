"""Exports read by the engines' own rules, refusals where an engine cannot say it, and imports back.

Each ``*_reads`` function below follows what the named public file does with a setting; the docstring says at which
commit it was read. They return what the engine will then use: predicted change as a function of x, threshold, window.
"""

import ast
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import yaml
from coeffs_samples import sample_entry, two_experts

import coeffs
from coeffs.engines import ENGINES, export_entry, import_entry
from coeffs.engines.setting import stripped
from coeffs.entry.polynomial import negative_ranges
from coeffs.errors import CoeffsError, EngineError, EntryError


@dataclass
class Used:
    """What an engine makes of a setting."""

    predict: Callable[[float], float]
    threshold: float
    first: int = 1
    last: int = 0


def vllm_omni_reads(text: str) -> Used:
    """vLLM-Omni, ``diffusion/data.py``, ``cache/teacache/{config,hook}.py`` at
    be81443c8a52f863452253ee6ea1d9f263bd2fb6.

    ``--cache-config`` is JSON; a text that is none is dropped in silence, so no comment may stand before it. Unknown
    keys are set aside. The threshold must be positive, the coefficients exactly five;
    ``abs(np.poly1d(c)(x))`` accumulates.
    """
    form = json.loads(text)
    assert isinstance(form, dict)
    known = {key: value for key, value in form.items() if key in ("rel_l1_thresh", "coefficients")}
    assert known["rel_l1_thresh"] > 0
    assert len(known["coefficients"]) == 5
    polynomial = np.poly1d(known["coefficients"])
    return Used(lambda x: abs(float(polynomial(x))), known["rel_l1_thresh"])


def sglang_reads(text: str, num_steps: int = 28, expert: str | None = None) -> Used:
    """SGLang, ``configs/sample/teacache.py`` at 18ae0170c8524af2576258a0c4170b55638ba985.

    A dataclass without validation; ``np.poly1d(c)(x)`` accumulates with its sign. Float windows are fractions,
    negative whole numbers count from the end. Experts are looked up as ``high`` and ``low``.
    """
    fields = {
        "teacache_thresh",
        "start_skipping",
        "end_skipping",
        "coefficients",
        "coefficients_callback",
        "use_ret_steps",
        "expert_coefficients",
        "expert_thresh",
    }
    (call,) = [node.value for node in ast.parse(text).body]
    assert call.func.id == "TeaCacheParams"
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert set(given) <= fields

    def boundary(value: int | float) -> int:
        if isinstance(value, float):
            return int(num_steps * value)
        return num_steps + value if value < 0 else value

    experts = given.get("expert_coefficients") or {}
    polynomial = np.poly1d(experts.get(expert, given["coefficients"]))
    last = num_steps - boundary(given["end_skipping"])
    return Used(
        lambda x: float(polynomial(x)),
        given["teacache_thresh"],
        boundary(given["start_skipping"]),
        last,
    )


def tensorrt_llm_reads(text: str, second: bool = False) -> Used:
    """TensorRT-LLM, ``_torch/visual_gen`` and its public arguments, ``cache/teacache.py`` at
    aaedbf926586258a1d179660c2b4b50e9c1f85a7.

    ``yaml.safe_load`` of a mapping, unknown keys forbidden, ``cache_backend`` discriminates, the threshold is above 0
    and the lists are not empty. ``abs(np.poly1d(c)(x))`` accumulates, capped at twice the threshold. ``use_ret_steps``
    computes the first 5 steps, without it the first and the last compute.
    """
    form = yaml.safe_load(text)
    assert set(form) == {"cache_config"}
    config = form["cache_config"]
    assert config.pop("cache_backend") == "teacache"
    assert set(config) <= {"teacache_thresh", "use_ret_steps", "coefficients", "coefficients_2"}
    assert isinstance(config["teacache_thresh"], float) and config["teacache_thresh"] > 0
    assert isinstance(config["use_ret_steps"], bool)
    for key in ("coefficients", "coefficients_2"):
        assert key not in config or (
            config[key] and all(isinstance(value, float) for value in config[key])
        )
    polynomial = np.poly1d(config["coefficients_2" if second else "coefficients"])
    first, last = (5, 0) if config["use_ret_steps"] else (1, 1)
    return Used(lambda x: abs(float(polynomial(x))), config["teacache_thresh"], first, last)


def lightx2v_reads(text: str, wan: bool) -> Used:
    """LightX2V, ``utils/set_config.py`` and the ``feature_caching/transformer_infer.py`` of Wan and HunyuanVideo at
    f8aee98b5462cca8d7288888146ebd95592bf266.

    The JSON file is merged into the configuration with whatever keys it has. Wan takes list 0 with ``use_ret_steps``
    (first 5 steps compute), list 1 without (first and last compute); HunyuanVideo takes the list as it is.
    ``np.poly1d(c)(x)`` accumulates with its sign.
    """
    config = json.loads(text)
    assert config["feature_caching"] == "Tea"
    first, last = 1, 1
    coefficients = config["coefficients"]
    if wan:
        coefficients = coefficients[0] if config["use_ret_steps"] else coefficients[1]
        first, last = (5, 0) if config["use_ret_steps"] else (1, 1)
    polynomial = np.poly1d(coefficients)
    return Used(lambda x: float(polynomial(x)), config["teacache_thresh"], first, last)


def comfyui_reads(text: str, num_steps: int = 28) -> Used:
    """ComfyUI-TeaCache, ``nodes.py`` at 91dff8e31684ca70a5fda309611484402d8fa192.

    A table from ``model_type`` to a list, evaluated by powers; code is chosen by parts of the key, in this order; FLUX
    takes the absolute value. A step computes unless ``start_percent <= step / steps <= end_percent``.
    """
    table: dict = {}
    exec(
        compile(text, "nodes.py", "exec"),
        {"SUPPORTED_MODELS_COEFFICIENTS": table, "__builtins__": {}},
    )
    ((key, coefficients),) = table.items()
    inputs = dict(
        part.split("=")
        for part in text.splitlines()[-1].removeprefix("# node inputs: ").split(", ")
    )
    assert json.loads(inputs["model_type"]) == key
    family = next(
        mark
        for mark in ("flux", "lumina_2", "hidream_i1", "ltxv", "hunyuan_video", "wan2.1")
        if mark in key
    )
    values = [float(inputs[name]) for name in ("rel_l1_thresh", "start_percent", "end_percent")]
    active = [values[1] <= step / num_steps <= values[2] for step in range(num_steps)]

    def predict(x: float) -> float:
        value = sum(
            coefficient * x ** (len(coefficients) - 1 - place)
            for place, coefficient in enumerate(coefficients)
        )
        return abs(value) if family == "flux" else value

    first = active.index(True)
    return Used(predict, values[0], max(first, 1), num_steps - 1 - max(np.flatnonzero(active)))


def magcache_reads(text: str) -> dict[str, dict]:
    """diffusers, ``hooks/mag_cache.py`` at 58eb52c0803ea9af3abec60841c2a093bdf1f951.

    ``MagCacheConfig`` needs ratios unless it calibrates; they are indexed by step and interpolated to
    ``num_inference_steps`` when their number differs.
    """
    found = {}
    for node in ast.parse(text).body:
        assert node.value.func.id == "MagCacheConfig"
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
        assert set(given) <= {
            "threshold",
            "max_skip_steps",
            "retention_ratio",
            "num_inference_steps",
            "mag_ratios",
            "calibrate",
        }
        assert len(given["mag_ratios"]) == given["num_inference_steps"]
        found[node.targets[0].id] = given
    return found


def cache_dit_reads(text: str) -> str:
    """cache-dit, ``caching/load_configs.py`` and ``cache_contexts`` at f86744af7daa0f569fe4324e73e3e50cebf70f4c.

    ``yaml.safe_load``, the section ``cache_config``; a mask that is a list is taken as it is, 1 computes, 0 uses the
    cache, ``static`` without asking the residual. Warm-up ends with the mask's first run of 1.
    """
    config = yaml.safe_load(text)["cache_config"]
    assert config["steps_computation_policy"] in ("dynamic", "static")
    mask = config["steps_computation_mask"]
    assert (
        isinstance(mask, list)
        and len(mask) == config["num_inference_steps"]
        and set(mask) <= {0, 1}
        and mask[0] == 1
    )
    return "".join("C" if step == 1 else "S" for step in mask)


def agrees(used: Used, entry: coeffs.Entry, expert: str = "transformer") -> bool:
    """The engine predicts what the entry predicts, everywhere on the entry's domain."""
    fit = entry.fit(expert)
    polynomial = fit.polynomial(entry.sign_rule)
    low, high = fit.domain or (0.0, 0.5)
    grid = [low + (high - low) * step / 200 for step in range(201)]
    return all(
        math.isclose(used.predict(x), polynomial.predict(x), rel_tol=1e-9, abs_tol=1e-9)
        for x in grid
    )


# --- what is exported is what the engine reads ----------------------------------------------------------------------


def test_vllm_omni_reads_the_entry():
    text = export_entry(sample_entry(), "vllm-omni", threshold=0.2)
    used = vllm_omni_reads(text)
    assert agrees(used, sample_entry()) and used.threshold == 0.2
    assert json.loads(text)["coefficients"][0] == 0.0  # degree 3, padded to five
    assert json.loads(text)["_comment"].startswith("longcat-image@v0 (measured)")


def test_sglang_reads_the_entry():
    entry = sample_entry(start=3, end=0.25)
    used = sglang_reads(export_entry(entry, "sglang", threshold=0.2))
    assert agrees(used, entry) and (used.threshold, used.first, used.last) == (0.2, 3, 7)
    plain = sglang_reads(export_entry(sample_entry(), "sglang", threshold=0.2))
    assert (plain.first, plain.last) == (1, 0)


def test_sglang_reads_both_experts():
    text = export_entry(two_experts(), "sglang", threshold=0.3)
    for expert, slot in (("transformer", "high"), ("transformer_2", "low")):
        assert agrees(sglang_reads(text, expert=slot), two_experts(), expert)


def test_tensorrt_llm_reads_the_entry():
    text = export_entry(sample_entry(), "tensorrt-llm", threshold=0.2)
    used = tensorrt_llm_reads(text)
    assert agrees(used, sample_entry()) and (used.threshold, used.first, used.last) == (0.2, 1, 1)
    assert text.startswith(
        "# longcat-image@v0 (measured), teacal registry; fitted on: modulated_input"
    )
    assert (
        tensorrt_llm_reads(export_entry(sample_entry(start=4), "tensorrt-llm", threshold=0.2)).first
        == 5
    )


def test_tensorrt_llm_reads_both_experts():
    text = export_entry(two_experts(), "tensorrt-llm", threshold=0.3)
    assert agrees(tensorrt_llm_reads(text), two_experts())
    assert agrees(tensorrt_llm_reads(text, second=True), two_experts(), "transformer_2")


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
    used = lightx2v_reads(
        export_entry(entry, "lightx2v", threshold=0.2), wan=transformer_class.startswith("Wan")
    )
    assert agrees(used, entry) and (used.threshold, (used.first, used.last)) == (0.2, window)


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


def test_diffusers_reads_the_ratios():
    entry = sample_entry()
    found = magcache_reads(export_entry(entry, "diffusers-magcache"))["transformer_mag_cache"]
    assert tuple(found["mag_ratios"]) == entry.experts["transformer"].mag_ratios["cond"]
    assert found["max_skip_steps"] == 4


def test_cache_dit_reads_the_schedule():
    assert cache_dit_reads(export_entry(sample_entry(), "cache-dit-mask")) == "CCSC"
    assert (
        cache_dit_reads(export_entry(sample_entry(), "cache-dit-mask", schedule="CSSCSSC"))
        == "CSSCSSC"
    )


def test_every_published_set_is_exported_faithfully_or_refused():
    """Whatever an engine accepts, it predicts as the entry does on 0 to 0.5; the rest is refused with a reason."""
    readers = {
        "vllm-omni": vllm_omni_reads,
        "sglang": sglang_reads,
        "tensorrt-llm": tensorrt_llm_reads,
        "comfyui-teacache": comfyui_reads,
    }
    exported = dict.fromkeys([*readers, "lightx2v"], 0)
    for entry in coeffs.entries():
        for engine in exported:
            try:
                text = export_entry(entry, engine, threshold=0.2)
            except EngineError as error:
                assert entry.label in str(error)
                continue
            wan = entry.transformer_class == "WanTransformer3DModel"
            used = lightx2v_reads(text, wan) if engine == "lightx2v" else readers[engine](text)
            assert agrees(used, entry), (entry.label, engine)
            exported[engine] += 1
    assert min(exported.values()) >= 10


# --- refusals -------------------------------------------------------------------------------------------------------


def degree_five() -> coeffs.Entry:
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, 0.0, 0.0, 0.0, 0.5, 0.1), domain=(0.0, 0.4))
    return sample_entry(
        experts={"transformer": {"recommended": "pooled", "branches": {"pooled": fit}}}
    )


def test_a_degree_above_four_is_refused_by_vllm_omni_or_replaced_by_the_alternative():
    with pytest.raises(EngineError, match=r"degree 5, vllm-omni takes at most 4: .*--degree 4"):
        export_entry(degree_five(), "vllm-omni", threshold=0.2)
    other = coeffs.Candidate(coefficients_high_to_low=(0.75, 0.0, 0.125), domain=(0.0, 0.4))
    fit = replace(degree_five().fit(), alternatives=(other,))
    entry = sample_entry(
        experts={"transformer": {"recommended": "pooled", "branches": {"pooled": fit}}}
    )
    text = export_entry(entry, "vllm-omni", threshold=0.2)
    assert "alternative of degree 2, since degree 5 is too much" in json.loads(text)["_comment"]
    assert json.loads(text)["coefficients"] == [0.0, 0.0, 0.75, 0.0, 0.125]


@pytest.mark.parametrize("engine", ["vllm-omni", "lightx2v", "comfyui-teacache"])
def test_two_experts_do_not_go_into_one_slot(engine):
    with pytest.raises(
        EngineError,
        match=r"one slot: use an engine with one per expert|fitted on the modulated_input",
    ):
        export_entry(two_experts(), engine, threshold=0.2)


def test_a_polynomial_that_another_sign_rule_reads_differently_is_refused():
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, -0.1), domain=(0.0, 0.4))
    entry = sample_entry(
        experts={"transformer": {"recommended": "pooled", "branches": {"pooled": fit}}}
    )
    for engine, rule in (("vllm-omni", "abs"), ("sglang", "signed"), ("tensorrt-llm", "abs")):
        with pytest.raises(
            EngineError,
            match=rf"negative on its domain \(x 0 to 0.1\): {engine} reads that as {rule}.*--constrained",
        ):
            export_entry(entry, engine, threshold=0.2)
        assert export_entry(replace(entry, sign_rule=rule), engine, threshold=0.2)
    outside = replace(fit, domain=(0.2, 0.4))
    assert export_entry(
        sample_entry(experts={"transformer": {"recommended": "p", "branches": {"p": outside}}}),
        "sglang",
        threshold=1,
    )


def test_a_double_root_of_a_constrained_fit_is_not_negative():
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, -0.4, 0.04), domain=(0.0, 0.5))
    entry = sample_entry(experts={"transformer": {"recommended": "p", "branches": {"p": fit}}})
    assert "falls with x from 0 to 0.2" in export_entry(entry, "sglang", threshold=0.2)


def test_a_narrow_dip_below_zero_is_not_stepped_over():
    fit = coeffs.Fit(
        coefficients_high_to_low=(1.0, -0.40012, 0.0400240036 - 1e-9), domain=(0.0, 0.5)
    )
    assert negative_ranges(fit.polynomial(), (0.0, 0.5))


def test_a_threshold_always_travels_along():
    with pytest.raises(EngineError, match=r"has thresholds 0.2, 0.3: choose with --threshold"):
        export_entry(sample_entry(), "sglang")
    with pytest.raises(EngineError, match="has no threshold: choose"):
        export_entry(sample_entry(thresholds=()), "sglang")
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(EngineError, match="expected a number above 0"):
            export_entry(sample_entry(), "sglang", threshold=wrong)
    assert "threshold 0.7 is not one that the entry reports on" in export_entry(
        sample_entry(), "sglang", threshold=0.7
    )


def test_a_window_that_an_engine_does_not_have_is_refused():
    for engine in ("vllm-omni", "tensorrt-llm"):
        with pytest.raises(EngineError, match="change start and end of a copy"):
            export_entry(sample_entry(start=10), engine, threshold=0.2)
    with pytest.raises(EngineError, match="the number of steps is not known"):
        export_entry(sample_entry(start=0.5, protocol={}), "tensorrt-llm", threshold=0.2)
    assert "first 1 and last 0 steps (entry: 1 and 1)" in export_entry(
        sample_entry(end=1), "vllm-omni", threshold=0.2
    )


def test_another_signal_than_the_engines_is_refused():
    with pytest.raises(
        EngineError, match=r"lightx2v compares the time_embedding there.*--signal time_embedding"
    ):
        export_entry(
            sample_entry(transformer_class="WanTransformer3DModel"), "lightx2v", threshold=0.2
        )
    with pytest.raises(EngineError, match="ComfyUI-TeaCache compares the time_embedding there"):
        export_entry(
            sample_entry(transformer_class="Lumina2Transformer2DModel"),
            "comfyui-teacache",
            threshold=0.2,
        )
    with pytest.raises(EngineError, match="has no code for that class"):
        export_entry(sample_entry(), "comfyui-teacache", threshold=0.2)


def test_ratios_and_plans_that_are_not_there():
    with pytest.raises(EngineError, match="has no mag_ratios for transformer"):
        export_entry(coeffs.load("alivilab/flux1-dev"), "diffusers-magcache")
    with pytest.raises(EngineError, match=r"has no plan: give one with --schedule CCSC"):
        export_entry(coeffs.load("alivilab/flux1-dev"), "cache-dit-mask")
    for schedule in ("SCC", "", "CXC"):
        with pytest.raises(EngineError, match="begin with C"):
            export_entry(sample_entry(), "cache-dit-mask", schedule=schedule)
    with pytest.raises(EngineError, match="engine 'nope': expected one of vllm-omni"):
        export_entry(sample_entry(), "nope")


# --- and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_read_back_onto_its_entry_changes_nothing(engine):
    entry = sample_entry(
        transformer_class={
            "lightx2v": "HunyuanVideo15Transformer3DModel",
            "comfyui-teacache": "FluxTransformer2DModel",
        }.get(engine, "LongCatImageTransformer2DModel"),
        start=None
        if engine in ("vllm-omni", "diffusers-magcache", "cache-dit-mask")
        else 0.25
        if engine == "comfyui-teacache"
        else 1,
        end=None
        if engine in ("vllm-omni", "diffusers-magcache", "cache-dit-mask")
        else 0.25
        if engine == "comfyui-teacache"
        else 1,
    )
    text = export_entry(entry, engine, threshold=0.2)
    assert import_entry(text, engine, like=entry) == entry
    again = import_entry(text, engine, like=entry)
    assert export_entry(again, engine, threshold=0.2) == text


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_two_experts_come_back(engine):
    entry = two_experts(start=5, end=0)
    assert import_entry(export_entry(entry, engine, threshold=0.2), engine, like=entry) == entry


@pytest.mark.parametrize("engine", ["vllm-omni", "sglang", "tensorrt-llm"])
def test_an_import_without_an_entry_keeps_every_digit(engine):
    entry = coeffs.load("vllm-omni/stable-audio-open")
    if engine != "vllm-omni":
        entry = replace(entry, sign_rule={"sglang": "signed", "tensorrt-llm": "abs"}[engine])
    new = import_entry(
        export_entry(entry, engine, threshold=0.2), engine, model="mine", signal="modulated_input"
    )
    assert new.fit().coefficients_high_to_low == entry.fit().coefficients_high_to_low
    assert (new.status, new.engine, new.sign_rule) == ("published", engine, entry.sign_rule)
    assert [row.threshold for row in new.thresholds] == [0.2]
    assert coeffs.loads(coeffs.dump(new)) == new


def test_numbers_that_changed_on_the_way_replace_the_fit():
    text = (
        export_entry(sample_entry(), "sglang", threshold=0.2)
        .replace("-0.25", "-0.75")
        .replace("0.2,", "0.9,")
    )
    changed = import_entry(text, "sglang", like=sample_entry())
    assert changed.fit().coefficients_high_to_low == (0.5, -0.75, 1.0 / 3.0, 0.125)
    assert changed.fit().domain is None and [row.threshold for row in changed.thresholds] == [0.9]


def test_json_carries_the_whole_entry():
    for entry in (sample_entry(), two_experts(), *coeffs.entries()):
        assert import_entry(export_entry(entry, "json"), "json") == entry


def test_a_reversed_list_is_refused_on_the_way_in():
    for engine in ("vllm-omni", "tensorrt-llm", "sglang"):
        entry = replace(coeffs.load("vllm-omni/longcat-image"), sign_rule="clamp")
        text = export_entry(entry, engine, threshold=0.2)
        given, reversed_ = (
            "652.598, -424.1615, 84.5526, -4.5923, 0.1694",
            "0.1694, -4.5923, 84.5526, -424.1615, 652.598",
        )
        assert given in text
        with pytest.raises(EntryError, match="looks lowest power first"):
            import_entry(
                text.replace(given, reversed_), engine, model="mine", signal="modulated_input"
            )


FORMS = {
    engine: export_entry(
        sample_entry(transformer_class="FluxTransformer2DModel")
        if engine == "comfyui-teacache"
        else sample_entry(transformer_class="HunyuanVideo15Transformer3DModel"),
        engine,
        threshold=0.2,
    )
    for engine in ENGINES
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "{",
        '{"coefficients": [NaN]}',
        '{"coefficients": "12"}',
        "cache_config: 1",
        "cache_config: {a: &x 1}",
        "TeaCacheParams(coefficients=[1, 2])",
        "TeaCacheParams(coefficients=__import__('os').system('id'))",
        "MagCacheConfig()",
        "MagCacheConfig(mag_ratios=[x])",
        'SUPPORTED_MODELS_COEFFICIENTS["a"] = f()',
        "(" * 5000,
        "x" * 300_000,
        "\x00",
        "[" * 100_000,
        '{"coefficients": [1], "coefficients": [2]}',
        '{"coefficients": [true]}',
        '{"coefficients": [1e400]}',
        "import os",
    ],
    ids=range(22),
)
def test_what_is_no_form_of_the_engine_gets_the_typed_error(engine, text):
    with pytest.raises(CoeffsError):
        import_entry(text, engine, model="mine", signal="other")


@pytest.mark.parametrize("engine", ENGINES)
def test_truncated_forms_are_refused_or_read(engine):
    """A form cut anywhere is an error or still the engine's form, never another exception."""
    text = FORMS[engine]
    for cut in range(0, len(text), 7):
        with contextlib.suppress(CoeffsError):
            import_entry(text[:cut], engine, model="mine", signal="other")


def test_an_import_needs_to_know_the_model():
    with pytest.raises(EngineError, match="does not say which model this is: give --model"):
        import_entry(FORMS["sglang"], "sglang")


def test_padding_changes_no_polynomial():
    assert stripped((0.0, 0.0, 1.0, 0.0)) == (1.0, 0.0)
    assert stripped((0.0, 0.0)) == (0.0,)
