"""Schedules and what they cost open loop: errors from Gram matrices, exact dynamic programming, local search.

A schedule computes some steps and forecasts the others from the last computed ones ("anchors", newest first). With
weights w the error of step t is ``v_t - sum_i w_i v_(s_i)``, whose norm follows from the Gram matrix alone: exact as
long as the trajectory is the uncached one (open loop). What feeds back through the sampler is not in it, so that plans
are run before they are used.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from calibrate.errors import InvalidOption
from calibrate.runs.gram_log import GramLog
from runtime.decide.forecast import extrapolation

Array = NDArray[np.float64]
KEPT = {"reuse": 1, "linear": 2, "quadratic": 3, "fitted": 2}
FORECASTS = tuple(KEPT)
MOST_STEPS = {
    "reuse": 2000,
    "linear": 256,
    "fitted": 128,
    "quadratic": 64,
}  # beyond it the tables outgrow memory
RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, np.inf)
FOLDS = 5
NONE = -1  # no anchor yet


@dataclass(frozen=True)
class Problem:
    """Gram matrices with the sampler's step sizes: everything an open-loop error depends on.

    Attributes:
        gram: Shape (samples, T, T).
        levels: Abscissa of the forecasts, shape (T,).
        increments: What each step's output is multiplied with, shape (T,), signed.
        prompt_ids: Of each sample; samples of one prompt stay together in cross-validation.
        path: Length of each sample's whole path, where this problem is one expert's part of it.
    """

    gram: Array
    levels: Array
    increments: Array
    prompt_ids: tuple[str, ...] = ()
    path: Array | None = None

    @classmethod
    def of(cls, log: GramLog, what: str = "output") -> "Problem":
        """The problem of ``output`` or ``residual``."""
        return cls(log.grams[what], log.levels, log.increments, log.prompt_ids)

    @property
    def num_steps(self) -> int:
        return self.gram.shape[1]

    @cached_property
    def length(self) -> Array:
        """Length of each sample's path, ``sum_t |increment_t| |v_t|``, shape (samples,)."""
        return np.sqrt(np.maximum(np.einsum("ptt->pt", self.gram), 0)) @ np.abs(self.increments)

    @cached_property
    def scale(self) -> Array:
        """What errors are given as fractions of: the length of the (whole) path."""
        return np.maximum(self.length if self.path is None else self.path, 1e-300)

    @cached_property
    def folds(self) -> NDArray[np.int64]:
        """Fold of each sample; prompts are not split."""
        ids = self.prompt_ids or tuple(map(str, range(len(self.gram))))
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(ids))}
        return np.array([number[prompt] % FOLDS for prompt in ids])

    # --- errors of a schedule

    def rows(self, schedule: str, forecast: "str | Weights") -> Array:
        """Coefficients of the forecast errors of all steps in the outputs, shape (T, T); zero rows where computed."""
        rows = np.zeros((self.num_steps, self.num_steps))
        anchors: list[int] = []
        kept = KEPT[forecast] if isinstance(forecast, str) else forecast.kept
        for step, letter in enumerate(checked(schedule, self.num_steps)):
            if letter == "C":
                anchors = [step, *anchors][:kept]
                continue
            if isinstance(forecast, str):
                weights = extrapolation(self.levels[step], [self.levels[a] for a in anchors])
            else:
                weights = forecast.rows.get(step, (1.0,))
            rows[step, step] = 1.0
            for anchor, weight in zip(anchors, weights, strict=False):
                rows[step, anchor] -= weight
        return rows

    def step_errors(self, schedule: str, forecast: "str | Weights") -> Array:
        """``|increment| |error|`` of every step as a fraction of the path, shape (samples, T)."""
        rows = self.rows(schedule, forecast)
        squared = np.einsum("ti,pij,tj->pt", rows, self.gram, rows, optimize=True)
        return np.sqrt(np.maximum(squared, 0)) * np.abs(self.increments) / self.scale[:, None]

    def additive(self, schedule: str, forecast: "str | Weights") -> Array:
        """Sum of the steps' errors, shape (samples,): no cancellation between steps is counted on."""
        return self.step_errors(schedule, forecast).sum(1)

    def signed(self, schedule: str, forecast: "str | Weights") -> Array:
        """Norm of the sum of the steps' errors with signs, shape (samples,): the open-loop error of the image."""
        total = self.increments @ self.rows(schedule, forecast)
        squared = np.einsum("i,pij,j->p", total, self.gram, total, optimize=True)
        return np.sqrt(np.maximum(squared, 0)) / self.scale

    # --- costs of all anchors at once

    @cached_property
    def _errors(
        self,
    ) -> dict[tuple[str, float], tuple[NDArray[np.int64], NDArray[np.int64], Array]]:
        return {}

    def _errors_of(
        self, forecast: str, damping: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """All sets of anchors, their steps, and ``|increment| |error| / path``, shape (samples, n)."""
        if (forecast, damping) not in self._errors:
            anchors, step = _anchors(self.num_steps, KEPT[forecast])
            if forecast == "fitted":
                squared = _out_of_fold(self, anchors, step, damping)
            else:
                squared = _squared_errors(
                    self.gram, anchors, step, _lagrange(self.levels, anchors, step)
                )
            error = (
                np.sqrt(np.maximum(squared, 0))
                * np.abs(self.increments)[step]
                / self.scale[:, None]
            )
            self._errors[forecast, damping] = anchors, step, error
        return self._errors[forecast, damping]

    def costs(
        self, forecast: str, peak: float = 1.0, sample: int | None = None, damping: float = 0.0
    ) -> Array:
        """Mean over samples of ``(|increment| |error| / path)^peak`` for all anchors and steps; or of one sample.

        Args:
            damping: Share of plain reuse in fitted weights.

        Returns:
            Shape ``(T + 1,) * (kept - 1) + (T, T)``: index older anchors plus one (0: none), the newest anchor, the
            step. Infinite where the indices are no anchors of that step. For ``fitted`` errors are out of fold.
        """
        steps, kept = self.num_steps, KEPT[forecast]
        if steps > MOST_STEPS[forecast]:
            raise InvalidOption(
                f"{forecast} over {steps} steps: planned up to {MOST_STEPS[forecast]} steps"
            )
        anchors, step, error = self._errors_of(forecast, damping)
        error = error if sample is None else error[sample : sample + 1]
        table = np.full((steps + 1,) * (kept - 1) + (steps, steps), np.inf)
        older = tuple(anchors[:, i] + 1 for i in range(kept - 1, 0, -1))
        table[(*older, anchors[:, 0], step)] = (error**peak).mean(0)
        return table


@dataclass(frozen=True)
class Weights:
    """Fitted weights of a schedule's skipped steps.

    Attributes:
        rows: Step -> weights of the last computed steps, the newest first.
        ridge: The penalty on the distance from linear extrapolation that cross-validation chose (infinite: linear).
    """

    rows: dict[int, tuple[float, ...]]
    ridge: float

    @property
    def kept(self) -> int:
        return max(map(len, self.rows.values()), default=1)


def checked(schedule: str, num_steps: int) -> str:
    """The schedule, if it is one of this many steps that begins with a computed one."""
    if len(schedule) != num_steps or set(schedule) - {"C", "S"} or not schedule.startswith("C"):
        raise InvalidOption(
            f"schedule {schedule!r}: expected {num_steps} letters C or S, the first one C"
        )
    return schedule


def schedule_of(computed: Iterable[int], num_steps: int) -> str:
    """``"CCSC..."`` of the computed steps."""
    chosen = set(computed)
    return "".join("C" if step in chosen else "S" for step in range(num_steps))


def computed_of(schedule: str) -> list[int]:
    return [step for step, letter in enumerate(schedule) if letter == "C"]


# --- dynamic programming


@dataclass
class Program:
    """Exact best schedules of every number of computed steps, for costs that depend on the kept anchors.

    Args:
        costs: As from :meth:`Problem.costs`.
        most: Largest number of computed steps that will be asked for.
    """

    costs: Array
    most: int
    _back: list[NDArray[np.int16]] = field(default_factory=list)
    _best: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept, steps = self.costs.ndim - 1, self.costs.shape[-1]
        # spans[..., s, u]: cost of the steps between the anchor s and the next computed step u (u = T: the end).
        spans = np.full((*self.costs.shape[:-1], steps + 1), np.inf)
        inside = np.where(np.isfinite(self.costs), self.costs, 0.0)
        valid = np.isfinite(self.costs)
        spans[..., 1:] = np.cumsum(inside, axis=-1)
        # The span up to u holds the steps below u; it is valid where all of them are, or there are none.
        after = np.arange(steps + 1)[None, :] > np.arange(steps)[:, None]
        first = np.zeros((steps, steps + 1), bool)
        first[np.arange(steps), np.arange(1, steps + 1)] = True
        reachable = np.zeros(spans.shape, bool)
        reachable[..., 1:] = valid
        spans = np.where(after & (first | reachable), spans, np.inf)
        state = np.full((steps + 1,) * (kept - 1) + (steps,), np.inf)
        state[(0,) * kept] = 0.0  # step 0 is computed, and there is no anchor before it
        for _ in range(self.most):
            ends = state + spans[..., steps]
            place = np.unravel_index(int(np.argmin(ends)), ends.shape)
            self._best.append((float(ends[place]), tuple(int(i) for i in place)))
            moved = state[..., None] + spans[..., :steps]
            self._back.append(moved.argmin(0).astype(np.int16))
            moved = moved.min(0)
            if kept == 1:
                state = moved
            else:
                state = np.full_like(state, np.inf)
                state[(slice(None),) * (kept - 2) + (slice(1, None),)] = moved

    def best(self, computed: int) -> tuple[str, float]:
        """The best schedule of ``computed`` computed steps, and its cost."""
        kept, steps = self.costs.ndim - 1, self.costs.shape[-1]
        cost, place = self._best[computed - 1]
        found = [place[-1]]
        state = place
        for back in reversed(self._back[: computed - 1]):
            # A state is (older anchors + 1 ..., newest); what dropped out of it is in the table of its predecessor.
            rest = state if kept == 1 else (*state[: kept - 2], state[-2] - 1, state[-1])
            dropped = int(back[rest])
            state = (dropped,) if kept == 1 else (dropped, *rest[:-1])
            found.append(state[-1])
        return schedule_of(found, steps), cost


def schedule_cost(costs: Array, schedule: str) -> float:
    """Cost of one schedule in the table of :meth:`Problem.costs`: what the program adds up."""
    kept, total = costs.ndim - 1, 0.0
    anchors: list[int] = []
    for step, letter in enumerate(schedule):
        if letter == "C":
            anchors = [step, *anchors][:kept]
        else:
            padded = anchors + [NONE] * (kept - len(anchors))
            total += costs[(*(a + 1 for a in padded[:0:-1]), padded[0], step)]
    return float(total)


# --- local search


def local_search(
    schedule: str, value: Callable[[str], float], *, reach: int = 3, rounds: int = 20
) -> tuple[str, float]:
    """Move computed steps by up to ``reach``, the best move of each round, until none lowers ``value``."""
    best, known = value(schedule), {schedule}
    for _ in range(rounds):
        found = None
        computed = computed_of(schedule)
        for step in computed[1:]:
            for shift in range(-reach, reach + 1):
                moved = step + shift
                if not 0 < moved < len(schedule) or moved in computed:
                    continue
                candidate = schedule_of([*(s for s in computed if s != step), moved], len(schedule))
                if candidate in known:
                    continue
                known.add(candidate)
                reached = value(candidate)
                if reached < best:
                    best, found = reached, candidate
        if found is None:
            break
        schedule = found
    return schedule, best


# --- fitted weights


def fit_weights(
    problem: Problem, schedule: str, ridge: float | None = None, damping: float = 0.0
) -> Weights:
    """Weights that minimise the mean squared error over samples, shrunk to linear extrapolation.

    Args:
        ridge: The penalty, relative to the mean squared norm of the anchors; by default what leaves prompts out best.
        damping: Share of plain reuse in the weights. The fit sees uncached anchors only; in a real run they carry the
            errors of earlier forecasts, which weights of opposite sign amplify.
    """
    anchors, step = _anchors_of(checked(schedule, problem.num_steps), KEPT["fitted"])
    if not len(step):
        return Weights({}, np.inf)
    if ridge is None:
        ridge = _best_ridge(problem, anchors, step)
    weights = _ridge(
        *_normal_equations(problem, anchors, step), _lagrange(problem.levels, anchors, step), ridge
    )
    weights = _damped(weights, damping)
    rows = {}
    for t, row, chosen in zip(step, weights, anchors, strict=True):
        rows[int(t)] = tuple(float(w) for w, a in zip(row, chosen, strict=True) if a != NONE)
    return Weights(rows, ridge)


def _damped(weights: Array, damping: float) -> Array:
    return (1 - damping) * weights + damping * np.eye(weights.shape[-1])[0]


def _best_ridge(problem: Problem, anchors: NDArray, step: NDArray) -> float:
    """The penalty with the least error on prompts that were left out; infinite where that cannot be told."""
    if len(set(problem.folds)) < 2:
        return np.inf
    weight = np.abs(problem.increments)[step]

    def error(ridge: float) -> float:
        squared = _cross_validated(problem, anchors, step, ridge)
        return float(
            (np.sqrt(np.maximum(squared, 0)) * weight / problem.scale[:, None]).sum(1).mean()
        )

    return min(RIDGES[::-1], key=error)  # of equal ones the strongest


def _out_of_fold(problem: Problem, anchors: NDArray, step: NDArray, damping: float) -> Array:
    """Squared errors of fitted weights, shape (samples, n), each sample's from the other prompts' weights.

    One penalty for all: what is best on steps up to a tenth of the schedule after the anchor.
    """
    near = step - anchors[:, 0] <= max(2, problem.num_steps // 10)
    return _cross_validated(
        problem, anchors, step, _best_ridge(problem, anchors[near], step[near]), damping
    )


def _cross_validated(
    problem: Problem, anchors: NDArray, step: NDArray, ridge: float, damping: float = 0.0
) -> Array:
    linear = _lagrange(problem.levels, anchors, step)
    if not np.isfinite(ridge) or len(set(problem.folds)) < 2:
        return _squared_errors(problem.gram, anchors, step, _damped(linear, damping))
    left, right = _normal_equations(problem, anchors, step, summed=False)
    squared = np.empty((len(problem.gram), len(step)))
    for fold in np.unique(problem.folds):
        out = problem.folds == fold
        weights = _ridge(left[~out].sum(0), right[~out].sum(0), linear, ridge)
        squared[out] = _squared_errors(problem.gram[out], anchors, step, _damped(weights, damping))
    return squared


def _normal_equations(
    problem: Problem, anchors: NDArray, step: NDArray, summed: bool = True
) -> tuple[Array, Array]:
    """``G_SS`` and ``G_St`` of all anchor sets, each sample divided by its path's square; absent anchors are zero."""
    present = anchors != NONE
    gram = problem.gram / problem.scale[:, None, None] ** 2
    left = gram[:, anchors[:, :, None], anchors[:, None, :]] * (
        present[:, :, None] & present[:, None, :]
    )
    right = gram[:, anchors, step[:, None]] * present
    return (left.sum(0), right.sum(0)) if summed else (left, right)


def _ridge(left: Array, right: Array, linear: Array, ridge: float) -> Array:
    """``(G_SS + lambda I) w = G_St + lambda w_linear``, lambda relative to the anchors' mean square."""
    if not np.isfinite(ridge):
        return linear
    kept = left.shape[-1]
    penalty = ridge * np.einsum("nkk->n", left)[:, None] / kept
    system = left + penalty[:, :, None] * np.eye(kept)
    return np.linalg.solve(system, (right + penalty * linear)[..., None])[..., 0]


# --- tables over anchors


def _anchors(steps: int, kept: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All sets of kept anchors before all steps: (n, kept) newest first, ``NONE`` where there is none, and (n,).

    An anchor is missing only where the oldest present one is step 0, the first that is computed.
    """
    grids = []
    for count in range(1, kept + 1):
        free = (
            count + 1 if count == kept else count
        )  # a set with anchors missing begins with step 0
        rising = np.fromiter(
            chain.from_iterable(combinations(range(count + 1 - free, steps), free)), np.int64
        )
        axes = rising.reshape(-1, free).T  # oldest anchor ... newest anchor, step
        if free == count:
            axes = np.concatenate([np.zeros((1, axes.shape[1]), np.int64), axes])
        newest_first = axes[:-1][::-1]
        missing = np.full((kept - count, axes.shape[1]), NONE)
        grids.append((np.concatenate([newest_first, missing]), axes[-1]))
    return np.concatenate([grid[0] for grid in grids], axis=1).T, np.concatenate(
        [grid[1] for grid in grids]
    )


def _anchors_of(schedule: str, kept: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The anchors of a schedule's skipped steps, in the form of :func:`_anchors`."""
    rows, steps, anchors = [], [], []
    for step, letter in enumerate(schedule):
        if letter == "C":
            anchors = [step, *anchors][:kept]
        else:
            rows.append(anchors + [NONE] * (kept - len(anchors)))
            steps.append(step)
    return np.array(rows, dtype=np.int64).reshape(-1, kept), np.array(steps, dtype=np.int64)


def _lagrange(levels: Array, anchors: NDArray, step: NDArray) -> Array:
    """:func:`runtime.decide.forecast.extrapolation` for all anchor sets at once, shape (n, kept)."""
    at, target, present = levels[anchors], levels[step], anchors != NONE
    weights = np.where(present, 1.0, 0.0)
    kept = anchors.shape[1]
    # Of equal levels only the newest anchor counts, as in the runtime.
    counted = present.copy()
    for i in range(kept):
        for j in range(i):
            counted[:, i] &= ~(counted[:, j] & (at[:, i] == at[:, j]))
    weights *= counted
    for i in range(kept):
        for j in range(kept):
            both = counted[:, i] & counted[:, j]
            if i != j:
                gap = np.where(both, at[:, i] - at[:, j], 1.0)
                weights[:, i] *= np.where(both, (target - at[:, j]) / gap, 1.0)
    return weights


def _squared_errors(gram: Array, anchors: NDArray, step: NDArray, weights: Array) -> Array:
    """``|v_t - sum_i w_i v_i|^2``, shape (samples, n); weights of absent anchors are zero."""
    squared = gram[:, step, step].copy()
    kept = anchors.shape[1]
    for i in range(kept):
        squared -= 2 * weights[:, i] * gram[:, step, anchors[:, i]]
        for j in range(kept):
            squared += weights[:, i] * weights[:, j] * gram[:, anchors[:, i], anchors[:, j]]
    return squared
