"""Schedules: errors from Gram matrices against stored tensors, dynamic programming against all schedules."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.planning.problem import (
    FORECASTS,
    KEPT,
    Problem,
    Program,
    fit_weights,
    local_search,
    schedule_cost,
    schedule_of,
)
from runtime.decide.forecast import Forecast, extrapolation


def a_problem(num_steps, samples=3, size=40, seed=0):
    """Curved random paths, as tensors (samples, T, size) and as the problem made of them."""
    random = np.random.default_rng(seed)
    levels = np.sort(random.uniform(0.05, 1, num_steps))[::-1]
    powers = levels[:, None] ** np.arange(4)
    tensors = np.einsum("tk,pkn->ptn", powers, random.normal(size=(samples, 4, size)))
    tensors += 0.05 * random.normal(size=tensors.shape)
    gram = np.einsum("ptn,pun->ptu", tensors, tensors)
    increments = np.diff(np.append(levels, 0))
    return tensors, Problem(gram, levels, increments, tuple(f"p{i}" for i in range(samples)))


def all_schedules(num_steps, computed):
    for others in combinations(range(1, num_steps), computed - 1):
        yield schedule_of((0, *others), num_steps)


@settings(max_examples=12, deadline=None)
@given(
    num_steps=st.integers(2, 9),
    forecast=st.sampled_from(FORECASTS),
    peak=st.sampled_from([1.0, 2.0, 4.0]),
    seed=st.integers(0, 10_000),
)
def test_program_equals_brute_force(num_steps, forecast, peak, seed):
    _, problem = a_problem(num_steps, seed=seed)
    costs = problem.costs(forecast, peak)
    program = Program(costs, num_steps)
    for computed in range(1, num_steps + 1):
        schedule, cost = program.best(computed)
        least = min(schedule_cost(costs, other) for other in all_schedules(num_steps, computed))
        assert schedule.count("C") == computed and schedule[0] == "C"
        assert cost == pytest.approx(least, rel=1e-9, abs=1e-15)
        assert schedule_cost(costs, schedule) == pytest.approx(cost, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("forecast", FORECASTS)
def test_program_equals_brute_force_on_fourteen_steps(forecast):
    _, problem = a_problem(14, samples=2, seed=3)
    costs = problem.costs(forecast, 2.0)
    program = Program(costs, 14)
    for computed in (3, 5, 9):
        least = min(schedule_cost(costs, other) for other in all_schedules(14, computed))
        assert program.best(computed)[1] == pytest.approx(least, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    num_steps=st.integers(2, 12), forecast=st.sampled_from(FORECASTS), seed=st.integers(0, 10_000)
)
def test_errors_from_the_gram_matrix_equal_those_of_the_tensors(num_steps, forecast, seed):
    tensors, problem = a_problem(num_steps, seed=seed)
    random = np.random.default_rng(seed)
    schedule = "C" + "".join(random.choice(["C", "S"], num_steps - 1))
    weights = fit_weights(problem, schedule) if forecast == "fitted" else forecast
    total, anchors, added = np.zeros_like(tensors[:, 0]), [], np.zeros(len(tensors))
    path = np.linalg.norm(tensors, axis=-1) @ np.abs(problem.increments)
    for step, letter in enumerate(schedule):
        if letter == "C":
            anchors = [step, *anchors][: KEPT[forecast]]
            continue
        if forecast == "fitted":
            factors = weights.rows[step]
        else:
            # What the runtime does.
            at = [problem.levels[a] for a in anchors]
            factors = Forecast(forecast).at(step, problem.levels[step], at)
        guess = sum(w * tensors[:, a] for w, a in zip(factors, anchors, strict=False))
        error = problem.increments[step] * (tensors[:, step] - guess)
        total += error
        added += np.linalg.norm(error, axis=-1)
    np.testing.assert_allclose(
        problem.signed(schedule, weights), np.linalg.norm(total, axis=-1) / path, atol=1e-5
    )
    np.testing.assert_allclose(problem.additive(schedule, weights), added / path, atol=1e-5)


@pytest.mark.parametrize("forecast", ["reuse", "linear", "quadratic"])
def test_table_of_costs_is_the_additive_error(forecast):
    _, problem = a_problem(9)
    costs = problem.costs(forecast)
    for schedule in ("CSSSSSSSS", "CCSSCSSSS", "CSCSCCSSC", "CCCCCCCCC"):
        assert schedule_cost(costs, schedule) == pytest.approx(
            problem.additive(schedule, forecast).mean(), rel=1e-9
        )


def test_weights_of_the_runtime():
    """Bug: planning for another forecast than the one that is deployed."""
    _, problem = a_problem(8)
    rows = problem.rows("CSCSSCSS", "quadratic")
    levels = problem.levels
    expected = extrapolation(levels[7], [levels[5], levels[2], levels[0]])
    np.testing.assert_allclose(-rows[7][[5, 2, 0]], expected)
    np.testing.assert_allclose(-rows[1][0], 1.0)
    assert not rows[5].any()


def test_equal_levels_are_taken_as_in_the_runtime():
    _, problem = a_problem(6)
    levels = problem.levels.copy()
    levels[2] = levels[1]
    twin = Problem(problem.gram, levels, problem.increments)
    schedule = "CCCSSS"
    assert schedule_cost(twin.costs("quadratic"), schedule) == pytest.approx(
        twin.additive(schedule, "quadratic").mean(), rel=1e-9
    )


def test_fitted_weights_find_a_curve_that_a_line_misses():
    random = np.random.default_rng(1)
    levels = np.linspace(1, 0.1, 10)
    tensors = np.einsum("t,pn->ptn", levels**2, random.normal(size=(8, 30)))
    gram = np.einsum("ptn,pun->ptu", tensors, tensors)
    problem = Problem(gram, levels, np.diff(np.append(levels, 0)), tuple(map(str, range(8))))
    schedule = "CCSSCSSCSS"
    fitted = fit_weights(problem, schedule)
    assert fitted.ridge < np.inf
    assert (
        problem.additive(schedule, fitted).mean()
        < 0.01 * problem.additive(schedule, "linear").mean()
    )


def test_fitted_weights_stay_linear_where_nothing_can_be_learned():
    """One prompt cannot be left out: no weights of its own."""
    _, problem = a_problem(8, samples=1)
    fitted = fit_weights(problem, "CCSCSSCS")
    assert fitted.ridge == np.inf
    np.testing.assert_allclose(
        problem.signed("CCSCSSCS", fitted), problem.signed("CCSCSSCS", "linear"), rtol=1e-9
    )


def test_local_search_never_makes_it_worse_and_keeps_the_count():
    _, problem = a_problem(12)
    start = "CSSCSSCSSCSS"

    def value(schedule):
        return float(problem.signed(schedule, "linear").mean())

    found, reached = local_search(start, value)
    assert found.count("C") == 4 and found[0] == "C"
    assert reached == value(found) <= value(start)
