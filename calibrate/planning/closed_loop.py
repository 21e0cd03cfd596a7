"""Weights fitted on the trajectory that a plan itself makes.

A plan that forecasts the prediction which the solver receives is a multistep solver with one evaluation per computed
step. Its weights are found in one pass: at each computed step, ridge regression of the way that the uncached latents
go until the next computed step, on all predictions computed so far. What earlier forecasts missed is in the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from calibrate.model.protocol import canonical_sha256
from calibrate.planning.lockstep import Generation, StepCall
from calibrate.planning.search import checked
from calibrate.planning.trajectories import Runner, Trajectory
from calibrate.runs.files import write_atomically
from calibrate.runs.folder import RunFolder

Array = NDArray[np.float64]
RIDGE = 1e-5  # of the mean diagonal; measured: 1e-6 to 1e-4 differ by less than 0.3 dB


@dataclass(frozen=True)
class Fit:
    """Weights of a schedule.

    Attributes:
        rows: Skipped step -> weights of the computed predictions before it, the newest first.
        errors: Relative error of the latents at each computed step after the first and at the end, shape (samples,
            computed steps).
    """

    rows: dict[int, tuple[float, ...]]
    errors: Array

    @property
    def decibels(self) -> Array:
        """Signal-to-noise ratio of each sample's latents at the end."""
        return -20 * np.log10(np.maximum(self.errors[:, -1], 1e-12))


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
    steps = len(teachers[0]) - 1
    computed = [i for i, letter in enumerate(checked(schedule, steps)) if letter == "C"]
    kept: list[list[torch.Tensor]] = [[] for _ in running]
    rows: dict[int, tuple[float, ...]] = {}
    errors = []
    for generation in running:
        generation.resume()
        advance()
    for first, after in zip(computed, [*computed[1:], steps], strict=True):
        for predictions, generation in zip(kept, running, strict=True):
            if first in walls:
                predictions.clear()
            predictions.insert(0, generation.waiting.prediction)
            del predictions[anchors or len(predictions) :]
        if after - first > 1:
            weights = _weights(running, teachers, kept, after, ridge)
            rows |= dict.fromkeys(range(first + 1, after), weights)
        for step in range(first, after):
            for predictions, generation in zip(kept, running, strict=True):
                forecast = None if step == first else combined(rows[step], predictions)
                generation.resume(forecast, skip_next=step + 1 < after)
                if step + 1 == after < steps:
                    advance()
        pairs = zip(running, teachers, strict=True)
        errors.append([_relative(own.latents, teacher[after]) for own, teacher in pairs])
    return Fit(rows, np.array(errors).T)


def combined(weights: Sequence[float], predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum, in float32."""
    total = weights[0] * predictions[0].float()
    for weight, prediction in zip(weights[1:], predictions[1:], strict=False):
        total += weight * prediction.float()
    return total


def _weights(
    running: Sequence[Generation],
    teachers: Sequence[torch.Tensor],
    kept: Sequence[Sequence[torch.Tensor]],
    after: int,
    ridge: float,
) -> tuple[float, ...]:
    """Weights of the predictions in the steps until ``after``, the same in each of them."""
    grams, products = [], []
    for generation, teacher, predictions in zip(running, teachers, kept, strict=True):
        responses, target = linearised(generation.waiting, predictions, teacher[after], after)
        scale = max(float(target @ target), 1e-300)
        grams.append((responses @ responses.T).cpu().numpy() / scale)
        products.append((responses @ target).cpu().numpy() / scale)
    return solve(np.mean(grams, axis=0), np.mean(products, axis=0), ridge)


def linearised(
    call: StepCall, predictions: Sequence[torch.Tensor], goal: torch.Tensor, after: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each prediction, given to the solver at all steps before ``after``, adds to the latents, and what should.

    Solvers are linear in the prediction; each response is the difference to a prediction of zero.

    Returns:
        Responses, shape (predictions, numbers), and the target, in float64.
    """
    newest = predictions[0]
    count = after - call.index - 1

    def reached(prediction: torch.Tensor) -> torch.Tensor:
        return call.advanced([newest] + [prediction] * count, call.latents).double().flatten()

    nothing = reached(torch.zeros_like(newest))
    responses = torch.stack([reached(prediction) - nothing for prediction in predictions])
    return responses, goal.to(nothing).flatten() - nothing


def solve(gram: Array, product: Array, ridge: float = RIDGE) -> tuple[float, ...]:
    """Weights that minimise the squared error, shrunk to the newest prediction alone."""
    start = np.eye(len(gram))[0]
    penalty = ridge * np.trace(gram) / len(gram)
    system = gram + penalty * np.eye(len(gram))
    weights = np.linalg.solve(system, product + penalty * start)
    return tuple(float(weight) for weight in weights)


def _relative(latents: torch.Tensor, teacher: torch.Tensor) -> float:
    difference = latents.float().cpu() - teacher
    return float(difference.norm() / teacher.norm())


class Fits:
    """Weights of any schedule on all recorded prompts, kept beside their trajectories.

    Args:
        anchors: Most predictions that a forecast uses; all for None.
        prompts: Only the first so many recorded prompts; all for None.
    """

    def __init__(
        self,
        runner: Runner,
        trajectories: Sequence[Trajectory],
        anchors: int | None,
        progress: bool,
        say: Callable[[str], Any],
        prompts: int | None = None,
    ) -> None:
        self._runner, self._trajectories = runner, trajectories[:prompts]
        self._anchors, self._progress, self._say = anchors, progress, say
        self._groups = RunFolder.open(runner.case.folder).groups[:prompts]

    def fit(self, schedule: str) -> Fit:
        """The weights of a schedule and what they miss; fitted now where the run folder does not have them."""
        names = [group.name for group in self._groups]
        key = canonical_sha256([schedule, self._anchors, RIDGE, names])[:16]
        file = self._runner.folder / f"fit-{key}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if "errors" not in kept:  # as earlier versions wrote it
            own = self._fitted(schedule)
            kept = {"schedule": schedule, "anchors": self._anchors, "rows": own.rows}
            kept["errors"] = own.errors.tolist()
            write_atomically(file, json.dumps(kept).encode())
        rows = {int(step): tuple(row) for step, row in kept["rows"].items()}
        return Fit(rows, np.array(kept["errors"]))

    def _fitted(self, schedule: str) -> Fit:
        computed = schedule.count("C")
        runs = computed * len(self._groups)
        self._say(
            f"fitting {computed} of {len(schedule)} steps on {len(self._groups)} prompts: "
            f"{computed / len(schedule):.0%} of what their uncached runs took"
        )
        teachers = [torch.from_numpy(trajectory.latents) for trajectory in self._trajectories]
        prompts = [group.prompt for group in self._groups]
        with (
            tqdm(total=runs, desc="fitting", unit="step", disable=not self._progress) as bar,
            self._runner.running(prompts) as running,
        ):
            return fit(
                running,
                teachers,
                schedule,
                anchors=self._anchors,
                walls=self._trajectories[0].walls,
                advance=bar.update,
            )
