"""Replay: drive the gate over recorded trajectories, for any threshold, without the model.

What it says holds as long as skipping does not change the signal itself (an open-loop replay); `calibrate verify`
measures how far real cached runs drift from it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from calibrate.errors import CalibrateError
from calibrate.runs.pairs import SIGNAL_COLUMNS, TRAJECTORY, Run, column_of
from coeffs import Entry, Polynomial
from runtime.decide.gate import Gate, GateConfig
from runtime.stats import BranchStats

TARGET_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
SEARCH_POINTS = 400  # neighbours differ by 2 % where thresholds span three decades

Key = tuple[str, str]  # expert, branch
Timing = Mapping[str, tuple[float, float]]
DEFAULT_CONFIG = GateConfig(threshold=0.0)


class Unreachable(CalibrateError, ValueError):
    """A speed-up that no threshold gives on this log."""


@dataclass(frozen=True)
class Trajectory:
    """The signal of one prompt, seed, expert and branch: ``x[t]`` is the change at step t, NaN where unusable."""

    prompt_id: str
    seed: int
    expert: str
    branch: str
    num_steps: int
    x: np.ndarray

    @property
    def key(self) -> Key:
        return self.expert, self.branch

    @property
    def generation(self) -> tuple[str, int, str]:
        return self.prompt_id, self.seed, self.expert


def trajectories(run: Run, signal: str = "modulated_input") -> list[Trajectory]:
    """All recorded trajectories, excluded rows as NaN; the first step has no pair and no x (NaN at index 0)."""
    column = column_of(signal, SIGNAL_COLUMNS, "signal")
    recorded = []
    for (prompt, seed, expert, branch), rows in run.rows.groupby(TRAJECTORY, sort=True):
        steps = rows["step"].to_numpy()
        # A second expert's steps may be counted on from the first's: its own first step lies before its first pair.
        start = steps.min() - 1
        x = np.full(steps.max() - start + 1, np.nan)
        x[steps - start] = rows[column]
        recorded.append(Trajectory(str(prompt), int(seed), str(expert), str(branch), len(x), x))
    return recorded


def leaders(recorded: Sequence[Trajectory]) -> dict[tuple[str, int, str], Trajectory]:
    """Of each generation of an expert the trajectory whose decisions all branches follow.

    The runtime lets the branch that is called first at a step decide: ``cond`` in the pipelines that name branches,
    else the one that was numbered first.
    """
    last_first = sorted(recorded, key=lambda t: (t.branch != "cond", t.branch), reverse=True)
    leading = {trajectory.generation: trajectory for trajectory in last_first}
    return {t.generation: leading[t.generation] for t in recorded}


def polynomials(entry: Entry, run: Run) -> dict[Key, Polynomial]:
    """The polynomial each branch of the run is gated with, as the runtime applies the entry."""
    # All recorded trajectories are replayed, those without a single usable pair too.
    keys = run.rows[["expert", "branch"]].drop_duplicates().itertuples(index=False, name=None)
    return {key: entry.fit(*key).polynomial(entry.sign_rule) for key in keys}


def replay(
    run: Run,
    of_branch: Mapping[Key, Polynomial],
    thresholds: Sequence[float],
    config: GateConfig = DEFAULT_CONFIG,
    signal: str = "modulated_input",
    branches: str = "together",
) -> pd.DataFrame:
    """The gate's decisions on every trajectory: one row per threshold and trajectory.

    ``branches`` as in :func:`runtime.apply_tea_cache`: ``together`` (one decides for all) or ``apart``.
    Columns: threshold, prompt_id, seed, expert, branch, num_steps, computed, pattern ("CCSC...").
    """
    recorded, rows = trajectories(run, signal), []
    leading = leaders(recorded)
    for threshold in thresholds:
        settings = replace(config, threshold=float(threshold))
        for own in recorded:
            leader = leading[own.generation] if branches == "together" else own
            if leader.num_steps != own.num_steps:
                leader = own
            stats = _drive(Gate(of_branch[leader.key], settings), leader)
            decided = (threshold, stats.computed, stats.pattern)
            rows.append((*own.generation, own.branch, own.num_steps, *decided))
    columns = ["prompt_id", "seed", "expert", "branch", "num_steps", "threshold", "computed"]
    return pd.DataFrame(rows, columns=[*columns, "pattern"])


def summarise(decisions: pd.DataFrame, timing: Timing | None = None) -> pd.DataFrame:
    """One row per threshold: computed steps, their range over prompts (``computed_low``, ``computed_high``), speed-up.

    Computed steps are those of one branch, averaged over branches and summed over experts. ``speedup`` is the
    denoiser's alone (text encoder and decoder come on top) from the measured seconds per call and per block stack;
    without timing it takes the stack as everything, an upper bound.
    """
    seconds = {expert: (timing or {}).get(expert, (1.0, 1.0)) for expert in decisions["expert"]}
    call = decisions["expert"].map({expert: known[0] for expert, known in seconds.items()})
    stack = decisions["expert"].map({expert: known[1] for expert, known in seconds.items()})
    skipped = decisions["num_steps"] - decisions["computed"]
    costs = decisions.assign(full=call * decisions["num_steps"], saved=stack * skipped)
    generation = ["threshold", "prompt_id", "seed"]
    steps = costs.groupby([*generation, "expert"], sort=False)[["computed", "num_steps"]].mean()
    by_threshold = steps.groupby(generation, sort=False).sum().groupby("threshold", sort=False)
    summary = by_threshold["computed"].agg(
        computed_steps="mean", computed_low="min", computed_high="max"
    )
    summary["num_steps"] = by_threshold["num_steps"].mean()
    total = costs.groupby("threshold", sort=False)[["full", "saved"]].sum()
    left = total["full"] - total["saved"]
    summary["speedup"] = total["full"] / left.where(left > 0)
    return summary.reset_index()


class Search:
    """Computed steps at many thresholds at once: the gate's rules on arrays, equal to :func:`replay` (tested)."""

    def __init__(
        self,
        run: Run,
        of_branch: Mapping[Key, Polynomial],
        config: GateConfig = DEFAULT_CONFIG,
        signal: str = "modulated_input",
        branches: str = "together",
    ) -> None:
        self.recorded = trajectories(run, signal)
        if branches == "together":  # the others do what these do
            self.recorded = list(leaders(self.recorded).values())
        self.timing = np.array([run.timing.get(one.expert, (1.0, 1.0)) for one in self.recorded])
        self.config = config
        shape = len(self.recorded), max(one.num_steps for one in self.recorded)
        self.x = np.full(shape, np.nan)
        self.valid = np.zeros(shape, bool)
        self.must_compute = np.zeros(shape, bool)
        self.predicted = np.zeros(shape)
        for row, own in enumerate(self.recorded):
            self.x[row, : own.num_steps] = own.x
            self.valid[row, : own.num_steps] = True
            self._prepare(row, own, of_branch[own.key])
        self._count_generations()
        self.num_steps = self.generation_means(self.valid.sum(axis=1))

    def _prepare(self, row: int, own: Trajectory, polynomial: Polynomial) -> None:
        """Which steps are computed whatever the threshold, and what is predicted at the others."""
        if self.config.compat:
            polynomial = replace(polynomial, domain=None)
        for step, x in enumerate(own.x.tolist()):
            forced = step == 0 or self.config.forced(step, own.num_steps)
            if forced or not math.isfinite(x) or polynomial.above_domain(x):
                self.must_compute[row, step] = True
            else:
                self.predicted[row, step] = polynomial.predict(x)

    def _count_generations(self) -> None:
        """Weight of each trajectory in its prompt's sum over generations, and the generations of each prompt."""
        keys = [own.generation for own in self.recorded]
        table = pd.DataFrame(keys, columns=["prompt_id", "seed", "expert"])
        branches = table.groupby(["prompt_id", "seed", "expert"])["seed"].transform("size")
        seeds = table.groupby("prompt_id")["seed"].nunique()
        self.prompts = list(seeds.index)
        of_prompt = table["prompt_id"].to_numpy()[:, None] == np.array(self.prompts)
        self._shares = of_prompt / branches.to_numpy()[:, None]
        self._generations = seeds.to_numpy()

    def computed(self, thresholds: ArrayLike, predicted: np.ndarray | None = None) -> np.ndarray:
        """Computed steps, shape (..., trajectories), for thresholds of shape (...).

        ``predicted`` of shape (..., trajectories, steps) replaces the predictions, for refits.
        """
        limit = np.asarray(thresholds, float)[..., None]
        predicted = self.predicted if predicted is None else predicted
        cap = math.inf if self.config.compat else self.config.max_skips or math.inf
        shape = np.broadcast_shapes(limit.shape, predicted.shape[:-1])
        accumulated, streak, computed = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
        for step in range(self.x.shape[1]):
            total = accumulated + predicted[..., step]
            skip = (total < limit) & (limit > 0) & ~self.must_compute[:, step] & (streak < cap)
            accumulated, streak = np.where(skip, total, 0.0), np.where(skip, streak + 1, 0)
            computed += ~skip & self.valid[:, step]
        return computed

    def generation_means(self, computed: np.ndarray) -> np.ndarray:
        """Mean over generations of the steps of one branch (mean of branches, sum of experts), shape (...)."""
        return computed @ self._shares.sum(axis=1) / self._generations.sum()

    def resampled_means(self, computed: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Means over resampled prompts: ``computed`` (resamples, trajectories), ``weights`` (resamples, prompts)."""
        return np.sum(computed @ self._shares * weights, axis=-1) / (weights @ self._generations)

    def speedup(self, thresholds: ArrayLike) -> np.ndarray:
        """Expected speed-up of the denoiser at each threshold."""
        call, stack = self.timing.T
        steps = self.valid.sum(axis=1)
        full = float(steps @ call)
        saved = (steps - self.computed(thresholds)) @ stack
        return full / np.maximum(full - saved, 1e-12 * full)

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """0 and geometrically spaced thresholds up to where nothing is computed that need not be."""
        positive = self.predicted[self.predicted > 0]
        if not len(positive):
            return np.array([0.0, 1e-9])
        largest = 1.01 * float(self.predicted.sum(axis=1).max())
        return np.concatenate([[0.0], np.geomspace(float(positive.min()), largest, SEARCH_POINTS)])


def threshold_grid(search: Search, shares: tuple[float, ...] = TARGET_SHARES) -> list[float]:
    """Thresholds, rounded to three digits, at which about the given shares of the steps are computed; 0 for all."""
    computed = search.generation_means(search.computed(search.grid))
    thresholds = {0.0}
    for share in shares:
        reached = np.flatnonzero(computed <= share * search.num_steps)
        if len(reached):
            thresholds.add(float(f"{search.grid[reached[0]]:.3g}"))
    return sorted(thresholds)


def threshold_for_speedup(search: Search, speedup: float) -> float:
    """The smallest threshold at which the replay expects at least this speed-up of the denoiser.

    Computed steps need not fall evenly with the threshold: the first grid point that is fast enough is taken, and the
    interval before it halved towards it.

    Raises:
        Unreachable: If no threshold is that fast; names the best there is.
    """
    if not speedup >= 1:
        raise Unreachable(f"speed-up {speedup!r}: expected a number of 1 or more")
    expected = search.speedup(search.grid)
    reached = np.flatnonzero(expected >= speedup)
    if not len(reached):
        raise Unreachable(
            f"speed-up {speedup:g} is out of reach: at most {expected.max():.2f} on this log; "
            "lift max_skips or use fewer steps"
        )
    high = search.grid[reached[0]]
    low = search.grid[max(reached[0] - 1, 0)]
    for _ in range(30):  # to 1e-9 of the interval
        middle = (low + high) / 2
        low, high = (low, middle) if search.speedup(middle) >= speedup else (middle, high)
    return float(high)


def _drive(gate: Gate, own: Trajectory) -> BranchStats:
    stats = BranchStats()
    for step, x in enumerate(own.x.tolist()):
        stats.add(gate.step(x if step else None, step=step, num_steps=own.num_steps))
    return stats
