"""Uncached trajectories of the recorded prompts as the solver sees them, and what is left of errors at the end.

Runs keep both: trajectories as :mod:`calibrate.runs.trajectory` says, mostly since they were recorded, and beside them
``gains.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from calibrate.errors import CalibrateError
from calibrate.model.prompts import Prompt
from calibrate.model.protocol import Settings
from calibrate.planning.lockstep import Generation, generations
from calibrate.planning.problem import TINY, Problem
from calibrate.recording.inner_products import trajectory_of
from calibrate.runs.files import write_json
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import levels_of
from calibrate.runs.trajectory import Trajectory, trajectory_folder
from calibrate.trials.case import Case

Array = NDArray[np.float64]
# Gains vary slowly with the step: two samples at five places. With the uncached run of each, seven runs in all.
GAIN_SAMPLES = 2
GAIN_PLACES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Relative size of the error: far above the rounding of bfloat16, small enough to be linear.
ERROR_SIZE = 0.03
# What the protocol says of a pipeline that a trajectory depends on, besides weights, dtype and arguments.
STATED = ("scheduler", "shift", "quantization", "lora")


class NoSolver(CalibrateError):
    """A pipeline whose solver cannot be watched."""


class NotFinite(NoSolver):
    """A prompt of whose generation no plan can be made; others may do."""


class Runner:
    """Runs the case's pipeline in generations that stop at every solver step.

    Args:
        progress: Whether bars are shown.
        say: Is told in words what is going to be run.

    Attributes:
        groups: The recorded prompts; once they are loaded, those with a trajectory.
        folder: Where what it finds is kept, by what that depends on: model, weights, dtype, arguments.

    Raises:
        NoSolver: There is no scheduler, or a callable that does not take one.
    """

    def __init__(self, case: Case, progress: bool, say: Callable[[str], Any]) -> None:
        self.case, self.session, self.say = case, case.session, say
        if not self.session.solver_is_replaceable:
            raise NoSolver(
                "no scheduler whose steps could be watched, or generate(prompt, seed) takes none"
            )
        self.groups = RunFolder.open(case.folder).groups
        identity = {**case.identity, **_changes(case.manifest, self.session.identity)}
        self.folder = trajectory_folder(case.folder, identity, self.session.arguments)
        self.bar = partial(tqdm, disable=not progress)

    def running(self, prompts: Sequence[Prompt]) -> Any:
        """See :func:`calibrate.planning.lockstep.generations`; nothing is decoded where that can be left out."""
        options = {"output_type": "latent"} if self.session.accepts("output_type") else {}

        def call_of(prompt: Prompt) -> Callable[[Any], Any]:
            return lambda copied: self.session.driven_by(copied).generate(
                prompt, self.case.recorded_images, **options
            )

        calls = [call_of(prompt) for prompt in prompts]
        return generations(self.session.driver, self.session.modules, calls)


def _changes(recorded: Mapping[str, Any], identity: Settings) -> Settings:
    """What of the pipeline is not as it was recorded; empty for the recorded one, whose trajectories are then read."""
    there, here = _stated(recorded), _stated(identity)
    return {name: here.get(name) for name in there if here.get(name) != there[name]}


def _stated(identity: Mapping[str, Any]) -> Settings:
    protocol, config = (identity.get(name) or {} for name in ("protocol", "scheduler_config"))
    stated = {name: protocol[name] for name in STATED if name in protocol}
    return {**stated, **{f"scheduler's {name}": config[name] for name in config}}


def load_trajectories(runner: Runner) -> list[Trajectory]:
    """Those of all recorded prompts; what the run folder lacks is run now.

    Prompts whose generation is not finite are left out, also of ``runner.groups``.

    Raises:
        NoSolver: The pipeline does not step a scheduler of its own once per step, or no prompt is left.
    """
    files = {group.name: runner.folder / f"{group.name}.npz" for group in runner.groups}
    missing = [group for group in runner.groups if not Trajectory.is_kept(files[group.name])]
    if missing:
        runner.say(
            f"running {len(missing)} recorded prompts uncached, to see what their solver sees"
        )
        for group in runner.bar(missing, "uncached", unit="prompt"):
            with runner.running([group.prompt]) as (generation,):
                try:
                    record_trajectory(generation).write(files[group.name])
                except NotFinite as error:
                    runner.say(f"prompt {group.index} is left out: {error}")
                    runner.groups = [own for own in runner.groups if own != group]
    if not runner.groups:
        raise NoSolver("no recorded prompt has finite predictions")
    return [Trajectory.read(files[group.name]) for group in runner.groups]


def record_trajectory(generation: Generation) -> Trajectory:
    """Run one generation uncached and keep what its solver sees."""
    steps = []
    call = generation.resume()
    sigmas = getattr(call.scheduler, "sigmas", None) if call else None
    while call is not None and call.latents.shape == call.prediction.shape:
        prediction, latents = (
            own.to("cpu", copy=True) for own in (call.prediction, call.latents)
        )
        steps.append((generation.expert, prediction, latents))
        call = generation.resume()
    end = generation.latents if call is None and steps else None
    trajectory = trajectory_of(steps, end, sigmas)
    if trajectory is None and end is not None:
        seen = [end, *(own for _, *pair in steps for own in pair)]
        if not all(own.isfinite().all() for own in seen):
            raise NotFinite("its predictions or latents are not finite")
    if trajectory is None:
        raise NoSolver(
            "the pipeline does not hand one finite prediction per step to scheduler.step; only its outputs can be "
            "forecast"
        )
    return trajectory


def problem_of(trajectories: Sequence[Trajectory], gains: Array) -> Problem:
    """The problem of the guided predictions, in coordinates in which the solver only adds."""
    first = trajectories[0]
    shrinks, moves = np.mean([trajectory.solver for trajectory in trajectories], axis=0)
    # x_(t+1) = shrink_t x_t + move_t v_t; divided by the product of the shrinks so far it is a sum.
    scale = np.cumprod(np.append(1.0, shrinks))
    return Problem(
        gram=np.stack([trajectory.gram for trajectory in trajectories]),
        levels=levels_of(first.sigmas),
        increments=moves / scale[1:],
        gains=gains * scale,
        walls=first.walls,
    )


def gaussian_gains(trajectories: Sequence[Trajectory]) -> Array:
    """How much of an error is left at the end if the data were Gaussian, shape (T + 1,).

    The sampler's flow then only scales: by the ratio of the latents' sizes at the end and now.
    """
    # One pair of latents at a time: those of a video are large.
    sizes = [[np.linalg.norm(latents) for latents in own.latents] for own in trajectories]
    together = np.linalg.norm(sizes, axis=0)
    return together[-1] / np.maximum(together, TINY)


def measured_gains(runner: Runner, trajectories: Sequence[Trajectory]) -> Array:
    """How much of a small error is left at the end, shape (T + 1,): measured at some steps, interpolated between.

    The geometric mean over a few prompts, as decibels are averaged: on some models one prompt's gains are a hundred
    times another's.
    """
    steps = trajectories[0].num_steps
    places = sorted({max(1, min(int(place * steps), steps - 2)) for place in GAIN_PLACES})
    file = runner.folder / "gains.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    samples = list(zip(runner.groups, trajectories, strict=True))[:GAIN_SAMPLES]
    for group, trajectory in samples:
        own = known.setdefault(group.name, [])
        if left := places[len(own) :]:
            with runner.running([group.prompt]) as (generation,):
                predictions = predictions_of(generation)
        for place in runner.bar(left, f"sensitivity of prompt {group.index}", unit="run"):
            with runner.running([group.prompt]) as (generation,):
                own.append(gain_of(generation, trajectory, predictions, place))
            write_json(file, known)
    return interpolated(places, [known[group.name] for group, _ in samples], steps)


def interpolated(
    places: Sequence[int], gains: Sequence[Sequence[float]], steps: int
) -> Array:
    """Gains at all steps from those at some, shape (samples, places); those that are not positive say nothing."""
    logarithms = np.ma.log(np.array(gains, float)).mean(0)  # masked where one is not finite
    known = ~np.ma.getmaskarray(logarithms)
    # The error of step t is in the latents before step t + 1; at the end all of it is left.
    known_at = [*(np.array(places)[known] + 1), steps]
    return np.interp(np.arange(steps + 1), known_at, [*np.exp(logarithms[known]), 1.0])


def predictions_of(generation: Generation) -> list[torch.Tensor]:
    """What the solver receives at every step of an uncached generation."""
    call, predictions = generation.resume(), []
    while call is not None:
        predictions.append(call.prediction.to("cpu", copy=True))
        call = generation.resume()
    return predictions


def gain_of(
    generation: Generation,
    trajectory: Trajectory,
    predictions: Sequence[torch.Tensor],
    step: int,
) -> float:
    """What is left at the end of an error made at one step, relative to what the step makes of it in the latents.

    The error has the direction of reusing the prediction before. Until then the solver gets the uncached predictions,
    so that whatever it remembers is right. Zero where the two predictions are the same.
    """
    generation.resume()
    for prediction in predictions[:step]:
        generation.resume(prediction, skip_next=True)
    before, right = (predictions[at].float() for at in (step - 1, step))
    move = abs(float(trajectory.solver[1][step]))
    size = ERROR_SIZE * float(np.linalg.norm(trajectory.latents[step]))
    share = size / max(move * float((before - right).norm()), 1e-12)
    wrong = torch.lerp(right, before, share).to(predictions[step])
    generation.resume(wrong)
    while generation.call is not None:
        generation.resume()
    left = generation.latents.float().cpu() - torch.from_numpy(trajectory.latents[-1])
    return float(left.norm()) / max(move * float((wrong.float() - right).norm()), 1e-12)
