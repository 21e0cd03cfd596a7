"""What a span of skipped steps costs, from inner products of uncached predictions: tables for the search.

The solver moves the latents by ``increment_t v_t`` at step t. A span forecasts all its predictions from the last
computed ones; what reaches the model at the next computed step is the sum of its steps' errors, with their signs. Its
norm follows from the Gram matrix of the predictions, and what is left of it in the result from the gain there. All of
it is exact on the uncached trajectory only: what feeds back is seen by fitting and by real runs.
"""

from __future__ import annotations

from collections.abc import Callable
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
        sizes = [log.num_steps for log in logs]
        walls = tuple(int(wall) for wall in np.cumsum([0, *sizes[:-1]]))
        gram = np.zeros((len(logs[0].output), sum(sizes), sum(sizes)))
        for wall, log in zip(walls, logs, strict=True):
            part = slice(wall, wall + log.num_steps)
            gram[:, part, part] = getattr(log, what)
        sigmas = np.concatenate([*(log.sigmas[:-1] for log in logs), logs[-1].sigmas[-1:]])
        increments = np.concatenate([log.increments for log in logs])
        return cls(gram, levels_of(sigmas), increments, gains_of_levels(sigmas), walls)

    @property
    def num_steps(self) -> int:
        return self.gram.shape[1]

    @cached_property
    def path(self) -> Array:
        """Length of each sample's path, ``sum_t |increment_t| |v_t|``: errors are fractions of it."""
        lengths = np.sqrt(np.maximum(np.einsum("ptt->pt", self.gram), 0))
        return np.maximum(lengths @ np.abs(self.increments), TINY)

    def costs(self, forecast: str, reduce: Callable[[Array], Array] | None = None) -> Array:
        """What every span costs with ``reuse``, ``linear`` or ``fitted`` forecasts from two computed steps.

        Args:
            reduce: From errors of shape (samples, ...) to a cost; the mean by default.

        Returns:
            Shape (T + 1, T, T + 1), as :class:`calibrate.planning.search.Program` takes it; infinite where a span
            would cross a wall.
        """
        steps = self.num_steps
        if steps > MOST_STEPS:
            raise InvalidOption(f"{steps} steps: plans are made for up to {MOST_STEPS}")
        reduce = reduce or mean
        table = np.full((steps + 1, steps, steps + 1), np.inf)
        for newest in range(steps):
            begin = max(wall for wall in self.walls if wall <= newest)
            end = min((wall for wall in self.walls if wall > newest), default=steps)
            ends = np.arange(newest + 1, end + 1)
            span = _Span(self, newest, ends)
            alone = reduce(span.error(None, "reuse" if forecast == "linear" else forecast))
            # What lies before the wall is as good as nothing.
            table[: begin + 1, newest, newest + 1 : end + 1] = alone
            for older in range(begin, newest):
                error = alone if forecast == "reuse" else reduce(span.error(older, forecast))
                table[older + 1, newest, newest + 1 : end + 1] = error
        return table


def mean(errors: Array) -> Array:
    return errors.mean(0)


def high_quantile(errors: Array) -> Array:
    """For schedules that spare the worst prompts."""
    return np.quantile(errors, QUANTILE, axis=0)


def gains_of_levels(sigmas: Array) -> Array:
    """How much of an error is left at the end, from noise levels alone, shape (T + 1,).

    For Gaussian data of unit variance the sampler's flow only scales: by the ratio of the standard deviations at the
    end and now. That is ``1 / sqrt(1 + sigma^2)`` where noise is added to the data (levels beyond 1), and
    ``1 / sqrt((1 - sigma)^2 + sigma^2)`` where it is mixed with them (flow matching). Ones where levels are unknown.
    """
    if not np.isfinite(sigmas).all():
        return np.ones(len(sigmas))
    kept = 1 - sigmas if sigmas.max() <= 1 else np.ones_like(sigmas)
    deviation = np.sqrt(kept**2 + sigmas**2)
    return deviation[-1] / deviation


class _Span:
    """Errors of the spans that begin after one computed step, up to each of the next computed steps ``ends``."""

    def __init__(self, problem: Problem, newest: int, ends: NDArray[np.int64]) -> None:
        self.problem, self.newest, self.ends = problem, newest, ends
        inside = (np.arange(problem.num_steps)[:, None] > newest) & (
            np.arange(problem.num_steps)[:, None] < ends
        )
        moves = (
            problem.increments[:, None] * inside
        )  # (T, ends): the sum that a span has to forecast
        self.total = moves.sum(0)
        self.products = problem.gram @ moves  # (samples, T, ends)
        self.squared = np.maximum(np.einsum("te,pte->pe", moves, self.products), 0)
        self.moves = moves

    def error(self, older: int | None, forecast: str) -> Array:
        """What is left of a span's error at the end, as a fraction of the path, shape (samples, ends)."""
        anchors = [self.newest] if older is None else [self.newest, older]
        gram = self.problem.gram[:, anchors][:, :, anchors]
        products = self.products[:, anchors]
        weights = self._weights(gram, products, older, forecast)
        squared = self.squared - 2 * np.einsum("ae,pae->pe", weights, products)
        squared += np.einsum("ae,pab,be->pe", weights, gram, weights, optimize=True)
        left = np.sqrt(np.maximum(squared, 0)) * self.problem.gains[self.ends]
        left[:, 0] = 0.0  # nothing is skipped there
        return left / self.problem.path[:, None]

    def _weights(self, gram: Array, products: Array, older: int | None, forecast: str) -> Array:
        """Of the anchors in the sum of the span, shape (anchors, ends)."""
        if older is None and forecast != "fitted":
            return self.total[None]
        if forecast == "linear":
            levels, newest = self.problem.levels, self.newest
            gap = levels[newest] - levels[older]
            ahead = (levels - levels[newest]) / gap if gap else np.zeros_like(levels)
            further = ahead @ self.moves
            return np.stack([self.total + further, -further])
        if forecast == "reuse":
            return np.stack([self.total, np.zeros_like(self.total)])
        # Ridge regression of the span's sum on the anchors, shrunk to reuse; samples count alike.
        scale = 1 / np.maximum(self.squared, TINY)
        left = np.einsum("pab,pe->eab", gram, scale) * self.total[:, None, None] ** 2
        right = np.einsum("pae,pe->ea", products, scale) * self.total[:, None]
        penalty = RIDGE * np.einsum("eaa->e", left) / len(gram[0]) + TINY
        left += penalty[:, None, None] * np.eye(gram.shape[1])
        right[:, 0] += penalty
        return (np.linalg.solve(left, right[..., None])[..., 0] * self.total[:, None]).T
