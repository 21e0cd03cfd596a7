"""Forms read back: onto their entry, into a new one, and what is no form of the engine."""

import contextlib
from dataclasses import replace

import pytest
from coeffs_samples import sample_entry, two_experts
from engine_readers import entry_for

import coeffs
from coeffs.engines import ENGINES, export_entry, import_entry
from coeffs.engines.setting import stripped
from coeffs.errors import CoeffsError, EngineError, EntryError

CHANGES = {
    "sglang": {"start": 1, "end": 1},
    "tensorrt-llm": {"start": 1, "end": 1},
    "lightx2v": {"start": 1, "end": 1},
    "mlx-teacache": {"start": 1, "end": 1},
    "comfyui-teacache": {"start": 0.25, "end": 0.25},
    "lightx2v-magcache": {"max_skips": 6},
    "solver": {
        "plans": (
            {
                "schedule": "CCSC",
                "sigmas": (1.0, 0.7, 0.4, 0.2, 0.0),
                "forecast_of": "guided",
            },
        )
    },
}


def carried(engine: str) -> coeffs.Entry:
    """An entry of which the engine's form carries every number that it can."""
    return entry_for(engine, **CHANGES.get(engine, {}))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_read_back_onto_its_entry_changes_nothing(engine):
    entry = carried(engine)
    text = export_entry(entry, engine, threshold=0.2)
    assert import_entry(text, engine, like=entry) == entry
    again = import_entry(text, engine, like=entry)
    assert export_entry(again, engine, threshold=0.2) == text


def test_two_experts_come_back():
    entry = two_experts(signal="time_embedding", start=1, end=1)
    text = export_entry(entry, "tensorrt-llm", threshold=0.2)
    assert import_entry(text, "tensorrt-llm", like=entry) == entry


@pytest.mark.parametrize("engine", ["vllm-omni", "tensorrt-llm", "mlx-teacache"])
def test_an_import_without_an_entry_keeps_every_digit(engine):
    rule = {"mlx-teacache": "clamp"}.get(engine, "abs")
    flux = {"transformer_class": "FluxTransformer2DModel", "sign_rule": rule}
    entry = replace(coeffs.load("vllm-omni/stable-audio-open"), **flux)
    text = export_entry(entry, engine, threshold=0.2)
    new = import_entry(text, engine, model="mine", signal="modulated_input")
    assert new.fit().coefficients_high_to_low == entry.fit().coefficients_high_to_low
    assert (new.status, new.engine, new.sign_rule) == ("published", engine, entry.sign_rule)
    assert [row.threshold for row in new.thresholds] == [0.2]
    assert coeffs.loads(coeffs.dump(new)) == new


def test_numbers_that_changed_on_the_way_replace_the_fit():
    entry = entry_for("sglang")
    text = (
        export_entry(entry, "sglang", threshold=0.2)
        .replace("-0.25", "-0.75")
        .replace("0.2,", "0.9,")
    )
    changed = import_entry(text, "sglang", like=entry)
    assert changed.fit().coefficients_high_to_low == (0.5, -0.75, 1.0 / 3.0, 0.125)
    assert changed.fit().domain is None and [row.threshold for row in changed.thresholds] == [
        0.9
    ]


def test_json_carries_the_whole_entry():
    for entry in (sample_entry(), two_experts(), *coeffs.entries()):
        assert import_entry(export_entry(entry, "json"), "json") == entry


def test_a_reversed_list_is_refused_on_the_way_in():
    entry = replace(coeffs.load("vllm-omni/longcat-image"), sign_rule="clamp")
    given = "652.598, -424.1615, 84.5526, -4.5923, 0.1694"
    reversed_ = "0.1694, -4.5923, 84.5526, -424.1615, 652.598"
    for engine in ("vllm-omni", "tensorrt-llm", "sglang"):
        text = export_entry(entry, engine, threshold=0.2, force=True)
        assert given in text
        text = text.replace(given, reversed_)
        with pytest.raises(EntryError, match="looks lowest power first"):
            import_entry(text, engine, model="mine", signal="modulated_input")


FORMS = {engine: export_entry(carried(engine), engine, threshold=0.2) for engine in ENGINES}


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
