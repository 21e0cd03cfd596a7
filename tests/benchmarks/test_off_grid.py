"""Solvers with free levels, on a model of a few kilobytes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_pipeline import TinyPipeline

import coeffs
from benchmarks.off_grid import (
    ARMS,
    CLOSED,
    OPEN,
    PLAN,
    QUARTERS,
    WHOLE,
    Halves,
    Lockstep,
    Memory,
    OpenLoop,
    free,
    markdown,
    measured,
    searched,
    solver,
    with_scheduler,
)
from calibrate.fitting.draft import fit as draft_entry
from calibrate.planning.candidates import score
from calibrate.planning.closed_loop import Fits
from calibrate.planning.trajectories import Runner, load_trajectories, measured_gains
from calibrate.recording.record import record
from calibrate.runs.pairs import load_run
from calibrate.trials.case import open_case
from coeffs.engines.solver import multistep
from runtime import plan_scheduler

SCHEDULE = "CSSCSSSCSS"
UNSEEN = ["another thing", "one more", "yet another"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run of ten steps and four prompts whose entry has one fitted plan."""
    folder, pipe = tmp_path_factory.mktemp("off-grid") / "run", TinyPipeline()
    texts = [f"a thing number {number}" for number in range(4)]
    call = {"steps": 10, "guidance_scale": 2.0}
    record(pipe, prompts=texts, out=folder, progress=False, gram=True, **call)
    coeffs.save(draft_entry(load_run(folder), degree=1), folder / "entry.yaml")
    case = open_case(folder, model=pipe)
    runner = Runner(case, False, print)
    trajectories = load_trajectories(runner)
    plan = coeffs.Plan(
        schedule=SCHEDULE,
        forecast="fitted",
        forecast_of="guided",
        weights=Fits(runner, trajectories, None).fit(SCHEDULE).weights,
        sigmas=tuple(trajectories[0].sigmas.tolist()),
    )
    coeffs.save(replace(case.entry, plans=(plan,)), folder / "entry.yaml")
    return open_case(folder, model=pipe)


def test_a_plan_s_own_levels_and_factors_give_the_plan_s_sample(case):
    (plan,), pipe = case.entry.plans, case.session.pipeline
    levels = [plan.sigmas[step] for step in (0, 3, 7)]
    own = solver(pipe.scheduler, levels=levels, factors=multistep(plan))
    images = [
        with_scheduler(pipe, scheduler)(
            "a thing", num_inference_steps=10, generator=torch.Generator().manual_seed(1)
        ).images
        for scheduler in (own, plan_scheduler(pipe.scheduler, plan))
    ]
    np.testing.assert_allclose(*images, atol=1e-5)


def test_evaluations_that_a_run_shares_with_the_one_before_are_not_made_again(case):
    runner = Runner(case, False, print)
    trajectories, times = load_trajectories(runner), torch.zeros(100)
    pipe, calls = case.session.pipeline, []
    asked = free(pipe.scheduler, times, lambda prediction, latents: latents)
    runner.session = case.session.driven_by(with_scheduler(pipe, asked))
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with hook, runner.running([group.prompt for group in runner.groups]) as running:
        every = Lockstep(running, trajectories, times)
        every.run((0.0, 3.0, 7.0))
        begun = len(calls)
        again = every.run((0.0, 3.0, 6.5))
        # The first two evaluations are known: one is left for each of four prompts and two branches.
        assert len(calls) - begun == 4 * 2
        anew = Lockstep(running, trajectories, times).run((0.0, 3.0, 6.5))
        uncached = every.run(tuple(map(float, range(10))))
    assert again == anew
    assert min(uncached[1]) > 80, "at all recorded levels nothing is missed"


def test_open_loop_errors_are_those_of_fits_on_the_uncached_latents(case):
    trajectories = load_trajectories(Runner(case, False, print))
    open_loop = OpenLoop(trajectories, np.ones(11))
    assert open_loop.score(tuple(map(float, range(10)))) > 100, "Euler's own steps are exact"
    # One evaluation at the start: its prediction and the way of all steps are known without interpolation.
    states = np.stack([own.latents for own in trajectories]).reshape(4, 11, -1).astype(float)
    sigmas = trajectories[0].sigmas
    newest = (
        (states[:, 1] - states[:, 0]) / (sigmas[1] - sigmas[0]) * (sigmas[-1] - sigmas[0])
    )
    ways = states[:, -1] - states[:, 0]
    norms = np.linalg.norm(ways, axis=1, keepdims=True)
    weight = np.sum(newest * ways / norms**2) / np.sum((newest / norms) ** 2)
    errors = np.linalg.norm(ways - weight * newest, axis=1) / np.linalg.norm(
        states[:, -1], axis=1
    )
    assert open_loop.score((0.0,)) == pytest.approx(score(-20 * np.log10(errors)), abs=1e-3)


def test_levels_move_by_whole_steps_and_then_by_fractions_while_that_is_better():
    target = np.array([0.0, 5.3, 6.3])

    def better(places, than):
        return np.abs(np.subtract(places, target)).sum() < np.abs(than - target).sum()

    found = searched((0.0, 3.0, 7.0), better, OPEN, settled=True)
    assert found == {OPEN + WHOLE: (0.0, 5.0, 6.0), OPEN + QUARTERS: (0.0, 5.25, 6.25)}


def test_a_move_is_kept_where_both_halves_gain(tmp_path):
    start, good, fits_only, close = (0.0, 4.0), (0.0, 5.0), (0.0, 3.0), (0.0, 0.1)
    decibels = [
        {start: 20.0, good: 21.0, fits_only: 22.0, close: 30.0},
        {start: 18.0, good: 18.5, fits_only: 17.0, close: 30.0},
    ]

    def half(first):
        return SimpleNamespace(
            run=lambda places, factors=None: ([[1.0]], [decibels[first][places]])
        )

    halves = Halves(SimpleNamespace(num_steps=10, half=half), Memory(tmp_path / "kept.json"))
    assert halves.better(good, start)
    assert not halves.better(fits_only, start), "the half that checks loses"
    assert not halves.better(close, start), "nearer than the smallest move"
    kept = Memory(tmp_path / "kept.json").values
    assert kept["fitted (0.0, 5.0)"][1] == [21.0] and kept["checked (0.0, 5.0)"] == [18.5]


def test_open_loop_levels_are_fitted_judged_and_kept(case):
    found = measured(case, [3], [3], UNSEEN, 3, 90000)
    (budget,) = found["budgets"]
    places = budget["places"]
    assert list(budget["arms"]) == [*ARMS] and list(places) == [*ARMS[1:]]
    runner = Runner(case, False, print)
    trajectories = load_trajectories(runner)
    open_loop = OpenLoop(trajectories, measured_gains(runner, trajectories))
    for name in (OPEN, CLOSED):
        whole, fine = places[name + WHOLE], places[name + QUARTERS]
        assert all(place.is_integer() for place in whole) and whole[0] == fine[0] == 0
        assert all((4 * place).is_integer() for place in fine)
    whole, fine = places[OPEN + WHOLE], places[OPEN + QUARTERS]
    assert open_loop.score(fine) > open_loop.score(whole) >= open_loop.score((0.0, 3.0, 7.0))
    arms = budget["arms"]
    gain = arms[OPEN + QUARTERS]["minus"][PLAN]
    assert gain[0] == pytest.approx(arms[OPEN + QUARTERS]["mean"] - arms[PLAN]["mean"])
    text = markdown(found)
    assert "| evaluations instead of 10 | 3 |" in text and f"| {OPEN}{WHOLE} |" in text

    def refuse(*_):
        raise AssertionError("the run folder has all of it")

    with case.session.pipeline.transformer.register_forward_pre_hook(refuse):
        assert measured(case, [3], [3], UNSEEN, 3, 90000) == found
