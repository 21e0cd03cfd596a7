"""How good a fit is: figures on pairs it has not seen, against predictors that need no signal at all.

Held-out figures leave whole prompts out, over all their seeds, branches and experts, because pairs of one prompt are
not independent. A held-out x outside the fitted range is clamped to it, as the runtime does from below.
"""

from collections.abc import Callable

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


def r2(y: np.ndarray, predicted: np.ndarray) -> float | None:
    """Share of variance explained, negative without limit for predictions worse than the mean; None for constant y."""
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


def step_mean_predictor(train: pd.DataFrame) -> Predictor:
    """The mean change at each moment of the schedule: a fixed plan. Knows branch and step, not x."""
    means, overall = train.groupby("moment")["y"].mean(), float(train["y"].mean())
    return lambda pairs: _at_moment(means, pairs, overall)


def step_mean_and_x_predictor(train: pd.DataFrame) -> Predictor:
    """The moment's mean plus one slope on how far x lies from its own mean then."""
    by_step = train.groupby("moment")
    dx = (train["x"] - by_step["x"].transform("mean")).to_numpy()
    dy = (train["y"] - by_step["y"].transform("mean")).to_numpy()
    spread = float(dx @ dx)
    slope = float(dx @ dy) / spread if spread > 0 else 0.0
    mean_x, mean_y, overall = by_step["x"].mean(), by_step["y"].mean(), float(train["y"].mean())
    return lambda pairs: (
        _at_moment(mean_y, pairs, overall)
        + slope * (pairs["x"].to_numpy() - _at_moment(mean_x, pairs, pairs["x"].to_numpy()))
    )


RIVALS: dict[str, Fitter] = {
    "constant": constant_predictor,
    "step_mean": step_mean_predictor,
    "step_mean_and_x": step_mean_and_x_predictor,
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


def figures(pairs: pd.DataFrame, result: FitResult) -> dict[str, float | None]:
    """Figures of one fit on its own pairs (columns x and y), in-sample and held out; None where not computable."""
    x, y = pairs["x"].to_numpy(), pairs["y"].to_numpy()
    fitted = result(x)
    unseen = held_out(
        pairs[["prompt_id", "x", "y"]],
        lambda train: polynomial_predictor(train, result.degree, result.method),
    )
    return {
        "r2": r2(y, fitted),
        "rmse": rmse(y, fitted),
        "spearman": spearman(fitted, y),
        "r2_held_out": None if unseen is None else r2(y, unseen),
        "rmse_held_out": None if unseen is None else rmse(y, unseen),
        "spearman_held_out": None if unseen is None else spearman(unseen, y),
    }


def rival_figures(pairs: pd.DataFrame) -> dict[str, float | None]:
    """Held-out figures of what needs no polynomial, for comparison, and whether x says more than the schedule does.

    ``*_constant`` is the mean, ``*_step_mean`` the mean of each step, ``*_step_mean_and_x`` the latter with one slope
    on x. ``spearman_within_step`` is :func:`spearman_within_step` with its interval.
    """
    y, found = pairs["y"].to_numpy(), {"y_mean": float(pairs["y"].mean())}
    narrow = pairs[["prompt_id", "x", "y"]].assign(moment=pairs.groupby(SCHEDULE).ngroup())
    for name, fitter in RIVALS.items():
        unseen = held_out(narrow, fitter)
        found[f"r2_{name}"] = None if unseen is None else r2(y, unseen)
        found[f"rmse_{name}"] = None if unseen is None else rmse(y, unseen)
    names = ("spearman_within_step", "spearman_within_step_low", "spearman_within_step_high")
    return found | dict(zip(names, spearman_within_step(pairs), strict=True))


def spearman_within_step(pairs: pd.DataFrame) -> tuple[float | None, float | None, float | None]:
    """Rank correlation of x and y within the steps of the schedule, pooled, with its 95 % interval over prompts.

    The interval is the jackknife's: each prompt left out in turn and the rest ranked anew, Student's t.
    """
    table = pairs.pivot(index=SCHEDULE, columns=["prompt_id", "seed"], values=["x", "y"])
    x, y = table["x"].to_numpy(float), table["y"].to_numpy(float)
    prompt_of = np.array([prompt for prompt, _ in table["x"].columns], dtype=str)
    value = _pooled_rank_correlation(x, y)
    prompts = np.unique(prompt_of)
    if value is None or len(prompts) < 3:
        return value, None, None
    left_out = [
        _pooled_rank_correlation(x[:, prompt_of != prompt], y[:, prompt_of != prompt])
        for prompt in prompts
    ]
    if any(one is None for one in left_out):
        return value, None, None
    count = len(prompts)
    error = np.sqrt((count - 1) / count * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    half = float(stats.t.ppf(0.975, count - 1) * error)
    return value, max(value - half, -1.0), min(value + half, 1.0)


def compare_candidates(run: Run, degree: int = 4, expert: str = "transformer") -> pd.DataFrame:
    """Which signal predicts which target best: one row per signal, target and branch, best held-out R² first."""
    rows = []
    for signal in SIGNAL_COLUMNS:
        for target in TARGET_COLUMNS:
            for branch in run.branches(expert):
                pairs = run.pairs(signal, target, expert, branch)
                if pairs.empty:
                    continue
                y = pairs["y"].to_numpy()
                result = fit_polynomial(pairs["x"].to_numpy(), y, degree)
                unseen = held_out(pairs, lambda train: polynomial_predictor(train, degree))
                rows.append({
                    "signal": signal, "target": target, "branch": branch, "pairs": len(pairs),
                    "r2": r2(y, result(pairs["x"].to_numpy())),
                    "r2_held_out": None if unseen is None else r2(y, unseen),
                    "spearman": spearman(pairs["x"].to_numpy(), y),
                    "spearman_within_step": spearman_within_step(pairs)[0],
                })  # fmt: skip
    table = pd.DataFrame(rows)
    return table.sort_values("r2_held_out", ascending=False, kind="stable", ignore_index=True)


def compare_branches(pairs: pd.DataFrame, degree: int = 4, method: str = "polyfit") -> pd.DataFrame:
    """What pooling costs: held-out figures on each branch of its own fit, of the pooled fit and of the other branch's.

    Columns: branch (whose pairs), fitted_on, r2_held_out, rmse_held_out.
    """
    branches = sorted(pairs["branch"].unique(), key=lambda branch: (branch != "cond", branch))
    pairs = pairs[["prompt_id", "branch", "x", "y"]]
    sources = [*branches, "pooled"] if len(branches) > 1 else branches
    rows = []
    for source in sources:

        def fitter(train: pd.DataFrame, source: str = source) -> Predictor:
            chosen = train if source == "pooled" else train[train["branch"] == source]
            if chosen.empty:  # a branch that only the held-out prompts have
                return lambda test: np.full(len(test), np.nan)
            return polynomial_predictor(chosen, degree, method)

        unseen = held_out(pairs, fitter)
        for branch in branches:
            on = (pairs["branch"] == branch).to_numpy()
            y = pairs["y"].to_numpy()[on]
            rows.append({
                "branch": branch, "fitted_on": source,
                "r2_held_out": None if unseen is None else r2(y, unseen[on]),
                "rmse_held_out": None if unseen is None else rmse(y, unseen[on]),
            })  # fmt: skip
    return pd.DataFrame(rows).sort_values("branch", kind="stable", ignore_index=True)


def learning_curve(
    pairs: pd.DataFrame,
    degree: int = 4,
    method: str = "polyfit",
    repeats: int = 20,
    tolerance: float = 0.05,
) -> tuple[pd.DataFrame, int | None]:
    """Held-out error against the number of fitted prompts, and how many are enough.

    A quarter of the prompts, drawn anew for each repeat with a fixed seed, is never fitted. Enough is the smallest
    number whose mean error lies within ``tolerance`` of the largest number's; None where only the largest does (more
    prompts would still help) or there are fewer than four prompts.

    Returns:
        Table with columns prompts, rmse (mean), low, high (10th and 90th percentile over repeats).
    """
    prompts, index = np.unique(pairs["prompt_id"].to_numpy(dtype=str), return_inverse=True)
    columns = ["prompts", "rmse", "low", "high"]
    if len(prompts) < 4:
        return pd.DataFrame(columns=columns), None
    unseen = max(1, len(prompts) // 4)
    largest = len(prompts) - unseen
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
    table = pd.DataFrame(dict(zip(columns, (sizes, means, low, high), strict=True)))
    enough = sizes[int(np.argmax(means <= (1 + tolerance) * means[-1]))]
    return table, enough if enough < largest else None


def _at_moment(means: pd.Series, pairs: pd.DataFrame, otherwise: float | np.ndarray) -> np.ndarray:
    found = means.reindex(pairs["moment"]).to_numpy(float)
    return np.where(np.isfinite(found), found, otherwise)


def _pooled_rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of ranks along axis 1, centred within each row, over all rows; NaN marks missing pairs."""
    rows = np.isfinite(x).sum(axis=1) >= 2
    if not rows.any():
        return None
    a, b = (stats.rankdata(values[rows], axis=1, nan_policy="omit") for values in (x, y))
    a, b = a - np.nanmean(a, axis=1, keepdims=True), b - np.nanmean(b, axis=1, keepdims=True)
    spread = np.sqrt(np.nansum(a * a) * np.nansum(b * b))
    return float(np.nansum(a * b) / spread) if spread > 0 else None
