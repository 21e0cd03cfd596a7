"""Weights fitted on the trajectory that a plan itself makes.

A plan that forecasts the prediction which the solver receives is a multistep solver with one evaluation per computed
step. Its weights are found in one pass: at each computed step, ridge regression of the way that the uncached latents
go until the next computed step, on all predictions computed so far. What earlier forecasts missed is in the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibrate.model.prompts import Prompt
from calibrate.model.protocol import canonical_sha256
from calibrate.planning.lockstep import Generation
from calibrate.planning.search import computed_of, uniform_between
from calibrate.planning.trajectories import Runner, load_trajectories
from calibrate.runs.files import write_json
from calibrate.runs.trajectory import Trajectory
from calibrate.trials.case import Case, Say
from coeffs import Plan

Array = NDArray[np.float64]
RIDGE = 1e-5  # of the mean diagonal; measured: 1e-6 to 1e-4 differ by less than 0.3 dB
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """Weights of a schedule.

    Attributes:
        rows: Skipped step -> weights of the computed predictions before it, the newest first.
        errors: Relative error of the latents at each computed step after the first and at the end, shape (samples,
            computed steps).
    """

    rows: dict[int, Weights]
    errors: Array

    @property
    def weights(self) -> tuple[Weights, ...]:
        """The rows in the order of their steps, as a plan has them."""
        return tuple(self.rows[step] for step in sorted(self.rows))

    @property
    def decibels(self) -> Array:
        """Signal-to-noise ratio of each sample's latents at the end."""
        return -20 * np.log10(np.maximum(self.errors[:, -1], 1e-12))

    def plan(self, schedule: str) -> Plan:
        """The schedule with these weights; without any where it skips nothing."""
        return Plan(
            schedule=schedule,
            forecast="fitted" if self.rows else "reuse",
            forecast_of="guided",
            weights=self.weights or None,
        )


def fit(
    running: Sequence[Generation],
    teachers: Sequence[torch.Tensor],
    schedule: str,
    *,
    anchors: int | None = None,
    walls: Sequence[int] = (0,),
    ridge: float = RIDGE,
    advance: Callable[[], Any] = lambda: None,
) -> Fit:
    """Run all generations side by side under a schedule, fitting the forecasts on the way.

    Args:
        running: Generations that have not begun.
        teachers: Uncached latents of each before every step and after the last.
        anchors: Most predictions that a forecast uses; all by default.
        walls: Steps where another denoiser takes over: predictions before them are not used.
        advance: Called after every evaluation of the denoiser.
    """
    samples = [(*pair, list[torch.Tensor]()) for pair in zip(running, teachers, strict=True)]
    rows: dict[int, Weights] = {}
    errors = []
    for generation in running:
        generation.resume()
        advance()
    for first, after in pairwise([*computed_of(schedule), len(schedule)]):
        for generation, _, predictions in samples:
            if first in walls:
                predictions.clear()
            predictions.insert(0, generation.waiting.prediction)
            del predictions[anchors or len(predictions) :]
        if after - first > 1:
            spans = [linearised(*sample, after) for sample in samples]
            rows |= dict.fromkeys(range(first + 1, after), _weights(spans, ridge))
        for step in range(first, after):
            for generation, _, predictions in samples:
                forecast = None if step == first else combined(rows[step], predictions)
                generation.resume(forecast, skip_next=step + 1 < after)
                if step + 1 == after < len(schedule):
                    advance()
        errors.append([_relative(own.latents, teacher[after]) for own, teacher, _ in samples])
    return Fit(rows, np.array(errors).T)


def combined(weights: Sequence[float], predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum, in float32; predictions beyond the weights are not used."""
    pairs = zip(weights, predictions, strict=False)
    terms = (weight * prediction.float() for weight, prediction in pairs)
    return sum(terms, start=torch.zeros(()))


def linearised(
    generation: Generation,
    teacher: torch.Tensor,
    predictions: Sequence[torch.Tensor],
    after: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each prediction, given to the solver at all steps before ``after``, adds to the latents, and what should.

    Solvers are linear in the prediction; each response is the difference to a prediction of zero.

    Returns:
        Responses, shape (predictions, numbers), and the target, in float64.
    """
    call, newest = generation.waiting, predictions[0]

    def reached(prediction: torch.Tensor) -> torch.Tensor:
        given = [newest] + [prediction] * (after - call.index - 1)
        return call.advanced(given, call.latents).double().flatten()

    nothing = reached(torch.zeros_like(newest))
    responses = torch.stack([reached(prediction) - nothing for prediction in predictions])
    return responses, teacher[after].to(nothing).flatten() - nothing


def _weights(spans: Sequence[tuple[torch.Tensor, torch.Tensor]], ridge: float) -> Weights:
    """The weights that serve all samples best, each counted by one over the square of its way."""
    grams, products = [], []
    for responses, target in spans:
        scale = max(float(target @ target), 1e-300)
        grams.append((responses @ responses.T).cpu().numpy() / scale)
        products.append((responses @ target).cpu().numpy() / scale)
    return solve(np.mean(grams, axis=0), np.mean(products, axis=0), ridge)


def solve(gram: Array, product: Array, ridge: float = RIDGE) -> Weights:
    """Weights that minimise the squared error, shrunk to the newest prediction alone."""
    eye = np.eye(len(gram))
    penalty = ridge * np.trace(gram) / len(gram)
    weights = np.linalg.solve(gram + penalty * eye, product + penalty * eye[0])
    return tuple(weights.tolist())


def _relative(latents: torch.Tensor, teacher: torch.Tensor) -> float:
    difference = latents.float().cpu() - teacher
    return float(difference.norm() / teacher.norm())


class Fits:
    """Weights of any schedule on recorded prompts, kept beside their trajectories.

    Args:
        trajectories: Those of the recorded prompts.
        anchors: Most predictions that a forecast uses; all for None.
    """

    def __init__(
        self, runner: Runner, trajectories: Sequence[Trajectory], anchors: int | None
    ) -> None:
        self.runner, self.trajectories, self._anchors = runner, trajectories, anchors

    @classmethod
    def of(cls, case: Case, progress: bool, say: Say, anchors: int | None = None) -> Fits:
        """On the prompts of a case's run. Raises NoSolver where no solver can be watched."""
        runner = Runner(case, progress, say)
        return cls(runner, load_trajectories(runner), anchors)

    @property
    def prompts(self) -> int:
        """How many there are to fit on."""
        return len(self.trajectories)

    def uniform(self, computed: int) -> Plan:
        """The uniform schedule, with weights fitted on all of them."""
        first = self.trajectories[0]
        schedule = uniform_between(first.walls, first.num_steps, computed)
        return self.fit(schedule).plan(schedule)

    def fit(self, schedule: str, prompts: int | None = None) -> Fit:
        """The weights of a schedule and what they miss; fitted now where the run folder does not have them.

        ``prompts``: on so many of the recorded ones, the first; by default on all.
        """
        groups = self.runner.groups[: prompts or self.prompts]
        names = [group.name for group in groups]
        key = canonical_sha256([schedule, self._anchors, RIDGE, names])[:16]
        file = self.runner.folder / f"fit-{key}.json"
        if not file.exists():
            own = self._fitted(schedule, [group.prompt for group in groups])
            written: dict[str, Any] = {"schedule": schedule, "anchors": self._anchors}
            written["rows"] = {str(step): own.rows[step] for step in own.rows}
            write_json(file, {**written, "errors": own.errors.tolist()})
        kept = json.loads(file.read_text())
        rows = {int(step): tuple(row) for step, row in kept["rows"].items()}
        return Fit(rows, np.array(kept["errors"]))

    def _fitted(self, schedule: str, prompts: Sequence[Prompt]) -> Fit:
        runs = schedule.count("C") * len(prompts)
        share = runs / len(schedule) / len(self.runner.groups)
        self.runner.say(
            f"fitting {schedule.count('C')} of {len(schedule)} steps on {len(prompts)} prompts: "
            f"{share:.0%} of what recording took"
        )
        with (
            self.runner.bar(total=runs, desc="fitting", unit="step") as bar,
            self.runner.running(prompts) as running,
        ):
            own = self.trajectories[: len(prompts)]
            teachers = [torch.from_numpy(trajectory.latents) for trajectory in own]
            return fit(
                running,
                teachers,
                schedule,
                anchors=self._anchors,
                walls=own[0].walls,
                advance=bar.update,
            )
