"""95 % intervals cover the truth in 90 to 99 % of 500 repetitions, for prompts with effects of their own."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
from analysis_data import make_entry, make_frame

from calibrate.fitting.intervals import bootstrap, computed_intervals
from calibrate.fitting.least_squares import (
    fit_polynomial,
    scale_to_unit,
    shaped_solution,
)
from calibrate.fitting.replay import Search
from calibrate.runs.pairs import load_run

STEPS = 12
fit_constrained = functools.partial(fit_polynomial, method="constrained")
REPETITIONS = 500
TRUTH = (1.5, 0.4, 0.03)
CALIBRATED = (0.90, 0.99)


def population(prompts, random):
    """Pairs of new prompts: level and slope of the prompt's own, noise growing with x. Mean curve: TRUTH."""
    base = 0.05 + 0.2 * np.linspace(-1, 1, STEPS) ** 2
    x = base * np.exp(random.normal(0, 0.1, (prompts, STEPS)))
    level, slope = (random.normal(0, spread, (prompts, 1)) for spread in (0.01, 0.05))
    y = np.polyval(TRUTH, x) + level + slope * x + random.normal(0, 0.05, x.shape) * x
    return x, y


@functools.cache
def template(prompts):
    return make_frame(prompts=prompts, steps=STEPS + 1, branches=("cond",))


def table(x, y):
    """A log with one branch; the pairs' own column y beside it."""
    return template(len(x)).assign(x=x.ravel(), y_output=y.ravel(), y=y.ravel())


def mean_computed(predicted, threshold):
    """The gate's rule in a few lines: first and last step computed, skip while the sum stays below the threshold."""
    accumulated, computed = np.zeros(len(predicted)), np.ones(len(predicted))
    for step in range(predicted.shape[1] - 1):
        accumulated += predicted[:, step]
        skip = accumulated < threshold
        accumulated *= skip
        computed += ~skip
    return computed.mean() + 1


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [6, 20])
def test_intervals_of_coefficients_and_curve_are_calibrated(prompts):
    random = np.random.default_rng(prompts)
    hits = []
    for _ in range(REPETITIONS):
        pairs = table(*population(prompts, random))
        resampled = bootstrap(pairs, fit_polynomial(pairs["x"], pairs["y"], 2), 100)
        low, high = np.array(resampled.coefficient_intervals()).T
        band = resampled.curve_band(5)
        truth = np.polyval(TRUTH, band["x"])
        hits.append(
            [
                *((low <= TRUTH) & (high >= TRUTH)),
                *((band["low"] <= truth) & (band["high"] >= truth)),
            ]
        )
    coverage = np.mean(hits, axis=0)
    assert (coverage >= CALIBRATED[0]).all() and (coverage <= CALIBRATED[1]).all(), coverage


@pytest.mark.slow
def test_intervals_of_computed_steps_are_calibrated():
    """The truth is what the polynomial of all prompts computes on average over all prompts."""
    random, thresholds = np.random.default_rng(0), [0.1, 0.15, 0.25]
    x, y = population(40_000, random)
    predicted = np.polyval(np.polyfit(x.ravel(), y.ravel(), 2), x)
    truth = np.array([mean_computed(predicted, threshold) for threshold in thresholds])
    run, hits = load_run(table(*population(10, random))), []
    for _ in range(REPETITIONS):
        pairs = table(*population(10, random))
        run = dataclasses.replace(run, frame=pairs, rows=pairs)
        result = fit_polynomial(pairs["x"], pairs["y"], 2)
        key = ("transformer", "cond")
        search = Search(run, make_entry(run, result))
        refits = {key: bootstrap(pairs, result, 60)}
        low, high = computed_intervals(search, refits, thresholds)
        hits.append((low <= truth) & (truth <= high))
    coverage = np.mean(hits, axis=0)
    assert (coverage >= CALIBRATED[0]).all() and (coverage <= CALIBRATED[1]).all(), coverage


def test_constrained_refits_keep_the_shape_and_cover():
    random, hits = np.random.default_rng(3), []
    for _ in range(40):
        pairs = table(*population(10, random))
        resampled = bootstrap(pairs, fit_constrained(pairs["x"], pairs["y"], 4), 50)
        grid = np.linspace(*resampled.domain, 200)
        curves = resampled.coefficients_high_to_low @ np.vander(grid, 5).T
        assert curves.min() >= -1e-9 and np.diff(curves, axis=1).min() >= -1e-9
        band = resampled.curve_band(3)
        hits.append(
            (band["low"] <= np.polyval(TRUTH, band["x"]))
            & (band["high"] >= np.polyval(TRUTH, band["x"]))
        )
    assert np.mean(hits) > 0.85


def test_refits_are_those_of_the_drawn_prompts():
    """Against the long way: put the drawn prompts' pairs together and fit them."""
    pairs = table(*population(5, np.random.default_rng(1)))
    for fitter in (fit_polynomial, fit_constrained):
        result = fitter(pairs["x"], pairs["y"], 3)
        resampled = bootstrap(pairs, result, 20)
        for weights, found in zip(
            resampled.weights, resampled.coefficients_high_to_low, strict=True
        ):
            drawn = pd.concat([
                pairs[pairs["prompt_id"] == prompt]
                for prompt, times in zip(resampled.prompts, weights, strict=True) for _ in range(times)
            ])  # fmt: skip
            again = fit_polynomial(drawn["x"], drawn["y"], 3)(drawn["x"])
            if (
                fitter is fit_constrained
            ):  # on the domain of all prompts, which the drawn ones may not reach
                t = scale_to_unit(drawn["x"].to_numpy(), result.domain)
                q, r = np.linalg.qr(np.vander(t, 4, increasing=True))
                again = np.polyval(shaped_solution(r, q.T @ drawn["y"])[::-1], t)
            np.testing.assert_allclose(
                np.polyval(found, drawn["x"]), again, rtol=1e-6, atol=1e-9
            )


def test_no_interval_from_fewer_than_three_prompts():
    pairs = table(*population(2, np.random.default_rng(1)))
    assert bootstrap(pairs, fit_polynomial(pairs["x"], pairs["y"], 2)) is None
