"""Figures of a fit: right by hand, never leaking a prompt, and honest about what the schedule alone would do."""

import numpy as np
import pytest
from analysis_data import make_frame
from scipy import stats

from calibrate.fitting.held_out import (
    by_polynomial,
    compare_candidates,
    figures,
    held_out,
    learning_curve,
    prompt_folds,
    r2,
    rival_figures,
    rmse,
    spearman,
    spearman_within_step,
)  # fmt: skip
from calibrate.fitting.least_squares import fit_polynomial
from calibrate.runs.pairs import load_run


def pairs_of(frame, **choice):
    return load_run(frame).pairs(**choice)


def schedule_only(seed=0, **arguments):
    """x and y both follow the schedule and differ between prompts, but independently of each other."""
    frame, random = make_frame(seed=seed, **arguments), np.random.default_rng(seed)
    trend = 0.05 + 0.2 * (frame["step"] / frame["num_steps"]) ** 2
    noise = random.normal(0, 0.01, (2, len(frame)))
    return frame.assign(x=trend + noise[0], y_output=trend**2 + noise[1])


def test_figures_by_hand():
    y = np.array([1.0, 2.0, 3.0, 6.0])
    assert (r2(y, y), r2(y, np.full(4, 3.0)), r2(np.ones(4), y)) == (1, 0, None)
    assert r2(y, y + 1) == pytest.approx(1 - 4 / 14) and r2(y, 100 * y) < -1000
    assert rmse(y, y + np.array([3, 4, 0, 0])) == 2.5
    assert spearman(y, y**3) == pytest.approx(1) and spearman(y, -y) == pytest.approx(-1)
    assert spearman(y, y * 0) is None
    a, b = np.random.default_rng(0).integers(0, 9, (2, 50)).astype(float)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_a_prompt_is_never_split_over_folds():
    pairs = pairs_of(
        make_frame(prompts=23, seeds=2, experts=("transformer", "transformer_2"))
    )
    folds = prompt_folds(pairs["prompt_id"].to_numpy())
    assert set(folds) == set(range(10))
    assert pairs.assign(fold=folds).groupby("prompt_id")["fold"].nunique().max() == 1
    assert (
        pairs.assign(fold=folds).groupby("fold")["prompt_id"].nunique().tolist()
        == [3, 3, 3] + [2] * 7
    )


def test_held_out_fits_never_see_their_prompts():
    """A predictor that remembers its training pairs must be useless on every held-out one."""
    pairs = pairs_of(make_frame(prompts=7, seeds=2))
    seen = []

    def predict(train, test):
        remembered = set(train["prompt_id"])
        seen.append(remembered & set(test["prompt_id"]))
        return np.where(test["prompt_id"].isin(remembered), test["y"], 0.0)

    assert (held_out(pairs, predict) == 0).all()
    assert len(seen) == 7 and not any(seen)


def test_held_out_predictions_are_those_of_a_fit_without_the_prompt():
    pairs = pairs_of(make_frame(prompts=4), branch="cond")
    unseen = held_out(pairs, lambda train, test: by_polynomial(train, test, 3))
    one, rest = (pairs[(pairs["prompt_id"] == "p02") == is_it] for is_it in (True, False))
    inside = np.clip(one["x"], rest["x"].min(), rest["x"].max())
    expected = np.polyval(np.polyfit(rest["x"], rest["y"], 3), inside)
    np.testing.assert_allclose(
        unseen[(pairs["prompt_id"] == "p02").to_numpy()], expected, rtol=1e-9
    )


def test_one_prompt_holds_nothing_out():
    pairs = pairs_of(make_frame(prompts=1), branch="cond")
    found = figures(
        pairs, fit_polynomial(pairs["x"].to_numpy(), pairs["y"].to_numpy(), 4)
    ) | rival_figures(pairs)
    assert found["r2"] > 0.9 and found["rmse"] > 0
    for name, value in found.items():
        assert name in ("r2", "rmse", "spearman", "y_mean") or value is None


def test_rivals_by_the_long_way():
    pairs = pairs_of(make_frame(prompts=6, seeds=2, noise=0.01), branch="cond")
    y, found = pairs["y"].to_numpy(), rival_figures(pairs)
    constant, by_step = np.empty((2, len(pairs)))
    for row, (prompt, step) in enumerate(zip(pairs["prompt_id"], pairs["step"], strict=True)):
        train = pairs[pairs["prompt_id"] != prompt]
        constant[row], by_step[row] = (
            train["y"].mean(),
            train.loc[train["step"] == step, "y"].mean(),
        )
    assert found["rmse_constant"] == pytest.approx(rmse(y, constant))
    assert found["rmse_step_mean"] == pytest.approx(rmse(y, by_step))
    assert found["r2_step_mean"] == pytest.approx(r2(y, by_step))


def test_step_means_know_the_branch():
    pairs = pairs_of(make_frame(prompts=6, noise=1e-6))
    assert (
        rival_figures(pairs)["r2_step_mean"]
        > 0.8
        > r2(pairs["y"], pairs.groupby("step")["y"].transform("mean"))
    )


def test_a_common_trend_is_no_evidence_for_x():
    """Pooled rank correlation is high by the schedule alone; within steps there must be nothing."""
    pairs = pairs_of(schedule_only(prompts=20, steps=30), branch="cond")
    assert spearman(pairs["x"], pairs["y"]) > 0.7
    value, low, high = spearman_within_step(pairs).values()
    assert low < 0 < high and abs(value) < 0.1


def test_x_that_knows_more_than_the_schedule_is_seen():
    pairs = pairs_of(make_frame(prompts=20, noise=0.002), branch="cond")
    value, low, high = spearman_within_step(pairs).values()
    assert 0.5 < low < value < high <= 1


def test_within_step_correlation_by_the_long_way_with_a_pair_missing():
    pairs = pairs_of(make_frame(prompts=5, seeds=2), branch="cond").drop(index=[3, 40])
    a, b = (
        pairs.groupby("step")[column].transform(
            lambda values: values.rank() - values.rank().mean()
        )
        for column in "xy"
    )
    value, low, high = spearman_within_step(pairs).values()
    assert value == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    assert low < value < high


def test_a_signal_that_is_the_same_for_all_prompts_has_no_rank_within_a_step():
    pairs = pairs_of(make_frame(prompts=5), signal="time_embedding", branch="cond")
    assert set(spearman_within_step(pairs).values()) == {None}


def test_the_jackknife_interval_covers():
    """Of independent x and y the truth is 0: the 95 % interval covers it in 90 to 99 % of 100 repetitions."""
    hits = 0
    for seed in range(100):
        _, low, high = spearman_within_step(schedule_only(seed, prompts=8, steps=8, branches=("cond",)).assign(
            y=lambda frame: frame["y_output"])).values()  # fmt: skip
        hits += low <= 0 <= high
    assert 90 <= hits <= 99


def test_candidates_are_ranked_by_held_out_figures():
    frame = make_frame(prompts=6, branches=("cond",), noise=1e-5)
    table = compare_candidates(load_run(frame))
    assert len(table) == 6
    assert table["r2_held_out"].is_monotonic_decreasing
    assert set(table["signal"][:3]) == {"modulated_input"} and set(table["target"]) == {
        "output",
        "hidden",
        "residual",
    }
    assert len(compare_candidates(load_run(frame.assign(x_time_embedding=np.nan)))) == 3


def test_the_learning_curve_says_when_it_is_enough():
    noisy = pairs_of(make_frame(prompts=24, steps=10, noise=0.01), branch="cond")
    table, enough = learning_curve(noisy)
    assert table["prompts"].tolist() == [1, 2, 4, 8, 16, 18]
    assert table["rmse"].iloc[0] > table["rmse"].iloc[-1]
    assert (table["low"] <= table["rmse"]).all() and (table["rmse"] <= table["high"]).all()
    assert enough in (4, 8, 16)
    pairs = pairs_of(make_frame(prompts=16, noise=1e-4), branch="cond")
    assert learning_curve(pairs, degree=3, tolerance=10.0)[1] == 1
    assert learning_curve(pairs_of(make_frame(prompts=3)))[1] is None
