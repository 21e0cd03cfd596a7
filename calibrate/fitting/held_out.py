"""How good a fit is: figures on pairs it has not seen, against predictors that need no signal at all.

Held-out figures leave whole prompts out, over all their seeds, branches and experts, because pairs of one prompt are
not independent. A held-out x outside the fitted range is clamped to it, as the runtime does from below.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from calibrate.fitting.least_squares import FitResult, fit_constrained, fit_polynomial
from calibrate.runs.pairs import SIGNAL_COLUMNS, TARGET_COLUMNS, Run

FOLDS = 10
# What a predictor may know that does not look at the signal: the moment.
SCHEDULE = ["expert", "branch", "num_steps", "step"]
FITTERS: dict[str, Callable[..., FitResult]] = {
    "polyfit": fit_polynomial,
    "constrained": fit_constrained,
}

Predictor = Callable[[pd.DataFrame], np.ndarray]
Fitter = Callable[[pd.DataFrame], Predictor]
Figures = dict[str, float | None]


def r2(y: np.ndarray, predicted: np.ndarray) -> float | None:
    """Share of variance explained, negative where worse than the mean; None for constant y."""
    if len(y) == 0 or np.ptp(y) == 0:
        return None
    return 1.0 - float(np.sum((y - predicted) ** 2)) / float(np.sum((y - np.mean(y)) ** 2))


def rmse(y: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean square error, in units of y (relative L1 change)."""
    return float(np.sqrt(np.mean((y - predicted) ** 2)))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None where one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def polynomial_predictor(
    train: pd.DataFrame, degree: int = 4, method: str = "polyfit"
) -> Predictor:
    """A fit of the given method on the training pairs."""
    result = FITTERS[method](train["x"].to_numpy(), train["y"].to_numpy(), degree)
    return lambda pairs: result.within_domain(pairs["x"].to_numpy())


def constant_predictor(train: pd.DataFrame) -> Predictor:
    """The mean change, whatever the step: uniform skipping."""
    mean = float(train["y"].mean())
    return lambda pairs: np.full(len(pairs), mean)


def step_mean_predictor(train: pd.DataFrame, use_x: bool = False) -> Predictor:
    """The mean change at each moment of the schedule, as a fixed plan knows it.

    ``use_x`` adds one slope on how far x lies from its own mean at that moment.
    """
    by_moment = train.groupby("moment")[["x", "y"]]
    means = by_moment.mean()
    overall = float(train["y"].mean())
    distance = train[["x", "y"]] - by_moment.transform("mean")
    spread = float(distance["x"] @ distance["x"])
    slope = float(distance["x"] @ distance["y"]) / spread if use_x and spread > 0 else 0.0

    def predict(pairs: pd.DataFrame) -> np.ndarray:
        known = means.reindex(pairs["moment"])
        off_mean = pairs["x"].to_numpy() - known["x"].to_numpy()
        return known["y"].fillna(overall).to_numpy() + slope * np.nan_to_num(off_mean)

    return predict


RIVALS: dict[str, Fitter] = {
    "constant": constant_predictor,
    "step_mean": step_mean_predictor,
    "step_mean_and_x": partial(step_mean_predictor, use_x=True),
}


def prompt_folds(prompts: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Fold of every row: prompts in sorted order are dealt out in turn, so that sets sorted by kind spread evenly."""
    unique, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    return index % min(folds, len(unique))


def held_out(pairs: pd.DataFrame, fitter: Fitter, folds: int = FOLDS) -> np.ndarray | None:
    """Prediction for every pair by a predictor that has not seen its prompt; None with fewer than two prompts."""
    fold = prompt_folds(pairs["prompt_id"].to_numpy(), folds)
    if len(fold) == 0 or fold.max() == 0:
        return None
    predicted = np.empty(len(pairs))
    for number in range(fold.max() + 1):
        test = fold == number
        predicted[test] = fitter(pairs[~test])(pairs[test])
    return predicted


def figures(pairs: pd.DataFrame, result: FitResult) -> Figures:
    """Figures of a fit on its own pairs (columns x and y), in-sample and held out; None where not computable."""
    y = pairs["y"].to_numpy()
    refit = partial(polynomial_predictor, degree=result.degree, method=result.method)
    in_sample = result(pairs["x"].to_numpy())
    unseen = held_out(pairs[["prompt_id", "x", "y"]], refit)
    known = _agreement(y, in_sample) | {"spearman": spearman(in_sample, y)}
    known |= _agreement(y, unseen, "_held_out")
    return known | {"spearman_held_out": None if unseen is None else spearman(unseen, y)}


def rival_figures(pairs: pd.DataFrame) -> Figures:
    """Held-out figures of what needs no polynomial, for comparison, and whether x says more than the schedule does.

    ``*_constant`` is the mean, ``*_step_mean`` the mean of each step, ``*_step_mean_and_x`` the latter with one slope
    on x. ``spearman_within_step`` is :func:`spearman_within_step` with its interval.
    """
    y = pairs["y"].to_numpy()
    known: Figures = {"y_mean": float(pairs["y"].mean())}
    narrow = pairs[["prompt_id", "x", "y"]].assign(moment=pairs.groupby(SCHEDULE).ngroup())
    for name, fitter in RIVALS.items():
        known |= _agreement(y, held_out(narrow, fitter), f"_{name}")
    names = ("spearman_within_step", "spearman_within_step_low", "spearman_within_step_high")
    return known | dict(zip(names, spearman_within_step(pairs), strict=True))


def spearman_within_step(pairs: pd.DataFrame) -> tuple[float | None, float | None, float | None]:
    """Rank correlation of x and y within the steps of the schedule, pooled, with its 95 % interval over prompts.

    The interval is the jackknife's: each prompt left out in turn and the rest ranked anew, Student's t.
    """
    table = pairs.pivot(index=SCHEDULE, columns=["prompt_id", "seed"], values=["x", "y"])
    x, y = table["x"].to_numpy(float), table["y"].to_numpy(float)
    prompt_of = table["x"].columns.get_level_values("prompt_id").to_numpy(dtype=str)
    prompts = np.unique(prompt_of)
    value = _pooled_rank_correlation(x, y)
    if value is None or len(prompts) < 3:
        return value, None, None
    others = [prompt_of != prompt for prompt in prompts]
    left_out = [_pooled_rank_correlation(x[:, kept], y[:, kept]) for kept in others]
    if None in left_out:
        return value, None, None
    error = np.sqrt((len(prompts) - 1) * np.var(np.array(left_out, float)))
    low, high = stats.t.interval(0.95, len(prompts) - 1, value, error) if error else (value, value)
    return value, max(float(low), -1.0), min(float(high), 1.0)


def compare_candidates(run: Run, degree: int = 4, expert: str = "transformer") -> pd.DataFrame:
    """Which signal predicts which target best: one row per signal, target and branch, best held-out R² first."""
    rows = []
    branches = run.branches(expert)
    choices = [(s, t, b) for s in SIGNAL_COLUMNS for t in TARGET_COLUMNS for b in branches]
    for signal, target, branch in choices:
        pairs = run.pairs(signal, target, expert, branch)
        if pairs.empty:
            continue
        x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
        unseen = held_out(pairs, partial(polynomial_predictor, degree=degree))
        row = {"signal": signal, "target": target, "branch": branch, "pairs": len(pairs)}
        row["r2"] = r2(y, fit_polynomial(x, y, degree)(x))
        row["r2_held_out"] = None if unseen is None else r2(y, unseen)
        row["spearman"] = spearman(x, y)
        row["spearman_within_step"] = spearman_within_step(pairs)[0]
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.sort_values("r2_held_out", ascending=False, kind="stable", ignore_index=True)


def compare_branches(pairs: pd.DataFrame, degree: int = 4, method: str = "polyfit") -> pd.DataFrame:
    """What pooling costs: held-out figures on each branch of its own fit, of the pooled fit and of the other branch's.

    Columns: branch (whose pairs), fitted_on, r2_held_out, rmse_held_out.
    """
    pairs = pairs[["prompt_id", "branch", "x", "y"]]
    branch_of, y = pairs["branch"].to_numpy(), pairs["y"].to_numpy()
    branches = sorted(set(branch_of), key=lambda branch: (branch != "cond", branch))
    rows = []
    for source in [*branches, "pooled"] if len(branches) > 1 else branches:
        unseen = held_out(pairs, partial(_branch_predictor, source, degree, method))
        for branch in branches:
            own = branch_of == branch
            known = _agreement(y[own], None if unseen is None else unseen[own], "_held_out")
            rows.append({"branch": branch, "fitted_on": source, **known})
    return pd.DataFrame(rows).sort_values("branch", kind="stable", ignore_index=True)


def learning_curve(
    pairs: pd.DataFrame,
    degree: int = 4,
    method: str = "polyfit",
    repeats: int = 20,
    tolerance: float = 0.05,
) -> tuple[pd.DataFrame, int | None]:
    """Held-out error against the number of fitted prompts, and after how many it stops falling.

    A quarter of the prompts, drawn anew for each repeat with a fixed seed, is never fitted. The number is the smallest
    whose mean error lies within ``tolerance`` of the largest number's; None where more prompts would still help or
    there are fewer than four.

    Returns:
        Table with columns prompts, rmse (mean), low, high (10th and 90th percentile over repeats).
    """
    prompts, index = np.unique(pairs["prompt_id"].to_numpy(dtype=str), return_inverse=True)
    if len(prompts) < 4:
        return pd.DataFrame(columns=["prompts", "rmse", "low", "high"]), None
    largest = len(prompts) - max(1, len(prompts) // 4)
    sizes = sorted({*(2**power for power in range(12) if 2**power < largest), largest})
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    random = np.random.default_rng(0)
    errors = np.empty((repeats, len(sizes)))
    for repeat in range(repeats):
        rank = random.permutation(len(prompts))[index]
        test = rank >= largest
        for position, size in enumerate(sizes):
            train = rank < size
            result = FITTERS[method](x[train], y[train], degree)
            errors[repeat, position] = rmse(y[test], result.within_domain(x[test]))
    means = errors.mean(axis=0)
    low, high = np.quantile(errors, [0.1, 0.9], axis=0)
    table = pd.DataFrame({"prompts": sizes, "rmse": means, "low": low, "high": high})
    enough = sizes[int(np.argmax(means <= (1 + tolerance) * means[-1]))]
    return table, enough if enough < largest else None


def _agreement(y: np.ndarray, predicted: np.ndarray | None, suffix: str = "") -> Figures:
    """R² and RMSE of predictions, None without any."""
    if predicted is None:
        return {f"r2{suffix}": None, f"rmse{suffix}": None}
    return {f"r2{suffix}": r2(y, predicted), f"rmse{suffix}": rmse(y, predicted)}


def _branch_predictor(branch: str, degree: int, method: str, train: pd.DataFrame) -> Predictor:
    """The fit of one branch's training pairs, or of all with the branch ``pooled``."""
    own = train if branch == "pooled" else train[train["branch"] == branch]
    if own.empty:  # a branch that only the held-out prompts have
        return lambda test: np.full(len(test), np.nan)
    return polynomial_predictor(own, degree, method)


def _pooled_rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of ranks along axis 1, centred within each row, over all rows; NaN marks missing pairs."""
    rows = np.isfinite(x).sum(axis=1) >= 2
    if not rows.any():
        return None
    a, b = (stats.rankdata(values[rows], axis=1, nan_policy="omit") for values in (x, y))
    a, b = a - np.nanmean(a, axis=1, keepdims=True), b - np.nanmean(b, axis=1, keepdims=True)
    spread = np.sqrt(np.nansum(a * a) * np.nansum(b * b))
    return float(np.nansum(a * b) / spread) if spread > 0 else None
