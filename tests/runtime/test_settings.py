"""What will be in force: resolved from plain facts, without torch."""

import dataclasses
import logging
import subprocess
import sys

import pytest
from tiny_pipeline import TinyPipeline

import coeffs
from coeffs.entry.signals import SIGNALS
from runtime import InvalidSetting, apply_tea_cache
from runtime.asked import Asked, Model
from runtime.decide.forecast import Forecast
from runtime.settings import resolve

FACTS = {"transformer_class": "FluxTransformer2DModel"}
PIPELINE = Model(
    facts=FACTS, classes={"transformer": "FluxTransformer2DModel"}, has_scheduler=True
)
BARE = dataclasses.replace(PIPELINE, has_scheduler=False)


def entry(**fields) -> coeffs.Entry:
    fit = coeffs.Fit(coefficients_high_to_low=(1.0, 0.0), domain=(0.0, 1.0))
    expert = coeffs.Expert(recommended="cond", branches={"cond": fit})
    return coeffs.Entry(
        model="tiny", status="measured", transformer_class="FluxTransformer2DModel", signal="modulated_input",
        target="output", experts={"transformer": expert}, **fields,
    )  # fmt: skip


def test_resolving_needs_no_torch():
    code = "import sys, runtime.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gate_takes_the_entrys_window_unless_another_is_given():
    protocol = coeffs.Protocol(num_steps=50)
    measured = entry(start=3, end=2, max_skips=4, protocol=protocol)
    settings = resolve(Asked(entry=measured, threshold=0.2), PIPELINE)
    assert (settings.policy, settings.label, settings.signal) == (
        "gate",
        "tiny@v0",
        "modulated_input",
    )
    assert dataclasses.astuple(settings.gate) == (0.2, 3, 2, 4, False)
    assert settings.num_steps == 50 and settings.branches == "together"
    own = resolve(
        Asked(entry=measured, threshold=0.2, start=0, end=1, max_skips=None), PIPELINE
    )
    assert dataclasses.astuple(own.gate) == (0.2, 0, 1, None, False)
    compat = resolve(Asked(entry=measured, threshold=0.2, compat=True), PIPELINE)
    assert compat.branches == "apart" and compat.gate.compat


def test_a_bare_denoiser_has_no_last_steps_unless_their_number_is_known():
    assert resolve(Asked(coefficients=[1.0], threshold=0.1), BARE).gate.end == 0
    assert resolve(Asked(coefficients=[1.0], threshold=0.1, num_steps=9), BARE).gate.end == 1
    with pytest.raises(InvalidSetting, match="give num_steps"):
        resolve(Asked(coefficients=[1.0], threshold=0.1, end=2), BARE)


def test_a_plan_brings_its_forecast_and_the_caller_may_bring_another():
    plan = coeffs.Plan(
        schedule="CCSS",
        forecast="fitted",
        forecast_of="guided",
        weights=((1.5, -0.5), (2.0, -1.0)),
    )
    settings = resolve(Asked(schedule=plan), PIPELINE)
    assert settings.policy == "plan" and settings.forecast_of == "guided"
    assert settings.forecast == Forecast("fitted", {2: (1.5, -0.5), 3: (2.0, -1.0)}, "CCSS")
    other = resolve(Asked(schedule=plan, forecast="linear"), PIPELINE)
    assert (other.forecast.kind, other.forecast_of) == ("linear", "residual")
    with pytest.raises(InvalidSetting, match="a bare denoiser has none"):
        resolve(Asked(schedule=plan), BARE)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "exactly one of"),
        ({"threshold": 0.1, "schedule": "CC"}, "threshold and schedule given"),
        ({"schedule": "CCSS", "start": 0}, "start= has no meaning"),
        ({"schedule": "CCSS", "max_skips": None}, "max_skips= has no meaning"),
        ({"schedule": "CCSS", "strict": True}, "strict= has no meaning"),
        ({"schedule": "CCSS", "coefficients": [1.0]}, "coefficients= has no meaning"),
        ({"threshold": 0.1, "entry": entry(), "domain": (0, 1)}, "domain= belongs to"),
        (
            {"threshold": 0.1, "entry": entry(), "coefficients": [1.0]},
            "expected one of them",
        ),
        ({"threshold": 0.1, "coefficients": [1.0], "num_steps": 9}, "for a bare denoiser"),
        (
            {"threshold": 0.1, "coefficients": [1.0], "signal": "sound"},
            "can watch modulated_input",
        ),
        (
            {"threshold": 0.1, "coefficients": [1.0], "compat": True, "end": 2},
            "beside compat",
        ),
        (
            {"threshold": 0.1, "coefficients": [1.0], "branches": "alone"},
            "expected together",
        ),
        ({"speedup": 2.0, "coefficients": [1.0]}, "needs a registry entry"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(asked, said):
    with pytest.raises(InvalidSetting, match=said):
        resolve(Asked(**asked), PIPELINE)


def test_another_class_is_refused():
    other = dataclasses.replace(PIPELINE, classes={"transformer": "WanTransformer3DModel"})
    with pytest.raises(InvalidSetting, match="this model is WanTransformer3DModel"):
        resolve(Asked(entry=entry(), threshold=0.1), other)


def test_every_signal_of_the_table_is_measured_and_recorded():
    from calibrate.recording.figures import DISTANCES
    from calibrate.runs.files import PAIR_COLUMNS
    from runtime.watch import call

    columns = {signal.column for signal in SIGNALS.values()}
    assert set(call._MEASURES) == set(SIGNALS)
    assert columns <= set(DISTANCES) and columns <= set(PAIR_COLUMNS)


def test_every_mismatch_is_logged_once(caplog):
    """An entry of another number of steps was applied without a word."""
    caplog.set_level(logging.WARNING, logger="runtime")
    pipe = TinyPipeline()
    measured = entry(protocol=coeffs.Protocol(num_steps=50, dtype="bfloat16"))
    with apply_tea_cache(pipe, measured, threshold=0.1) as cache:
        pipe("a fish")
        pipe("a fish")
    assert len(cache.mismatches) == 2 and len(caplog.records) == 2
    assert "num_steps: 50 in the entry, 8 here" in caplog.text and "tiny@v0" in caplog.text
