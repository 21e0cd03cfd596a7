"""Both fits: the plain one is numpy.polyfit's, the constrained one the best of its shape and never out of it."""

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
from analysis_data import TRUTH, make_frame, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from calibrate.fitting.held_out import figures
from calibrate.fitting.least_squares import CannotFit, fit_polynomial
from calibrate.reporting.run_data import example_run
from calibrate.runs.pairs import load_run
from coeffs.entry.polynomial import falling_ranges, negative_ranges

# Target, degree, branch; plain coefficients and held-out RMSE of both fits, as an implementation in exact rational
# arithmetic with a constraint at every violated point gave them on the shipped example run.
RECORDED = [
    (
        "output",
        4,
        "cond",
        [
            -7146.6322817864175,
            3090.050336352959,
            -413.63553973334695,
            22.327595145193726,
            -0.3972331818472117,
        ],
        0.015124290183637827,
        0.015134154131367508,
    ),
    (
        "output",
        4,
        "uncond",
        [
            -550.8276388321932,
            2909.037372493159,
            -661.3059423576955,
            49.886425437119875,
            -1.1608640785331152,
        ],
        0.0746836522466582,
        0.07487281254690863,
    ),
    (
        "residual",
        4,
        "pooled",
        [
            22208.456931923683,
            -6191.506557874549,
            595.0937953241338,
            -20.993008644559048,
            0.26043399650435817,
        ],
        0.089543472375506,
        0.089543472375506,
    ),
    (
        "residual",
        2,
        "cond",
        [17.323753004073314, -0.8527161549990887, 0.05471410364911569],
        0.011712037530260054,
        0.011712037530260054,
    ),
]

fit_constrained = partial(fit_polynomial, method="constrained")

RANGES = [(0.0186, 0.062), (0.011, 0.159), (0.05, 0.6), (0.0, 0.3)]

SHAPES = [
    lambda x: 0.3 - 0.5 * x,
    lambda x: 0 * x,
    lambda x: abs(np.sin(25 * x)),
    lambda x: x**3,
    lambda x: 1 / (x + 0.01),
    lambda x: 3 * (x - 0.2) ** 2,
]


def noisy(low, high, count=980, seed=0):
    random = np.random.default_rng(seed)
    x = random.uniform(low, high, count)
    return x, 0.05 + 0.3 * x + random.normal(0, 0.02, count)


@pytest.mark.parametrize("low,high", RANGES)
@pytest.mark.parametrize("degree", range(1, 7))
def test_equals_polyfit_where_that_is_well_conditioned(low, high, degree):
    x, y = noisy(low, high)
    result = fit_polynomial(x, y, degree)
    if result.condition < 1e5:
        np.testing.assert_allclose(
            result.coefficients_high_to_low, np.polyfit(x, y, degree), rtol=1e-9
        )
    assert result.condition < 1e5 or degree == 6
    assert result.domain == (x.min(), x.max())


def test_polyfit_over_the_files_gives_the_coefficients(tmp_path):
    run = make_run(tmp_path / "run", make_frame(prompts=10, steps=50))
    rows = pd.read_parquet(run / "pairs")
    for branch in ("cond", "uncond", "pooled"):
        own = rows if branch == "pooled" else rows[rows["branch"] == branch]
        pairs = load_run(run).pairs(branch=branch)
        result = fit_polynomial(pairs["x"].to_numpy(), pairs["y"].to_numpy(), 4)
        np.testing.assert_allclose(
            result.coefficients_high_to_low,
            np.polyfit(own["x"], own["y_output"], 4),
            rtol=1e-9,
        )


@pytest.mark.parametrize("low,high", [(0.04, 0.06), (0.1, 0.102)])
def test_ill_conditioned_fits_predict_the_same_as_in_the_scaled_basis(low, high):
    """numpy.polyfit itself loses digits here: the exported numbers must not."""
    x, y = noisy(low, high)
    result = fit_polynomial(x, y, 6)
    t = (x - (low + high) / 2) / ((high - low) / 2)
    kept = len(np.trim_zeros(result.coefficients_high_to_low, "f")) - 1
    reference = np.polyval(np.polyfit(t, y, kept), t)
    np.testing.assert_allclose(result(x), reference, rtol=1e-6)
    assert any("ill-conditioned" in warning for warning in result.warnings)


@pytest.mark.parametrize("target,degree,branch,plain,plain_error,shaped_error", RECORDED)
def test_the_example_run_gives_the_recorded_fits(
    target, degree, branch, plain, plain_error, shaped_error
):
    pairs = load_run(example_run()).pairs(target=target, branch=branch)
    free = fit_polynomial(pairs["x"], pairs["y"], degree)
    np.testing.assert_allclose(free.coefficients_high_to_low, plain, rtol=1e-9)
    np.testing.assert_allclose(np.polyfit(pairs["x"], pairs["y"], degree), plain, rtol=1e-9)
    assert figures(pairs, free)["rmse_held_out"] == pytest.approx(plain_error, rel=1e-9)
    shaped = figures(pairs, fit_constrained(pairs["x"], pairs["y"], degree))
    assert shaped["rmse_held_out"] == pytest.approx(shaped_error, rel=1e-4)


def test_recovers_a_known_polynomial():
    x = np.linspace(0.02, 0.3, 400)
    np.testing.assert_allclose(
        fit_polynomial(x, np.polyval(TRUTH, x), 3).coefficients_high_to_low,
        TRUTH,
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        fit_constrained(x, np.polyval(TRUTH, x), 3).coefficients_high_to_low,
        TRUTH,
        rtol=1e-9,
    )
    noise = np.random.default_rng(0).normal(0, 1e-3, 400)
    curve = fit_polynomial(x, np.polyval(TRUTH, x) + noise, 3)(x)
    assert np.abs(curve - np.polyval(TRUTH, x)).max() < 4e-4


@st.composite
def clouds(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.floats(0, 0.2))
    high = low + draw(st.floats(0.01, 0.6))
    x = low + (high - low) * random.uniform(size=draw(st.integers(2, 200))) ** draw(
        st.sampled_from([0.5, 1, 3])
    )
    y = abs(
        draw(st.sampled_from(SHAPES))(x)
        + random.normal(0, draw(st.sampled_from([0, 1e-3, 0.1])), len(x))
    )
    return x, y, draw(st.integers(1, 6))


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_the_constrained_fit_never_leaves_its_constraints(cloud):
    x, y, degree = cloud
    result = fit_constrained(x, y, degree)
    for points in (10, 333, 4096):
        values = result(np.linspace(*result.domain, points))
        assert values.min() >= 0
        assert np.diff(values).min() >= 0
    for broken in (negative_ranges, falling_ranges):
        assert not broken(result, result.domain)
    # The stated price: never worse than a constant.
    assert np.sqrt(np.mean((result(x) - y) ** 2)) <= np.std(y) * (1 + 1e-6) + 1e-9 * y.max()


@settings(max_examples=100, deadline=None)
@given(clouds())
def test_the_constrained_fit_is_polyfit_where_that_has_the_shape(cloud):
    x, y, degree = cloud
    plain = fit_polynomial(x, y, degree)
    values = plain(np.linspace(*plain.domain, 5000))
    if values.min() > 1e-6 and np.diff(values).min() > 1e-9:
        assert (
            fit_constrained(x, y, degree).coefficients_high_to_low
            == plain.coefficients_high_to_low
        )


@pytest.mark.parametrize("degree", range(1, 7))
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]])
def test_no_other_polynomial_of_the_shape_fits_better(shape, degree):
    random = np.random.default_rng(degree)
    x = random.uniform(0.02, 0.4, 300)
    y = abs(shape(x) + random.normal(0, 0.02, 300))
    ours = np.mean((fit_constrained(x, y, degree)(x) - y) ** 2)
    t = (x - (x.max() + x.min()) / 2) / (np.ptp(x) / 2)
    design, grid, powers = (
        np.vander(t, degree + 1, increasing=True),
        np.linspace(-1, 1, 200),
        np.arange(degree + 1),
    )
    slopes = powers * grid[:, None] ** np.maximum(powers - 1, 0)
    edge = (-1.0) ** powers
    found = minimize(
        lambda c: 1e3 * np.mean((design @ c - y) ** 2), np.r_[y.mean(), np.zeros(degree)],
        jac=lambda c: 2e3 * design.T @ (design @ c - y) / len(y),
        method="SLSQP", options={"maxiter": 500, "ftol": 1e-13},
        constraints=[{"type": "ineq", "fun": lambda c: slopes @ c, "jac": lambda c: slopes},
                     {"type": "ineq", "fun": lambda c: edge @ c, "jac": lambda c: edge}],
    )  # fmt: skip
    assert ours <= found.fun / 1e3 * (1 + 1e-4)


@pytest.mark.parametrize("fitter", [fit_polynomial, fit_constrained])
def test_constant_and_nearly_constant_x_lower_the_degree_and_say_so(fitter):
    y = np.arange(8.0)
    constant = fitter(np.full(8, 0.1), y, 4)
    assert constant.coefficients_high_to_low == (0, 0, 0, 0, pytest.approx(3.5))
    assert constant.warnings[0] == "x is constant (0.1 to 0.1): degree 0 instead of 4"
    assert constant.predict(0.1) == pytest.approx(3.5)
    two = fitter(np.repeat([0.1, 0.2], 4), y, 4)
    assert "x is known at too few places (2)" in two.warnings[
        0
    ] and two.coefficients_high_to_low[:3] == (0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow = fitter(0.05 + 1e-5 * np.linspace(0, 1, 50), np.linspace(0.1, 0.2, 50), 4)
    assert (
        narrow.warnings[0] == "x is nearly constant (0.05 to 0.05001): degree 1 instead of 4"
    )
    np.testing.assert_allclose(narrow(np.array(narrow.domain)), [0.1, 0.2], rtol=1e-4)
    assert fitter(np.zeros(5), np.full(5, 0.2), 2).predict(0.0) == pytest.approx(0.2)


def test_doubtful_coefficients_are_named():
    x, y = noisy(0.05, 0.06)
    texts = " ".join(fit_polynomial(x, y, 4).warnings)
    assert (
        "huge coefficient" in texts
        and "ill-conditioned" in texts
        and "terms cancel to one part in" in texts
    )
    assert fit_polynomial(*noisy(0.02, 0.4), 4).warnings == ()


def test_what_cannot_be_fitted_is_refused_in_one_line():
    x = y = np.linspace(0, 1, 10)
    for arguments, words in (
        ((x, y, 0), "degree 0: expected a whole number from 1 to 6"), ((x, y, 7), "degree 7"),
        ((x, y, 2.5), "degree 2.5"), ((x, y[:5], 2), "two equally long rows"), (([], [], 2), "no pairs"),
        ((x, y * np.nan, 2), "non-finite"),
    ):  # fmt: skip
        with pytest.raises(CannotFit, match=words):
            fit_polynomial(*arguments)
