"""Generations in lockstep, and weights fitted on what a plan itself makes."""

import json
import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coeffs_samples import sample_entry
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipeline import TinyExperts, TinyPipeline

import coeffs
from calibrate.planning import trajectories as trajectories_module
from calibrate.planning.closed_loop import RIDGE, combined, fit, solve
from calibrate.planning.lockstep import generations
from calibrate.planning.trajectories import (
    gain_of,
    gaussian_gains,
    interpolated,
    predictions_of,
    record_trajectory,
)
from calibrate.runs.trajectory import Trajectory
from coeffs.engines import export_entry
from runtime import apply_tea_cache
from runtime.decide.forecast import extrapolation

SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": DDIMScheduler(clip_sample=False, set_alpha_to_one=True),
    "large sigmas": EulerDiscreteScheduler(),
    "multistep": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "corrected": UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "stochastic": EulerAncestralDiscreteScheduler(),
}


class Line(torch.nn.Module):
    """A denoiser that is linear in its latents."""

    def __init__(self, size, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size
        self.matrix = torch.nn.Parameter(matrix + torch.eye(size, dtype=torch.float64) / 3)
        self.calls = 0

    def forward(self, latents, time):
        self.calls += 1
        return latents @ self.matrix


class LinePipeline:
    """The smallest pipeline: one denoiser, one scheduler, latents of eight numbers."""

    def __init__(self, scheduler, size=8):
        self.transformer, self.scheduler, self.size = Line(size), scheduler, size

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, seed, steps=10):
        generator = torch.Generator().manual_seed(seed)
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(1, self.size, generator=generator, dtype=torch.float64)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        own = (
            {"generator": generator}
            if "generator" in signature(self.scheduler.step).parameters
            else {}
        )
        for time in self.scheduler.timesteps:
            prediction = self.transformer(latents, time)
            latents = self.scheduler.step(
                prediction, time, latents, return_dict=False, **own
            )[0]
        return SimpleNamespace(latents=latents)


def running(pipeline, seeds, **options):
    calls = [lambda own, seed=seed: own(seed, **options) for seed in seeds]
    return generations(pipeline, {"transformer": pipeline.transformer}, calls)


def trajectories(pipeline, seeds, **options):
    found = []
    for seed in seeds:
        with running(pipeline, [seed], **options) as (generation,):
            found.append(record_trajectory(generation))
    return found


def fitted(pipeline, seeds, schedule, steps=10, **options):
    teachers = [
        torch.from_numpy(t.latents) for t in trajectories(pipeline, seeds, steps=steps)
    ]
    with running(pipeline, seeds, steps=steps) as side_by_side:
        return fit(side_by_side, teachers, schedule, **options)


def replayed(pipeline, seed, schedule, rows, **options):
    with running(pipeline, [seed], **options) as (generation,):
        kept = []
        generation.resume()
        for step, letter in enumerate(schedule):
            forecast = None
            if letter == "C":
                kept.insert(0, generation.waiting.prediction)
            else:
                forecast = combined(rows.get(step, (1.0,)), kept)
            generation.resume(forecast, skip_next=schedule[step + 1 : step + 2] == "S")
        return generation.latents.float()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_watched_generation_is_the_pipelines_own(name):
    pipeline = LinePipeline(SCHEDULERS[name])
    plain = pipeline(3).latents
    trajectory = trajectories(pipeline, [3])[0]
    np.testing.assert_array_equal(trajectory.latents[-1], plain.float().numpy())
    assert "forward" not in pipeline.transformer.__dict__
    assert "step" not in pipeline.scheduler.__dict__


def test_generations_wait_for_each_other_and_keep_their_own_state():
    pipeline = LinePipeline(SCHEDULERS["multistep"])
    alone = [pipeline(seed).latents for seed in (1, 2, 3)]
    with running(pipeline, (1, 2, 3)) as side_by_side:
        for generation in side_by_side:
            generation.resume()
        for step in range(10):
            assert {g.waiting.index for g in side_by_side} == {step}
            for generation in side_by_side:
                generation.resume()
        for generation, latents in zip(side_by_side, alone, strict=True):
            assert generation.call is None and torch.equal(generation.output.latents, latents)


def test_skipped_steps_do_not_run_the_denoiser():
    pipeline = LinePipeline(SCHEDULERS["euler"])
    replayed(pipeline, 0, "CSSCSSSSSC", {})
    assert pipeline.transformer.calls == 3


def test_an_error_in_a_pipeline_is_raised_where_it_is_waited_for():
    def broken(own):
        raise ValueError("no such prompt")

    pipeline = LinePipeline(SCHEDULERS["euler"])
    modules = {"transformer": pipeline.transformer}
    with (
        pytest.raises(ValueError, match="no such prompt"),
        generations(pipeline, modules, [broken]) as (generation,),
    ):
        generation.resume()
    assert "forward" not in pipeline.transformer.__dict__


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_reused_outputs_are_a_coarser_solver(name):
    """The family of plans contains fewer steps: every second output reused is the same solver with half the steps."""
    scheduler = SCHEDULERS[name]
    pipeline = LinePipeline(scheduler)
    cached = replayed(pipeline, 5, "CS" * 5, {})
    latents = torch.randn(
        1, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    scheduler.set_timesteps(10)
    if name == "euler":
        sigmas = scheduler.sigmas.double()
        for step in range(0, 10, 2):
            velocity = pipeline.transformer(latents, None)
            latents = latents + (sigmas[step + 2] - sigmas[step]) * velocity
    else:
        times, alphas = scheduler.timesteps, scheduler.alphas_cumprod.double()
        for step in range(0, 10, 2):
            noise = pipeline.transformer(latents, None)
            now = alphas[times[step]]
            after = (
                alphas[times[step + 2]] if step + 2 < 10 else scheduler.final_alpha_cumprod
            )
            clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
            latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    np.testing.assert_allclose(
        cached.detach(), latents.detach().float(), rtol=1e-6, atol=1e-6
    )


def test_the_regression_is_the_dense_least_squares():
    random = np.random.default_rng(0)
    matrix, target = random.normal(size=(60, 4)), random.normal(size=60)
    weights = solve(matrix.T @ matrix, matrix.T @ target, ridge=0.0)
    expected = np.linalg.lstsq(matrix, target, rcond=None)[0]
    np.testing.assert_allclose(weights, expected, rtol=1e-10)
    np.testing.assert_allclose(
        solve(matrix.T @ matrix, matrix.T @ target, 1e12), [1, 0, 0, 0], atol=1e-9
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_span_is_fitted_as_by_hand(name):
    """The first span of a linear toy, whose response to a prediction follows from running the scheduler twice."""
    pipeline, seeds = LinePipeline(SCHEDULERS[name]), (0, 1, 2, 3, 4)
    own = fitted(pipeline, seeds, "CSSCSSSSSS", ridge=0.0)
    # One prediction, one weight: of all weights it must bring the latents nearest to the uncached ones.
    teachers = trajectories(pipeline, seeds)

    def miss(weight):
        total = 0.0
        for seed, teacher in zip(seeds, teachers, strict=True):
            with running(pipeline, [seed]) as (generation,):
                generation.resume()
                first = generation.waiting.prediction
                start = generation.waiting
                plain = start.advanced([first, first * 0, first * 0], start.latents)
                for _ in range(3):
                    generation.resume(
                        None if generation.waiting.index == 0 else weight * first
                    )
                reached = generation.waiting.latents.float()
            goal = torch.from_numpy(teacher.latents[3])
            total += float((reached - goal).norm() ** 2 / (goal - plain).norm() ** 2)
        return total

    weight = own.rows[1][0]
    assert own.rows[1] == own.rows[2]
    assert miss(weight) <= min(miss(weight * 0.99), miss(weight * 1.01))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_anchor_never_fits_worse(name):
    pipeline, schedule = LinePipeline(SCHEDULERS[name]), "CCCSSCSSCS"
    # Up to the first span the trajectories are the same; its error is the third.
    one, two, three = (
        fitted(pipeline, [0], schedule, anchors=anchors, ridge=1e-10).errors[0, 2]
        for anchors in (1, 2, 3)
    )
    assert two <= one * 1.001 and three <= two * 1.001
    assert three < one


def test_fitted_weights_beat_reuse_on_prompts_they_were_not_fitted_on():
    pipeline = LinePipeline(SCHEDULERS["euler"])
    schedule = "CSCSSCSSSS"
    rows = fitted(pipeline, range(6), schedule).rows
    for seed in (100, 101):
        uncached = pipeline(seed).latents.float()
        ours, reused = (
            (replayed(pipeline, seed, schedule, weights) - uncached).norm()
            for weights in (rows, {})
        )
        assert ours < reused / 5


def test_fitted_weights_hold_where_noise_breaks_linear_ones():
    """Eight-bit weights and activations leave 1.2 % of noise in every forward, which steep weights amplify."""

    class Noisy(Line):
        def forward(self, latents, time):
            output = super().forward(latents, time)
            random = torch.Generator().manual_seed(int(latents.abs().sum() * 1e6) % 2**31)
            noise = torch.randn(output.shape, generator=random, dtype=output.dtype)
            return output + 0.012 * output.norm() / noise.norm() * noise

    pipeline = LinePipeline(SCHEDULERS["euler"], size=64)
    pipeline.transformer = Noisy(64)
    schedule = "CCSSSSCCSSSSCCSSSSSS"
    pipeline.scheduler.set_timesteps(20)
    levels = pipeline.scheduler.sigmas.tolist()
    linear, anchors = {}, []
    for step, letter in enumerate(schedule):
        if letter == "C":
            anchors = [step, *anchors][:2]
        else:
            linear[step] = extrapolation(levels[step], [levels[anchor] for anchor in anchors])
    rows = fitted(pipeline, range(12), schedule, steps=20).rows
    ours, theirs = [], []
    for seed in range(100, 108):
        uncached = pipeline(seed, steps=20).latents.float()
        for misses, weights in ((ours, rows), (theirs, linear)):
            own = replayed(pipeline, seed, schedule, weights, steps=20)
            misses.append(float((own - uncached).norm() / uncached.norm()))
    assert np.mean(ours) < np.mean(theirs) / 2


def test_a_plan_of_computed_steps_alone_is_the_uncached_run():
    pipeline = LinePipeline(SCHEDULERS["ddim"])
    own = fitted(pipeline, (0, 1), "C" * 10)
    assert own.rows == {} and own.errors.max() == 0


def test_what_the_solver_does_is_found_from_the_trajectory():
    pipeline = LinePipeline(SCHEDULERS["euler"])
    shrinks, moves = trajectories(pipeline, [0])[0].solver
    pipeline.scheduler.set_timesteps(10)
    np.testing.assert_allclose(shrinks, 1.0, atol=1e-4)
    np.testing.assert_allclose(moves, np.diff(pipeline.scheduler.sigmas.numpy()), rtol=1e-3)


def test_gaussian_gains_are_ratios_of_sizes():
    """Gaussian data of deviation s is scaled from sqrt(s^2 + sigma^2) to s, here with s = 1/2."""
    sigmas = np.array([3.0, 1.0, 0.0])
    sizes = np.sqrt(0.25 + sigmas**2).astype(np.float32)
    one = Trajectory(
        sizes[:, None] * np.ones(5, np.float32),
        np.eye(2),
        np.ones((2, 2)),
        sigmas,
        np.array(["a", "a"]),
    )
    np.testing.assert_allclose(gaussian_gains([one, one]), 0.5 / sizes, rtol=1e-6)


def gain(pipeline, trajectory, step):
    with running(pipeline, [0]) as (generation,):
        predictions = predictions_of(generation)
    with running(pipeline, [0]) as (generation,):
        return gain_of(generation, trajectory, predictions, step), predictions


def test_the_gain_of_a_linear_model_is_that_of_its_matrix():
    """Behind the last step nothing is left to change an error; before it, the remaining steps do."""
    pipeline = LinePipeline(SCHEDULERS["euler"])
    trajectory = trajectories(pipeline, [0])[0]
    assert gain(pipeline, trajectory, 9)[0] == pytest.approx(1.0, rel=1e-3)
    sigmas = pipeline.scheduler.sigmas.double()
    matrix = pipeline.transformer.matrix.detach()
    kept = torch.eye(8, dtype=torch.float64)
    for step in range(4, 10):
        kept = kept @ (
            torch.eye(8, dtype=torch.float64) + (sigmas[step + 1] - sigmas[step]) * matrix
        )
    measured, predictions = gain(pipeline, trajectory, 3)
    error = (predictions[2] - predictions[3]).double().flatten(1)
    assert measured == pytest.approx(float((error @ kept).norm() / error.norm()), rel=1e-2)


@pytest.mark.parametrize("solver", sorted(SCHEDULERS))
def test_without_an_error_nothing_is_left_of_it(solver, monkeypatch):
    """Bug: UniPC steps from latents that it remembers, and gains were those of another generation."""
    monkeypatch.setattr(trajectories_module, "ERROR_SIZE", 0.0)
    pipeline = LinePipeline(SCHEDULERS[solver])
    trajectory = trajectories(pipeline, [0])[0]
    scale = float(np.linalg.norm(trajectory.latents[-1]))
    for step in (1, 4, 9):
        # What is left is divided by the smallest error there is.
        assert gain(pipeline, trajectory, step)[0] * 1e-12 < 1e-5 * scale


def test_gains_that_say_nothing_are_left_out():
    """Bug: one prompt whose prediction did not change at a step made errors there free for all."""
    gains = [[0.0, 2.0, float("nan")], [4.0, 8.0, float("inf")]]
    np.testing.assert_allclose(interpolated([1, 3, 5], gains, 6), [4, 4, 4, 4, 4, 2.5, 1])


def test_two_experts_share_no_predictions():
    pipeline = TinyExperts()
    modules = {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}

    def call(own):
        return own(
            "a thing", num_inference_steps=10, generator=torch.Generator().manual_seed(0)
        )

    with generations(pipeline, modules, [call]) as (generation,):
        trajectory = record_trajectory(generation)
    wall = trajectory.walls[1]
    assert trajectory.experts[wall - 1 : wall + 1].tolist() == [
        "transformer",
        "transformer_2",
    ]
    schedule = "".join("C" if step in (0, 2, wall, wall + 1) else "S" for step in range(10))
    with generations(pipeline, modules, [call]) as side_by_side:
        own = fit(
            side_by_side,
            [torch.from_numpy(trajectory.latents)],
            schedule,
            walls=trajectory.walls,
        )
    assert [len(own.rows[step]) for step in (1, wall - 1, wall + 2)] == [1, 2, 2]


def test_the_runtime_makes_what_the_fit_saw():
    """Replayed by the runtime's hooks, a fitted plan ends where the fit ended."""
    pipeline = TinyPipeline()
    modules = {"transformer": pipeline.transformer}

    def call(own):
        return own("a thing", generator=torch.Generator().manual_seed(0)).images

    with generations(pipeline, modules, [call]) as (generation,):
        teacher = torch.from_numpy(record_trajectory(generation).latents)
    schedule = "CSCSSCSS"
    with generations(pipeline, modules, [call]) as side_by_side:
        rows = fit(side_by_side, [teacher], schedule).rows
        seen = side_by_side[0].output
    weights = tuple(rows[step] for step in sorted(rows))
    plan = coeffs.Plan(
        schedule=schedule, forecast="fitted", forecast_of="guided", weights=weights
    )
    with apply_tea_cache(pipeline, schedule=plan):
        np.testing.assert_allclose(call(pipeline), seen, atol=1e-6)


def reference():
    """The function that the page on planning shows."""
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)  # our own page
    return names["solve"]


@pytest.mark.parametrize("forecast", ["fitted", "linear", "reuse"])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_an_exported_plan_is_a_solver_of_its_own(name, forecast):
    pipeline, schedule, size = LinePipeline(SCHEDULERS[name]), "CSCSSCSSSS", 8
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(10)
    if name == "euler":
        sigmas = scheduler.sigmas.double().tolist()
    else:
        alphas = [*scheduler.alphas_cumprod[scheduler.timesteps].double().tolist(), 1.0]
        sigmas = [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]
    rows = fitted(pipeline, range(6), schedule).rows if forecast == "fitted" else {}
    if forecast == "linear":
        anchors = []
        for step, letter in enumerate(schedule):
            levels = [sigmas[anchor] for anchor in anchors[:2]]
            rows |= {} if letter == "C" else {step: extrapolation(sigmas[step], levels)}
            anchors = [step, *anchors] if letter == "C" else anchors
    weights = (
        tuple(tuple(rows[step]) for step in sorted(rows)) if forecast == "fitted" else None
    )
    plan = coeffs.Plan(
        schedule=schedule,
        sigmas=sigmas,
        forecast=forecast,
        forecast_of="guided",
        weights=weights,
    )
    entry = sample_entry(plans=(plan,), protocol={"num_steps": 10})
    form = json.loads(export_entry(entry, "solver"))
    assert len(form["levels"]) == 4 and [len(row) for row in form["steps"]] == [1, 2, 3]

    def predict(x, level):
        scale = 1 if name == "euler" else (1 + level**2) ** -0.5
        return pipeline.transformer(x * scale, None)

    start = torch.randn(
        1, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    grown = 1 if name == "euler" else (1 + sigmas[0] ** 2) ** 0.5
    with torch.no_grad():
        own = reference()(form, predict, start * grown)
    hooked = replayed(pipeline, 7, schedule, rows)
    torch.testing.assert_close(own.float(), hooked, rtol=1e-6, atol=1e-6)


def test_combined_weighs_the_newest_first():
    newest, older = torch.ones(2), torch.full((2,), 10.0)
    assert combined((2.0, -0.5), [newest, older]).tolist() == [-3.0, -3.0]
    assert 0 < RIDGE < 1e-3
