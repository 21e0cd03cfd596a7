"""Replay: drive the gate over recorded trajectories, for any threshold, without the model.

What it says holds as long as skipping does not change the signal itself (an open-loop replay); `calibrate verify`
measures how far real cached runs drift from it.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from calibrate.errors import CalibrateError, InvalidOption
from calibrate.runs.pairs import SIGNAL_COLUMNS, TRAJECTORY, Run, column_of
from coeffs import Entry, Polynomial
from runtime.decide.gate import Gate, GateConfig
from runtime.stats import BranchStats

TARGET_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
SEARCH_POINTS = 400

Key = tuple[str, str]  # expert, branch
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


def trajectories(run: Run, signal: str = "modulated_input") -> list[Trajectory]:
    """All recorded trajectories, excluded rows as NaN; the first step has no pair and no x (NaN at index 0)."""
    values = run.rows[column_of(signal, SIGNAL_COLUMNS, "signal")].to_numpy()
    steps = run.rows["step"].to_numpy()
    found = []
    for (prompt, seed, expert, branch), rows in run.rows.groupby(
        TRAJECTORY, sort=True
    ).indices.items():
        # A second expert's steps may be counted on from the first's: its own first step lies before its first pair.
        start = int(steps[rows].min()) - 1
        x = np.full(int(steps[rows].max()) - start + 1, np.nan)
        x[steps[rows] - start] = values[rows]
        found.append(Trajectory(str(prompt), int(seed), str(expert), str(branch), len(x), x))
    return found


def leaders(recorded: list[Trajectory]) -> list[Trajectory]:
    """Of each generation of an expert the trajectory whose decisions all branches follow.

    The runtime lets the branch that is called first at a step decide: ``cond`` in the pipelines that name branches,
    else the one that was numbered first.
    """
    first: dict[tuple, Trajectory] = {}
    for one in recorded:
        generation = one.prompt_id, one.seed, one.expert
        best = first.get(generation)
        if best is None or (one.branch != "cond", one.branch) < (
            best.branch != "cond",
            best.branch,
        ):
            first[generation] = one
    return list(first.values())


def polynomials(entry: Entry, run: Run, policy: str = "per_branch") -> dict[Key, Polynomial]:
    """The polynomial each branch of the run is gated with.

    ``per_branch``: each branch's own, as the runtime applies the entry; ``recommended``: one for all branches of an
    expert, as engines with a single slot do; any other name: the fit of that branch for all.
    """
    found = {}
    # All recorded trajectories are replayed, those without a single usable pair too.
    for expert, branch in run.rows[["expert", "branch"]].drop_duplicates().itertuples(index=False):
        known = entry.experts[expert].branches if expert in entry.experts else {}
        if policy not in ("per_branch", "recommended", *known):
            raise InvalidOption(
                f"no fit of branch {policy!r} in {entry.label}: expected one of {', '.join(known)}"
            )
        chosen = {"per_branch": branch, "recommended": None}.get(policy, policy)
        found[expert, branch] = entry.fit(expert, chosen).polynomial(entry.sign_rule)
    return found


def replay(
    run: Run,
    of_branch: Mapping[Key, Polynomial],
    thresholds: list[float],
    config: GateConfig = DEFAULT_CONFIG,
    signal: str = "modulated_input",
    branches: str = "together",
) -> pd.DataFrame:
    """The gate's decisions on every trajectory: one row per threshold and trajectory.

    ``branches`` as in :func:`runtime.apply_tea_cache`: ``together`` (one decides for all) or ``apart``.
    Columns: threshold, prompt_id, seed, expert, branch, num_steps, computed, pattern ("CCSC...").
    """
    recorded, rows = trajectories(run, signal), []
    leading = {(one.prompt_id, one.seed, one.expert): one for one in leaders(recorded)}
    for threshold in thresholds:
        settings = replace(config, threshold=float(threshold))
        for one in recorded:
            leader = leading[one.prompt_id, one.seed, one.expert] if branches == "together" else one
            leader = leader if leader.num_steps == one.num_steps else one
            stats = _drive(Gate(of_branch[leader.key], settings), leader)
            rows.append(
                (
                    threshold,
                    one.prompt_id,
                    one.seed,
                    *one.key,
                    one.num_steps,
                    stats.computed,
                    stats.pattern,
                )
            )
    columns = [
        "threshold",
        "prompt_id",
        "seed",
        "expert",
        "branch",
        "num_steps",
        "computed",
        "pattern",
    ]
    return pd.DataFrame(rows, columns=columns)


def summarise(
    decisions: pd.DataFrame, timing: Mapping[str, tuple[float, float]] | None = None
) -> pd.DataFrame:
    """One row per threshold: computed steps, their range over prompts (``computed_low``, ``computed_high``), speed-up.

    Computed steps are those of one branch, averaged over branches and summed over experts. ``speedup`` is the
    denoiser's alone (text encoder and decoder come on top) from the measured seconds per call and per block stack;
    without timing it takes the stack as everything, an upper bound.
    """
    timing = timing or {}
    call = decisions["expert"].map(lambda expert: timing.get(expert, (1.0, 1.0))[0])
    stack = decisions["expert"].map(lambda expert: timing.get(expert, (1.0, 1.0))[1])
    skipped = decisions["num_steps"] - decisions["computed"]
    table = decisions.assign(full=call * decisions["num_steps"], saved=stack * skipped)
    generation = ["threshold", "prompt_id", "seed"]
    per_expert = table.groupby([*generation, "expert"], sort=False)[
        ["computed", "num_steps"]
    ].mean()
    by_threshold = per_expert.groupby(generation, sort=False).sum().groupby("threshold", sort=False)
    result = by_threshold["computed"].agg(
        computed_steps="mean", computed_low="min", computed_high="max"
    )
    result["num_steps"] = by_threshold["num_steps"].mean()
    full, saved = (
        table.groupby("threshold", sort=False)[column].sum() for column in ("full", "saved")
    )
    result["speedup"] = full / (full - saved).where(full > saved)
    return result.reset_index()


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
            self.recorded = leaders(self.recorded)
        self.timing = [run.timing.get(one.expert, (1.0, 1.0)) for one in self.recorded]
        self.config = config
        self.of_branch = of_branch
        shape = len(self.recorded), max(one.num_steps for one in self.recorded)
        self.x = np.full(shape, np.nan)
        self.valid = np.zeros(shape, bool)
        self.must_compute = np.zeros(shape, bool)
        self.predicted = np.zeros(shape)
        for row, one in enumerate(self.recorded):
            polynomial, steps = of_branch[one.key], range(one.num_steps)
            if config.compat:
                polynomial = replace(polynomial, domain=None)
            self.x[row, steps] = one.x
            self.valid[row, steps] = True
            self.must_compute[row, steps] = [
                step == 0
                or config.forced(step, one.num_steps)
                or not math.isfinite(x)
                or polynomial.above_domain(x)
                for step, x in enumerate(one.x.tolist())
            ]
            self.predicted[row, steps] = [
                0.0 if must else polynomial.predict(x)
                for must, x in zip(self.must_compute[row, steps], one.x.tolist(), strict=True)
            ]
        self.num_steps = self.generation_means(self.valid.sum(axis=1))

    def computed(self, thresholds: np.ndarray, predicted: np.ndarray | None = None) -> np.ndarray:
        """Computed steps, shape (..., trajectories), for thresholds of shape (...).

        ``predicted`` of shape (..., trajectories, steps) replaces the predictions, for refits.
        """
        thresholds = np.asarray(thresholds, float)[..., None]
        predicted = self.predicted if predicted is None else predicted
        cap = (
            self.config.max_skips if self.config.max_skips and not self.config.compat else math.inf
        )
        shape = np.broadcast_shapes(thresholds.shape, predicted.shape[:-1])
        accumulated, streak, computed = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
        for step in range(self.x.shape[1]):
            total = accumulated + predicted[..., step]
            skip = (
                (total < thresholds)
                & (thresholds > 0)
                & ~self.must_compute[:, step]
                & (streak < cap)
            )
            accumulated, streak = np.where(skip, total, 0.0), np.where(skip, streak + 1, 0)
            computed += ~skip & self.valid[:, step]
        return computed

    def generation_means(self, computed: np.ndarray) -> np.ndarray:
        """Mean over generations of the steps of one branch (mean of branches, sum of experts), shape (...)."""
        return computed @ self._shares.sum(axis=1) / self._generations.sum()

    def speedup(self, thresholds: np.ndarray) -> np.ndarray:
        """Expected speed-up of the denoiser at each threshold."""
        call, stack = np.array(self.timing).T
        steps = self.valid.sum(axis=1)
        saved = (steps - self.computed(thresholds)) @ stack
        full = float(steps @ call)
        return full / np.maximum(full - saved, 1e-12 * full)

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """0 and geometrically spaced thresholds up to where nothing is computed that need not be."""
        positive = self.predicted[self.predicted > 0]
        if not len(positive):
            return np.array([0.0, 1e-9])
        largest = 1.01 * float(self.predicted.sum(axis=1).max())
        return np.concatenate([[0.0], np.geomspace(float(positive.min()), largest, SEARCH_POINTS)])

    @functools.cached_property
    def prompts(self) -> list[str]:
        return sorted({one.prompt_id for one in self.recorded})

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        """Weight of each trajectory in its prompt's sum over generations, shape (trajectories, prompts)."""
        branches = Counter((one.prompt_id, one.seed, one.expert) for one in self.recorded)
        shares = np.zeros((len(self.recorded), len(self.prompts)))
        for row, one in enumerate(self.recorded):
            shares[row, self.prompts.index(one.prompt_id)] = (
                1 / branches[one.prompt_id, one.seed, one.expert]
            )
        return shares

    @functools.cached_property
    def _generations(self) -> np.ndarray:
        """Seeds per prompt."""
        generations = Counter(
            prompt for prompt, _ in {(one.prompt_id, one.seed) for one in self.recorded}
        )
        return np.array([generations[prompt] for prompt in self.prompts])

    def resampled_means(self, computed: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Means over resampled prompts: ``computed`` (resamples, trajectories), ``weights`` (resamples, prompts)."""
        return np.sum(computed @ self._shares * weights, axis=-1) / (weights @ self._generations)


def threshold_grid(search: Search, shares: tuple[float, ...] = TARGET_SHARES) -> list[float]:
    """Thresholds, rounded to three digits, at which about the given shares of the steps are computed; 0 for all."""
    computed = search.generation_means(search.computed(search.grid))
    found = {0.0}
    for share in shares:
        reached = np.flatnonzero(computed <= share * search.num_steps)
        if len(reached):
            found.add(float(f"{search.grid[reached[0]]:.3g}"))
    return sorted(found)


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
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if search.speedup(middle) >= speedup else (middle, high)
    return float(high)


def _drive(gate: Gate, one: Trajectory) -> BranchStats:
    stats = BranchStats()
    for step, x in enumerate(one.x.tolist()):
        stats.add(gate.step(x if step else None, step=step, num_steps=one.num_steps))
    return stats
