"""Replay: the gate's rules over recorded trajectories, for any threshold, without the model.

What it says holds as long as skipping does not change the signal itself (an open-loop replay); `calibrate verify`
measures how far real cached runs drift from it.
"""

import functools
import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from calibrate.errors import CalibrateError
from calibrate.runs.pairs import SIGNAL_COLUMNS, TRAJECTORY, Run, column_of
from coeffs import Entry
from runtime.decide.gate import Gate, GateConfig

TARGET_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
SEARCH_POINTS = 400  # neighbours differ by 2 % where thresholds span three decades
GENERATION = ["prompt_id", "seed", "expert"]


class Unreachable(CalibrateError, ValueError):
    """A speed-up that no threshold gives on this log."""


def gate_config(entry: Entry) -> GateConfig:
    """The gate's settings as ``apply_tea_cache`` takes them; published sets decide as published."""
    return GateConfig(
        threshold=0.0,
        start=1 if entry.start is None else entry.start,
        end=1 if entry.end is None else entry.end,
        max_skips=entry.max_skips,
        compat=entry.status != "measured",
    )


class Search:
    """An entry's gate on a run's signals, for many thresholds at once (tested against the gate itself).

    ``branches`` as in :func:`runtime.apply_tea_cache`: ``together`` (one decides for all) or ``apart``.

    Attributes:
        trajectories: prompt_id, seed, expert, branch; ``leader``: the branch whose signal decides. With
            ``branches="together"`` it is the one that is called first at a step: ``cond`` in the pipelines that name
            branches, else the one that was numbered first.
        shares: How much of each generation (columns) a trajectory's steps are: the mean of its branches, the sum of
            its experts.
        x: The leaders' signals, (trajectories, steps); NaN where unusable, and at the first step, which has no pair.
        predicted: The changes predicted from them; NaN at steps that are computed at every threshold.
    """

    def __init__(self, run: Run, entry: Entry, branches: str = "together") -> None:
        self.config = config = gate_config(entry)
        column = column_of(entry.signal, SIGNAL_COLUMNS, "signal")
        groups = run.rows.groupby(TRAJECTORY)
        first, last = groups["step"].min(), groups["step"].max()
        keys, lengths = first.index.to_frame(index=False), (last - first).to_numpy() + 2
        # A second expert's steps may be counted on from the first's: its own first step lies before its first pair.
        trajectory = groups.ngroup().to_numpy()
        step = run.rows["step"].to_numpy() - first.to_numpy()[trajectory] + 1
        signals = np.full((len(keys), lengths.max()), np.nan)
        signals[trajectory, step] = run.rows[column]
        leader = np.arange(len(keys))
        if branches == "together":
            called = keys.assign(row=leader, later=keys["branch"] != "cond")
            of_generation = called.sort_values("later", kind="stable").groupby(GENERATION)
            leader = of_generation["row"].transform("first").sort_index().to_numpy()
        keys["leader"] = keys["branch"].to_numpy()[leader]
        self.trajectories, self.num_steps, self.x = keys, lengths[leader], signals[leader]

        self.predicted = np.full(self.x.shape, np.nan)
        for row, (expert, leader) in enumerate(
            zip(keys["expert"], keys["leader"], strict=True)
        ):
            own = entry.fit(expert, leader).polynomial(entry.sign_rule)
            polynomial = Gate(own, config).polynomial  # one that was published has no domain
            for step, x in enumerate(self.x[row]):
                forced = config.forced(step, int(self.num_steps[row]))
                if np.isfinite(x) and not forced and not polynomial.above_domain(x):
                    self.predicted[row, step] = polynomial.predict(x)

        self.seconds = np.array(
            [run.timing.get(expert, (1.0, 1.0)) for expert in keys["expert"]]
        )
        generation = keys.groupby(["prompt_id", "seed"])
        branches_each = keys.groupby(GENERATION)["branch"].transform("size")
        of_generation = pd.get_dummies(generation.ngroup())
        self.shares = of_generation.div(branches_each, axis=0).to_numpy()
        self.all_steps = float((self.num_steps @ self.shares).mean())
        prompts = [prompt for prompt, _ in generation.groups]
        self.prompts, self.prompt_of = np.unique(prompts, return_inverse=True)

    def skipped(
        self, thresholds: ArrayLike, predicted: np.ndarray | None = None
    ) -> np.ndarray:
        """Which steps are skipped, (..., trajectories, steps), at thresholds of shape (...).

        ``predicted`` of shape (..., trajectories, steps) replaces the predictions, for refits.
        """
        predicted = self.predicted if predicted is None else predicted
        limit = np.asarray(thresholds, float)[..., None]
        cap = math.inf if self.config.compat else self.config.max_skips or math.inf
        skipped = np.zeros(np.broadcast_shapes((*limit.shape, 1), predicted.shape), bool)
        accumulated = streak = np.zeros(skipped.shape[:-1])
        for step in range(self.x.shape[1]):
            accumulated = accumulated + predicted[..., step]
            skip = (limit > 0) & (streak < cap) & (accumulated < limit)
            accumulated = np.where(skip, accumulated, 0.0)
            streak = np.where(skip, streak + 1, 0)
            skipped[..., step] = skip
        return skipped

    def patterns(self, threshold: float) -> list[str]:
        """The decisions on every trajectory, such as "CCSC"."""
        letters = np.where(self.skipped(threshold), "S", "C")
        rows = zip(letters, self.num_steps, strict=True)
        return ["".join(row[:length]) for row, length in rows]

    def computed(
        self, thresholds: ArrayLike, predicted: np.ndarray | None = None
    ) -> np.ndarray:
        """Computed steps, shape (..., trajectories)."""
        return self.num_steps - self.skipped(thresholds, predicted).sum(axis=-1)

    def steps(self, thresholds: ArrayLike, predicted: np.ndarray | None = None) -> np.ndarray:
        """Computed steps of each generation, (..., generations)."""
        return self.computed(thresholds, predicted) @ self.shares

    def speedup(self, thresholds: ArrayLike) -> np.ndarray:
        """Expected speed-up of the denoiser; without timing the stack is everything, an upper bound."""
        call, stack = self.seconds.T
        full = self.num_steps @ call
        return full / (full - (self.num_steps - self.computed(thresholds)) @ stack)

    def summary(self, thresholds: ArrayLike) -> pd.DataFrame:
        """One row per threshold: computed steps, their range over generations, ``num_steps``, ``speedup``.

        The speed-up is the denoiser's alone (text encoder and decoder come on top), from the measured seconds per
        call and per block stack.
        """
        steps = self.steps(thresholds)
        return pd.DataFrame({
            "threshold": thresholds,
            "computed_steps": steps.mean(axis=1),
            "computed_low": steps.min(axis=1),
            "computed_high": steps.max(axis=1),
            "num_steps": self.all_steps,
            "speedup": self.speedup(thresholds),
        })  # fmt: skip

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """0 and geometrically spaced thresholds up to where nothing is computed that need not be."""
        positive = self.predicted[self.predicted > 0]
        if not len(positive):
            return np.array([0.0, 1e-9])
        largest = 1.01 * np.nansum(self.predicted, axis=1).max()
        return np.append(0.0, np.geomspace(positive.min(), largest, SEARCH_POINTS))


def threshold_grid(search: Search) -> list[float]:
    """Thresholds, rounded to three digits, at which about the target shares of the steps are computed; 0 for all."""
    computed = search.steps(search.grid).mean(axis=-1)
    thresholds = {0.0}
    for share in TARGET_SHARES:
        reached = search.grid[computed <= share * search.all_steps]
        thresholds.update(float(f"{threshold:.3g}") for threshold in reached[:1])
    return sorted(thresholds)


def threshold_for_speedup(search: Search, speedup: float) -> float:
    """The smallest threshold at which the replay expects at least this speed-up of the denoiser.

    Computed steps need not fall evenly with the threshold: the first grid point that is fast enough is taken, then the
    first of the points between it and the one before.

    Raises:
        Unreachable: If no threshold is that fast; names the best there is.
    """
    if not speedup >= 1:
        raise Unreachable(f"speed-up {speedup!r}: expected a number of 1 or more")
    expected = search.speedup(search.grid)
    if speedup > expected.max():
        raise Unreachable(
            f"speed-up {speedup:g} is out of reach: at most {expected.max():.2f} on this log; "
            "lift max_skips or use fewer steps"
        )
    before = max(int(np.argmax(expected >= speedup)) - 1, 0)
    low, high = search.grid[before : before + 2]
    between = np.linspace(low, high, SEARCH_POINTS)
    return float(between[np.argmax(search.speedup(between) >= speedup)])
