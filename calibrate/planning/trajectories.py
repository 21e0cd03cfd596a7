"""Uncached trajectories of the recorded prompts as the solver sees them, kept in the run folder.

``trajectories/<hash>/<group>.npy`` holds the latents before each step and after the last (float32), ``<group>.npz``
the inner products of the predictions and what each step made of them, ``gains.json`` what errors leave at the end.
Predictions are those that ``scheduler.step`` receives: after guidance and whatever the pipeline makes of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from calibrate.errors import CalibrateError
from calibrate.model.prompts import Prompt
from calibrate.model.protocol import canonical_sha256
from calibrate.planning.lockstep import Generation, generations
from calibrate.planning.problem import TINY, Problem
from calibrate.runs.files import write_atomically
from calibrate.runs.folder import RunFolder
from calibrate.runs.gram_log import levels_of
from calibrate.trials.case import Case

Array = NDArray[np.float64]
# Two samples at six places: gains of one prompt lie within 20 % of another's on the embedded model, and vary slowly.
GAIN_SAMPLES = 2
GAIN_PLACES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
# Relative size of the error: far above the rounding of bfloat16, small enough to be linear.
ERROR_SIZE = 0.03
LEAD = 3  # real predictions before the error: what solvers of up to third order remember


class NoSolver(CalibrateError):
    """A pipeline whose solver cannot be watched."""


@dataclass(frozen=True)
class Trajectory:
    """One uncached generation.

    Attributes:
        latents: Shape (T + 1, ...), float32; read from the file where they are used.
        gram: Inner products of the predictions, shape (T, T).
        with_latents: Inner products of each step's prediction with the latents before and after it, shape (2, T).
        sigmas: Noise levels, shape (T + 1,); NaN where the scheduler tells none.
        experts: Name of the denoiser that ran at each step.
    """

    latents: NDArray[np.float32]
    gram: Array
    with_latents: Array
    sigmas: Array
    experts: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        return len(self.gram)

    @property
    def walls(self) -> tuple[int, ...]:
        """Steps at which another denoiser takes over, and 0."""
        changes = [i for i in range(1, self.num_steps) if self.experts[i] != self.experts[i - 1]]
        return (0, *changes)


class Runner:
    """Runs the case's pipeline in generations that stop at every solver step.

    Attributes:
        folder: Where what it finds is kept, by what that depends on: model, weights, dtype, arguments.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.session = case.session
        arguments = {name: str(value) for name, value in case.session.arguments.items()}
        key = canonical_sha256([case.identity, arguments])[:12]
        self.folder = case.folder / "trajectories" / key

    def running(self, prompts: Sequence[Prompt]) -> Any:
        """See :func:`calibrate.planning.lockstep.generations`.

        Raises:
            NoSolver: There is no scheduler, or a callable that does not take one.
        """
        driver = self.session.driver
        if not hasattr(getattr(driver, "scheduler", None), "step"):
            raise NoSolver("no scheduler whose steps could be watched")
        if self.session.function is not None and not self.session.accepts("scheduler"):
            raise NoSolver("generate(prompt, seed) takes no scheduler that could be watched")

        def call_of(prompt: Prompt) -> Callable[[Any], Any]:
            def generate(copied: Any) -> Any:
                own = self.session.driven_by(copied)
                return own.generate(prompt, self.case.recorded_images, **options)

            return generate

        # Latents are enough: nothing is decoded.
        options = {"output_type": "latent"} if self.session.accepts("output_type") else {}
        calls = [call_of(prompt) for prompt in prompts]
        return generations(driver, self.session.modules, calls)


def load_trajectories(
    runner: Runner, progress: bool, say: Callable[[str], Any]
) -> list[Trajectory]:
    """Those of all recorded prompts; what the run folder lacks is run now.

    Raises:
        NoSolver: The pipeline does not step a scheduler of its own once per step.
    """
    groups = RunFolder.open(runner.case.folder).groups
    files = {group.name: runner.folder / f"{group.name}.npz" for group in groups}
    missing = [
        group
        for group in groups
        if not all(files[group.name].with_suffix(ending).exists() for ending in (".npz", ".npy"))
    ]
    if missing:
        say(f"running {len(missing)} recorded prompts uncached, to see what their solver sees")
    for group in tqdm(missing, "uncached", unit="prompt", disable=not progress or not missing):
        with runner.running([group.prompt]) as (generation,):
            _write(files[group.name], record_trajectory(generation))
    return [_read(files[group.name]) for group in groups]


def record_trajectory(generation: Generation) -> Trajectory:
    """Run one generation uncached and keep what its solver sees."""
    latents, predictions, experts = [], [], []
    call = generation.resume()
    sigmas = None if call is None else getattr(call.scheduler, "sigmas", None)
    while call is not None:
        latents.append(call.latents.float().cpu())
        predictions.append(call.prediction.float().cpu())
        experts.append(generation.expert)
        call = generation.resume()
    if len(predictions) < 3 or latents[0].shape != predictions[0].shape:
        raise NoSolver(
            "the pipeline does not hand one prediction per step to scheduler.step; only its outputs can be forecast"
        )
    latents.append(generation.latents.float().cpu())
    flat = torch.stack(predictions).flatten(1).double()
    states = torch.stack(latents).flatten(1).double()
    products = [(flat * states[:-1]).sum(1), (flat * states[1:]).sum(1)]
    levels = np.full(len(states), np.nan)
    if sigmas is not None and len(sigmas) == len(states):
        levels = torch.as_tensor(sigmas).double().cpu().numpy()
    return Trajectory(
        latents=torch.stack(latents).numpy(),
        gram=(flat @ flat.T).numpy(),
        with_latents=torch.stack(products).numpy(),
        sigmas=levels,
        experts=tuple(experts),
    )


def problem_of(trajectories: Sequence[Trajectory], gains: Array) -> Problem:
    """The problem of the guided predictions, in coordinates in which the solver only adds."""
    first = trajectories[0]
    shrinks, moves = solver_of(trajectories)
    # x_(t+1) = shrink_t x_t + move_t v_t; divided by the product of the shrinks so far it is a sum.
    scale = np.cumprod(np.append(1.0, shrinks))
    return Problem(
        gram=np.stack([trajectory.gram for trajectory in trajectories]),
        levels=levels_of(first.sigmas),
        increments=moves / scale[1:],
        gains=gains * scale,
        walls=first.walls,
    )


def solver_of(trajectories: Sequence[Trajectory]) -> tuple[Array, Array]:
    """What each step does to the latents and the prediction, by least squares over all samples, shape (T,) each.

    Exact for Euler's method and DDIM; for multistep solvers the part that the present prediction explains.
    """
    steps = trajectories[0].num_steps
    left, right = np.zeros((steps, 2, 2)), np.zeros((steps, 2))
    for trajectory in trajectories:
        before, after = trajectory.with_latents
        left[:, 0, 1] += before
        left[:, 1, 0] += before
        left[:, 1, 1] += np.diag(trajectory.gram)
        right[:, 1] += after
        for step in range(steps):  # one pair of latents at a time: those of a video are large
            now, next_ = trajectory.latents[step : step + 2].reshape(2, -1).astype(np.float64)
            left[step, 0, 0] += now @ now
            right[step, 0] += now @ next_
    solved = np.stack(
        [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(left, right, strict=True)]
    )
    return solved[:, 0], solved[:, 1]


def gaussian_gains(trajectories: Sequence[Trajectory]) -> Array:
    """How much of an error is left at the end if the data were Gaussian, shape (T + 1,).

    The sampler's flow then only scales: by the ratio of the latents' sizes at the end and now.
    """
    squared = np.zeros(trajectories[0].num_steps + 1)
    for trajectory in trajectories:
        for step, latents in enumerate(trajectory.latents):
            squared[step] += np.square(latents, dtype=np.float64).sum()
    return np.sqrt(squared[-1] / np.maximum(squared, TINY))


def measured_gains(
    runner: Runner, trajectories: Sequence[Trajectory], progress: bool, say: Callable[[str], Any]
) -> Array:
    """How much of a small error is left at the end, shape (T + 1,): measured at some steps, interpolated between."""
    steps = trajectories[0].num_steps
    places = sorted({max(1, int(place * steps)) for place in GAIN_PLACES})
    file = runner.folder / "gains.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    groups = RunFolder.open(runner.case.folder).groups[:GAIN_SAMPLES]
    jobs = [
        (number, place)
        for number, group in enumerate(groups)
        for place in places
        if f"{group.name} {place}" not in known
    ]
    if jobs:
        say(f"measuring what is left of an error, at {len(places)} steps of {len(groups)} prompts")
    for number, place in tqdm(jobs, "sensitivity", unit="run", disable=not progress or not jobs):
        with runner.running([groups[number].prompt]) as (generation,):
            gain = gain_of(generation, trajectories[number], place)
        known[f"{groups[number].name} {place}"] = gain
        write_atomically(file, json.dumps(known, indent=1).encode())
    found = [np.mean([known[f"{group.name} {place}"] for group in groups]) for place in places]
    # The error of step t is in the latents before step t + 1; at the end all of it is left.
    return np.interp(np.arange(steps + 1), [place + 1 for place in places] + [steps], [*found, 1.0])


def gain_of(generation: Generation, trajectory: Trajectory, step: int) -> float:
    """What is left at the end of an error made at one step, relative to its size there.

    The error has the direction of reusing the prediction before. Steps before it are taken from the trajectory.
    """
    generation.resume()
    before = generation.waiting.prediction
    while generation.waiting.index < step:
        before = generation.waiting.prediction
        skips = generation.waiting.index + 1 < step - LEAD
        state = torch.from_numpy(trajectory.latents[generation.waiting.index])
        generation.resume(latents=state, skip_next=skips)
    call = generation.waiting
    state = torch.from_numpy(trajectory.latents[step]).to(call.latents)
    right = call.advanced([call.prediction], state)
    moved = (call.advanced([before], state) - right).norm().clamp_min(1e-12)
    share = ERROR_SIZE * right.norm() / moved
    wrong = torch.lerp(call.prediction.float(), before.float(), float(share)).to(call.prediction)
    made = (call.advanced([wrong], state) - right).norm()
    generation.resume(wrong, state)
    while generation.call is not None:
        generation.resume()
    left = torch.linalg.norm(
        generation.latents.float().cpu() - torch.from_numpy(trajectory.latents[-1])
    )
    return float(left) / float(made)


def _write(file: Path, trajectory: Trajectory) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    latents, products = io.BytesIO(), io.BytesIO()
    np.save(latents, trajectory.latents)
    write_atomically(file.with_suffix(".npy"), latents.getvalue())
    np.savez(
        products,
        gram=trajectory.gram,
        with_latents=trajectory.with_latents,
        sigmas=trajectory.sigmas,
        experts=np.array(trajectory.experts),
    )
    write_atomically(file, products.getvalue())  # last: this file says that both are there


def _read(file: Path) -> Trajectory:
    with np.load(file, allow_pickle=False) as arrays:
        return Trajectory(
            latents=np.load(file.with_suffix(".npy"), mmap_mode="c"),
            gram=arrays["gram"],
            with_latents=arrays["with_latents"],
            sigmas=arrays["sigmas"],
            experts=tuple(str(name) for name in arrays["experts"]),
        )
