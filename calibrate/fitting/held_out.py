"""How good a fit is: figures on pairs it has not seen, against predictors that need no signal at all.

Held-out figures leave whole prompts out, over all their seeds, branches and experts, because pairs of one prompt are
not independent. A held-out x outside the fitted range is clamped to it, as the runtime does from below.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from calibrate.fitting.least_squares import FitResult, fit_polynomial
from calibrate.fitting.statistics import MIN_FOR_INTERVAL, quantile
from calibrate.runs.pairs import SIGNAL_COLUMNS, TARGET_COLUMNS, Run
from coeffs import Candidate

FOLDS = 10
REPEATS = (
    20  # draws of the learning curve: their mean moves by a fifth of the spread between draws
)
# What a predictor may know that does not look at the signal: the moment.
SCHEDULE = ["expert", "branch", "num_steps", "step"]

# Predicts y of the second pairs from the first.
Predictor = Callable[[pd.DataFrame, pd.DataFrame], np.ndarray]
Figures = dict[str, float | None]


def r2(y: np.ndarray, predicted: np.ndarray) -> float | None:
    """Share of variance explained, negative where worse than the mean; None for constant y."""
    return 1.0 - rmse(y, predicted) ** 2 / float(np.var(y)) if np.ptp(y) else None


def rmse(y: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean square error, in units of y (relative L1 change)."""
    return float(np.sqrt(np.mean((y - predicted) ** 2)))


def spearman(a: ArrayLike, b: ArrayLike, moment: ArrayLike = 0) -> float | None:
    """Rank correlation, of the ranks within each moment where given; None where one side is constant."""
    table = pd.DataFrame({"a": a, "b": b, "moment": moment})
    ranks = table.groupby("moment").rank()
    centred = ranks - ranks.groupby(table["moment"]).transform("mean")
    of_a, of_b = centred.to_numpy().T
    spread = np.sqrt((of_a @ of_a) * (of_b @ of_b))
    return float(of_a @ of_b / spread) if spread > 0 else None


def by_polynomial(
    train: pd.DataFrame, test: pd.DataFrame, degree: int = 4, method: str = "polyfit"
) -> np.ndarray:
    """Predictions of a fit on the training pairs."""
    return fit_polynomial(train["x"], train["y"], degree, method).within_domain(test["x"])


def by_moment(train: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    """The mean change at each ``moment`` of the schedule, as a fixed plan knows it."""
    means = train.groupby("moment")["y"].mean()
    return test["moment"].map(means).fillna(train["y"].mean()).to_numpy()


def prompt_folds(prompts: ArrayLike) -> np.ndarray:
    """Fold of every row: prompts in sorted order are dealt out in turn, so that sets sorted by kind spread evenly."""
    unique, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    return index % min(FOLDS, len(unique))


def held_out(pairs: pd.DataFrame, predict: Predictor) -> np.ndarray | None:
    """Prediction for every pair by a predictor that has not seen its prompt; None with fewer than two prompts."""
    fold = prompt_folds(pairs["prompt_id"])
    if fold.max() == 0:
        return None
    predicted = np.empty(len(pairs))
    for number in np.unique(fold):
        test = fold == number
        predicted[test] = predict(pairs[~test], pairs[test])
    return predicted


def refit(result: FitResult | Candidate) -> Predictor:
    """Predicts by fits that are made as this one was."""
    return partial(by_polynomial, degree=result.degree, method=result.method)


def figures(pairs: pd.DataFrame, result: FitResult) -> Figures:
    """Figures of a fit on its own pairs (columns x and y), in-sample and held out; None where not computable."""
    y, in_sample = pairs["y"].to_numpy(), result(pairs["x"])
    unseen = held_out(pairs, refit(result))
    known = _agreement(y, in_sample) | {"spearman": spearman(in_sample, y)}
    known |= _agreement(y, unseen, "_held_out")
    return known | {"spearman_held_out": None if unseen is None else spearman(unseen, y)}


def rival_figures(pairs: pd.DataFrame) -> Figures:
    """Held-out figures of what needs no polynomial, for comparison, and whether x says more than the schedule does.

    ``*_constant`` is the mean, ``*_step_mean`` the mean of each step. ``spearman_within_step`` is
    :func:`spearman_within_step` with its interval.
    """
    known: Figures = {}
    rivals = {"constant": 0, "step_mean": _moments(pairs)}
    for name, moment in rivals.items():
        unseen = held_out(pairs.assign(moment=moment), by_moment)
        known |= _agreement(pairs["y"].to_numpy(), unseen, f"_{name}")
    return known | spearman_within_step(pairs)


def spearman_within_step(pairs: pd.DataFrame) -> Figures:
    """Rank correlation of x and y within the steps of the schedule, pooled, with its 95 % interval over prompts.

    The interval is the jackknife's: each prompt left out in turn and the rest ranked anew, Student's t.
    """
    columns = pairs["x"], pairs["y"], _moments(pairs)
    value, left_out, low, high = spearman(*columns), [], None, None
    for prompt in pairs["prompt_id"].unique():
        others = pairs["prompt_id"] != prompt
        left_out.append(spearman(*(column[others] for column in columns)))
    count = len(left_out)
    if count >= MIN_FOR_INTERVAL and value is not None and None not in left_out:
        error = np.sqrt((count - 1) * np.var(np.array(left_out, float)))
        half = quantile(count) * float(error)
        low, high = max(value - half, -1.0), min(value + half, 1.0)
    return {
        "spearman_within_step": value,
        "spearman_within_step_low": low,
        "spearman_within_step_high": high,
    }


def compare_candidates(
    run: Run, degree: int = 4, expert: str = "transformer"
) -> pd.DataFrame:
    """Which signal predicts which target best: one row per signal, target and branch, best held-out R² first."""
    rows = []
    for signal, target, branch in product(
        SIGNAL_COLUMNS, TARGET_COLUMNS, run.branches(expert)
    ):
        pairs = run.pairs(signal, target, expert, branch)
        if pairs.empty:
            continue
        x, y = pairs["x"], pairs["y"]
        known = figures(pairs, fit_polynomial(x, y, degree))
        rows.append({
            "signal": signal,
            "target": target,
            "branch": branch,
            "pairs": len(pairs),
            "r2": known["r2"],
            "r2_held_out": known["r2_held_out"],
            "spearman_within_step": spearman(x, y, _moments(pairs)),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    return table.sort_values("r2_held_out", ascending=False, kind="stable", ignore_index=True)


def learning_curve(
    pairs: pd.DataFrame, degree: int = 4, method: str = "polyfit", tolerance: float = 0.05
) -> tuple[pd.DataFrame, int | None]:
    """Held-out error against the number of fitted prompts, and after how many it stops falling.

    A quarter of the prompts, drawn anew for each repeat with a fixed seed, is never fitted. The number is the smallest
    whose mean error lies within ``tolerance`` of the largest number's; None where more prompts would still help or
    there are fewer than four.

    Returns:
        Table with columns prompts, rmse (mean), low, high (10th and 90th percentile over repeats).
    """
    prompts, index = np.unique(pairs["prompt_id"].to_numpy(str), return_inverse=True)
    if len(prompts) < 4:
        return pd.DataFrame(columns=["prompts", "rmse", "low", "high"]), None
    largest = len(prompts) - len(prompts) // 4
    sizes = [*(2 ** np.arange(np.ceil(np.log2(largest)), dtype=int)), largest]
    random, errors = np.random.default_rng(0), np.empty((REPEATS, len(sizes)))
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    for draw in errors:
        rank = random.permutation(len(prompts))[index]
        test = rank >= largest
        for place, size in enumerate(sizes):
            fitted = fit_polynomial(x[rank < size], y[rank < size], degree, method)
            draw[place] = rmse(y[test], fitted.within_domain(x[test]))
    means, (low, high) = errors.mean(axis=0), np.quantile(errors, [0.1, 0.9], axis=0)
    table = pd.DataFrame({"prompts": sizes, "rmse": means, "low": low, "high": high})
    enough = int(sizes[np.argmax(means <= (1 + tolerance) * means[-1])])
    return table, enough if enough < largest else None


def _moments(pairs: pd.DataFrame) -> pd.Series:
    """The moment of the schedule that each pair belongs to, as a number."""
    return pairs.groupby(SCHEDULE).ngroup()


def _agreement(y: np.ndarray, predicted: np.ndarray | None, suffix: str = "") -> Figures:
    """R² and RMSE of predictions, None without any."""
    if predicted is None:
        return {f"r2{suffix}": None, f"rmse{suffix}": None}
    return {f"r2{suffix}": r2(y, predicted), f"rmse{suffix}": rmse(y, predicted)}
