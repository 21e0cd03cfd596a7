"""What a span of skipped steps costs, from inner products of uncached predictions: tables for the search.

The solver moves the latents by ``increment_t v_t`` at step t. A span forecasts all its predictions from the last
computed ones; what reaches the model at the next computed step is the sum of its steps' errors, with their signs. Its
norm follows from the Gram matrix of the predictions, and what is left of it in the result from the gain there. All of
it is exact on the uncached trajectory only: what feeds back is seen by fitting and by real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.runs.gram_log import GramLog, levels_of

Array = NDArray[np.float64]
MOST_STEPS = 256  # the table of costs is cubic: 135 MB there
RIDGE = 1e-5  # as in the fit of the weights, see calibrate.planning.closed_loop
TINY = 1e-300
QUANTILE = 0.9  # of the samples' errors, for schedules that spare the worst prompts
FORECASTS = ("reuse", "linear", "fitted")


@dataclass(frozen=True)
class Problem:
    """Everything that the costs of a schedule depend on.

    Attributes:
        gram: Inner products of the predictions at all steps, shape (samples, T, T).
        levels: Abscissa of linear forecasts, shape (T,).
        increments: What each step's prediction is multiplied with, shape (T,), signed.
        gains: How much of an error in the latents before step t is left at the end, shape (T + 1,).
        walls: Steps where a denoiser takes over: computed, and nothing before them is used.
    """

    gram: Array
    levels: Array
    increments: Array
    gains: Array
    walls: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, logs: list[GramLog], what: str = "output") -> Problem:
        """From the Gram logs of all experts, with the gains of :func:`gains_of_levels`."""
        walls = tuple(log.first_step for log in logs)
        steps = walls[-1] + logs[-1].num_steps
        gram = np.zeros((len(logs[0].output), steps, steps))
        for log in logs:
            part = slice(log.first_step, log.first_step + log.num_steps)
            gram[:, part, part] = getattr(log, what)
        increments = np.concatenate([log.increments for log in logs])
        sigmas = sigmas_of(logs)
        return cls(gram, levels_of(sigmas), increments, gains_of_levels(sigmas), walls)

    @property
    def num_steps(self) -> int:
        return self.gram.shape[1]

    @cached_property
    def path(self) -> Array:
        """Length of each sample's path, ``sum_t |increment_t| |v_t|``: errors are fractions of it."""
        lengths = np.sqrt(np.maximum(np.einsum("ptt->pt", self.gram), 0))
        return np.maximum(lengths @ np.abs(self.increments), TINY)

    def costs(self, forecast: str, for_worst: bool = False) -> Array:
        """What every span costs with ``reuse``, ``linear`` or ``fitted`` forecasts from two computed steps.

        Args:
            for_worst: A high quantile over the samples instead of the mean.

        Returns:
            Shape (T + 1, T, T + 1), as :func:`calibrate.planning.search.best_schedules` takes it; infinite where a
            span would cross a wall.
        """
        steps = self.num_steps
        if steps > MOST_STEPS:
            raise InvalidOption(f"{steps} steps: plans are made for up to {MOST_STEPS}")
        table = np.full((steps + 1, steps, steps + 1), np.inf)
        for newest in range(steps):
            begin = max(wall for wall in self.walls if wall <= newest)
            end = min((wall for wall in self.walls if wall > newest), default=steps)
            spans = _Spans(self, newest, np.arange(newest + 1, end + 1))
            # Row 0 and those before the wall: nothing older to forecast from.
            for older in range(begin - 1, newest):
                alone = older < begin or forecast == "reuse"
                errors = spans.errors([newest] if alone else [newest, older], forecast)
                cost = np.quantile(errors, QUANTILE, axis=0) if for_worst else errors.mean(0)
                rows = slice(0, begin + 1) if older < begin else older + 1
                table[rows, newest, newest + 1 : end + 1] = cost
        return table


def sigmas_of(logs: list[GramLog]) -> Array:
    """Noise levels of all experts' steps and of the end."""
    return np.concatenate([*(log.sigmas[:-1] for log in logs), logs[-1].sigmas[-1:]])


def gains_of_levels(sigmas: Array) -> Array:
    """How much of an error is left at the end, from noise levels alone, shape (T + 1,).

    For Gaussian data of unit variance the sampler's flow only scales: by the ratio of the standard deviations at the
    end and now. That is ``1 / sqrt(1 + sigma^2)`` where noise is added to the data (levels beyond 1), and
    ``1 / sqrt((1 - sigma)^2 + sigma^2)`` where it is mixed with them (flow matching). Ones where levels are unknown.
    """
    if not np.isfinite(sigmas).all():
        return np.ones(len(sigmas))
    kept = 1 - sigmas if sigmas.max() <= 1 else 1.0
    deviation = np.hypot(kept, sigmas)
    return deviation[-1] / deviation


class _Spans:
    """The spans that begin after one computed step, up to each of the next computed steps ``ends``."""

    def __init__(self, problem: Problem, newest: int, ends: NDArray[np.int64]) -> None:
        self.problem, self.ends = problem, ends
        steps = np.arange(problem.num_steps)[:, None]
        inside = (steps > newest) & (steps < ends)
        # (T, ends): the sum of predictions that a span has to forecast.
        self.moves = problem.increments[:, None] * inside
        self.products = problem.gram @ self.moves
        self.squared = np.maximum(np.einsum("te,pte->pe", self.moves, self.products), 0)

    def errors(self, anchors: list[int], forecast: str) -> Array:
        """What is left at the end of a forecast's errors from these steps, as a share of the path: (samples, ends)."""
        gram = self.problem.gram[:, anchors][:, :, anchors]
        products = self.products[:, anchors]
        fitted = forecast == "fitted"
        weights = self._fitted(gram, products) if fitted else self._extrapolated(anchors)
        squared = self.squared - 2 * np.einsum("ae,pae->pe", weights, products)
        squared += np.einsum("ae,pab,be->pe", weights, gram, weights, optimize=True)
        left = np.sqrt(np.maximum(squared, 0)) * self.problem.gains[self.ends]
        left[:, 0] = 0.0  # nothing is skipped there
        return left / self.problem.path[:, None]

    def _extrapolated(self, anchors: list[int]) -> Array:
        """Weights of the line through the anchors in the sum of the span, or of reuse: shape (anchors, ends)."""
        total = self.moves.sum(0)
        if len(anchors) == 1:
            return total[None]
        levels = self.problem.levels
        newest, older = levels[anchors]
        further = (
            (levels - newest) / (newest - older) @ self.moves
            if newest != older
            else 0 * total
        )
        return np.stack([total + further, -further])

    def _fitted(self, gram: Array, products: Array) -> Array:
        """Ridge regression of the span's sum on the anchors, shrunk to reuse; samples count alike."""
        total, count = self.moves.sum(0), gram.shape[1]
        scale = 1 / np.maximum(self.squared, TINY)
        left = np.einsum("pab,pe->eab", gram, scale) * total[:, None, None] ** 2
        right = np.einsum("pae,pe->ea", products, scale) * total[:, None]
        penalty = RIDGE * np.einsum("eaa->e", left) / count + TINY
        left += penalty[:, None, None] * np.eye(count)
        right[:, 0] += penalty
        return (np.linalg.solve(left, right[..., None])[..., 0] * total[:, None]).T
