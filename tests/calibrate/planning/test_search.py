"""Costs of spans and the search: against brute force, and against the tensors that the Gram matrix stands for."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.errors import InvalidOption
from calibrate.planning.problem import FORECASTS, Problem, gains_of_levels
from calibrate.planning.search import (
    best_schedules,
    computed_of,
    schedule_cost,
    schedule_of,
    uniform_between,
)


def a_problem(num_steps, samples=3, size=40, seed=0, walls=(0,)):
    """Curved random predictions, as tensors (samples, T, size) and as a problem."""
    random = np.random.default_rng(seed)
    levels = np.sort(random.uniform(0.05, 1, num_steps))[::-1]
    tensors = np.einsum(
        "tk,pkn->ptn",
        levels[:, None] ** np.arange(3),
        random.normal(size=(samples, 3, size)),
    )
    tensors += 0.05 * random.normal(size=tensors.shape)
    gram = np.einsum("ptn,pun->ptu", tensors, tensors)
    increments = np.diff(np.append(levels, 0.0))
    gains = random.uniform(0.2, 1, num_steps + 1)
    return Problem(gram, levels, increments, gains, walls), tensors


def all_schedules(num_steps, computed, walls=(0,)):
    free = [step for step in range(num_steps) if step not in walls]
    for others in combinations(free, computed - len(walls)):
        yield schedule_of([*walls, *others], num_steps)


@settings(max_examples=15, deadline=None)
@given(
    num_steps=st.integers(3, 9),
    forecast=st.sampled_from(FORECASTS),
    robust=st.booleans(),
    wall=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_program_equals_brute_force(num_steps, forecast, robust, wall, seed):
    walls = tuple(sorted({0, min(wall, num_steps - 1)}))
    problem, _ = a_problem(num_steps, seed=seed, walls=walls)
    costs = problem.costs(forecast, robust)
    best = best_schedules(costs)
    assert all(schedule_cost(costs, s) == np.inf for s in best[: len(walls) - 1])
    for computed in range(len(walls), num_steps + 1):
        schedule = best[computed - 1]
        assert schedule.count("C") == computed and all(
            schedule[wall] == "C" for wall in walls
        )
        cost = schedule_cost(costs, schedule)
        least = min(
            schedule_cost(costs, s) for s in all_schedules(num_steps, computed, walls)
        )
        assert cost == pytest.approx(least, rel=1e-9, abs=1e-15)


def test_fewer_computed_steps_than_experts_are_refused():
    with pytest.raises(InvalidOption, match="at least one for each of 2 experts"):
        uniform_between((0, 3), 6, 1)


@pytest.mark.parametrize("forecast", ["reuse", "linear"])
def test_a_span_costs_the_norm_of_its_summed_errors(forecast):
    """Errors of one span are added with their signs before the norm: only their sum reaches the model."""
    problem, tensors = a_problem(8)
    schedule, total = "CSSCSSSC", 0.0
    computed = computed_of(schedule)
    for index, (newest, after) in enumerate(pairwise([*computed, 8])):
        summed = np.zeros(tensors[:, 0].shape)
        for step in range(newest + 1, after):
            forecasted = tensors[:, newest]
            if forecast == "linear" and index:
                older = computed[index - 1]
                slope = (problem.levels[step] - problem.levels[newest]) / (
                    problem.levels[newest] - problem.levels[older]
                )
                forecasted = forecasted + slope * (tensors[:, newest] - tensors[:, older])
            summed += problem.increments[step] * (tensors[:, step] - forecasted)
        total += (np.linalg.norm(summed, axis=-1) / problem.path).mean() * problem.gains[
            after
        ]
    assert schedule_cost(problem.costs(forecast), schedule) == pytest.approx(total, rel=1e-6)


def test_fitted_spans_cost_at_most_what_others_do():
    problem, _ = a_problem(9, samples=1)
    fitted, linear, reuse = (
        problem.costs(forecast) for forecast in ("fitted", "linear", "reuse")
    )
    valid = np.isfinite(fitted)
    assert (fitted[valid] <= linear[valid] + 1e-3).all()
    assert (fitted[valid] <= reuse[valid] + 1e-3).all()


def test_an_error_counts_by_what_is_left_of_it():
    """Bug: costs without a sensitivity put computed steps where errors die out."""
    problem, _ = a_problem(10)
    flat = Problem(problem.gram, problem.levels, problem.increments, np.ones(11))
    fading = Problem(
        problem.gram,
        problem.levels,
        problem.increments,
        np.where(np.arange(11) > 6, 1, 1e-6),
    )
    even, late = (best_schedules(p.costs("reuse"))[3] for p in (flat, fading))
    assert late[5:].count("C") >= 3 > even[5:].count("C")


def test_gains_of_noise_levels():
    added = gains_of_levels(np.array([157.0, 1.0, 0.0]))
    assert added == pytest.approx([1 / 157, 1 / np.sqrt(2), 1.0], rel=1e-3)
    mixed = gains_of_levels(np.array([1.0, 0.5, 0.0]))
    assert mixed == pytest.approx([1.0, np.sqrt(2), 1.0])
    assert gains_of_levels(np.array([np.nan, 0.0])).tolist() == [1.0, 1.0]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_uniform_schedules_begin_every_expert_with_a_computed_step(sizes, data):
    walls = tuple(np.cumsum([0, *sizes[:-1]]).tolist())
    computed = data.draw(st.integers(len(walls), sum(sizes)))
    schedule = uniform_between(walls, sum(sizes), computed)
    assert schedule.count("C") == computed and all(schedule[wall] == "C" for wall in walls)
