"""The target of a gate that forecasts: the forecast's error, worked out from the Gram log of a run."""

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_pipeline import TinyPipeline

import coeffs
from calibrate.cli import cli
from calibrate.errors import CalibrateError, InvalidOption
from calibrate.fitting.draft import draft_entry
from calibrate.fitting.forecast_error import for_entry, forecast_errors, with_forecast_errors
from calibrate.fitting.score import score
from calibrate.recording.record import record
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import NoPlan, read_gram
from calibrate.runs.pairs import InvalidRun, load_run
from coeffs.errors import EntryError

LEVELS = np.array([1.0, 0.8, 0.5, 0.3, 0.1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "run"
    texts = [f"a thing number {number}" for number in range(3)]
    record(
        TinyPipeline(),
        prompts=texts,
        steps=8,
        guidance_scale=2.0,
        out=path,
        progress=False,
        gram=True,
    )
    return path


def gram_of(curve):
    return np.outer(curve, curve)


def test_a_line_is_forecast_without_error_and_a_parabola_by_its_curvature():
    """v = sigma^2 from two points: the error is (s_t - s_a)(s_t - s_b), over the last value."""
    line = forecast_errors(gram_of(2 - LEVELS), LEVELS, order=1)
    assert np.isnan(line[0])
    assert line[1] == pytest.approx(0.2 / 1.0)  # one anchor only: reused, 1.0 instead of 1.2
    np.testing.assert_allclose(line[2:], 0, atol=1e-7)
    bent = forecast_errors(gram_of(LEVELS**2), LEVELS, order=1)
    assert bent[2] == pytest.approx((0.5 - 0.8) * (0.5 - 1.0) / 0.64)
    assert bent[4] == pytest.approx((0.1 - 0.3) * (0.1 - 0.5) / 0.09)
    np.testing.assert_allclose(
        forecast_errors(gram_of(LEVELS**2), LEVELS, order=2)[3:], 0, atol=1e-7
    )


def test_no_error_is_relative_to_nothing():
    assert np.isnan(forecast_errors(np.zeros((3, 3)), LEVELS[:3], order=1)).all()


def test_errors_of_a_run_equal_those_of_its_own_branches(folder):
    run = with_forecast_errors(load_run(folder), "linear", "output")
    group = RunFolder.open(folder).groups[1]
    arrays = read_gram(folder / "gram" / f"{group.name}.npz")["transformer"]
    steps = len(arrays["sigmas"]) - 1
    rows = run.frame[
        (run.frame["prompt_id"] == group.prompt.prompt_id) & (run.frame["branch"] == "uncond")
    ]
    own = arrays["output"][steps:, steps:]
    expected = forecast_errors(own, arrays["sigmas"][:steps], order=1)
    assert len(rows) == steps - 1
    np.testing.assert_allclose(rows["y_forecast_error"], expected[rows["step"]])
    assert run.log_sha256 == load_run(folder).log_sha256


def test_a_gate_is_fitted_on_the_error_and_says_so(folder):
    entry = draft_entry(load_run(folder), degree=1, forecast="linear")
    assert (entry.target, entry.forecast, entry.forecast_of) == (
        "forecast_error",
        "linear",
        "output",
    )
    pairs = for_entry(load_run(folder), entry).pairs(target="forecast_error", branch="cond")
    fitted = entry.experts["transformer"].branches["cond"]
    plain = np.polyfit(pairs["x"], pairs["y"], 1)
    both = (fitted, *fitted.alternatives)
    found = next(one for one in both if one.method == "polyfit")
    np.testing.assert_allclose(found.coefficients_high_to_low, plain, rtol=1e-6)
    own = score([entry], load_run(folder))
    assert set(own["target"]) == {"forecast_error"} and (own["pairs"] > 0).all()


def test_the_command_writes_such_an_entry(folder, tmp_path):
    out = tmp_path / "linear.yaml"
    arguments = [
        "fit",
        str(folder),
        "--degree",
        "1",
        "--forecast",
        "linear",
        "--forecast-of",
        "residual",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    entry = coeffs.load(out)
    assert entry.forecast_of == "residual" and "-> forecast_error" in result.stdout
    assert entry.source.command.endswith("--forecast linear --forecast-of residual")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forecast": "reuse"}, "expected linear or quadratic"),
        ({"forecast_of": "output"}, "give --forecast linear"),
        ({"forecast": "linear", "target": "hidden"}, "leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, options, said):
    with pytest.raises(InvalidOption, match=said):
        draft_entry(load_run(folder), **options)


def test_without_gram_matrices_it_is_refused(folder):
    run = load_run(folder)
    with pytest.raises(NoPlan, match="bare table"):
        with_forecast_errors(load_run(run.rows), "linear")
    with pytest.raises(InvalidRun, match="forecast_error"):
        run.pairs(target="forecast_error")
    assert issubclass(NoPlan, CalibrateError)


def test_an_entry_on_a_forecasts_error_must_name_the_forecast(folder):
    entry = draft_entry(load_run(folder), degree=1, forecast="linear")
    plain = coeffs.dump(entry).replace("forecast: linear\n", "")
    with pytest.raises(EntryError, match="expected linear or quadratic"):
        coeffs.loads(plain)
