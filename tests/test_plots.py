"""Plots draw what they are given, on a given axis or on one of their own, without pyplot's global state."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from calibrate import plot_style, plots
from coeffs.polynomial import Polynomial


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    sigma = np.tile(np.linspace(1, 0.1, 10), 6)
    x = 0.02 + 0.03 * (sigma - 0.5) ** 2 + 0.002 * rng.random(60)
    return pd.DataFrame({"x": x, "y": 2 * x + 0.01, "sigma": sigma, "branch": ["cond", "uncond"] * 30})


FIT = Polynomial((2.0, 0.01), (0.02, 0.03))
SUMMARY = pd.DataFrame(
    {
        "policy": ["fitted gate", "fitted gate", "uniform skipping"],
        "computed_steps": [14.0, 7.0, 14.0],
        "psnr_db": [30.0, 25.0, np.inf],
        "psnr_db_low": [29.0, 24.0, np.inf],
        "psnr_db_high": [31.0, 26.0, np.inf],
    }
)
IMAGE = np.linspace(0, 1, 16 * 16 * 3).reshape(16, 16, 3)
REPLAY = pd.DataFrame(
    {"threshold": [0.2, 0.0], "computed_steps": [5, 10], "computed_low": [4, 10], "computed_high": [6, 10]}
)
LEARNING = pd.DataFrame(
    {"prompts": [1, 2, 4], "rmse": [0.3, 0.2, 0.1], "low": [0.2, 0.1, 0.1], "high": [0.4, 0.3, 0.2]}
)
CALLS = {
    "pairs_with_fit": lambda pairs, ax: plots.pairs_with_fit(pairs, {"cond": FIT, "uncond": FIT}, ax=ax),
    "curves": lambda _, ax: plots.curves({"ours": FIT, "theirs": Polynomial((1.0, 0.0), sign_rule="signed")}, ax),
    "residuals": lambda pairs, ax: plots.residuals(pairs, FIT, ax),
    "residuals over x": lambda pairs, ax: plots.residuals(pairs, FIT, ax, over="x"),
    "over_sigma": lambda pairs, ax: plots.over_sigma(pairs, "y", ax),
    "replay_curve": lambda _, ax: plots.replay_curve(REPLAY, ax, verified=REPLAY),
    "pareto": lambda _, ax: plots.pareto(SUMMARY, ax),
    "learning_curve": lambda _, ax: plots.learning_curve(LEARNING, ax),
    "step_patterns": lambda _, ax: plots.step_patterns({"replayed": "CCS", "closed loop": "CSC"}, ax),
    "sample_grid": lambda _, ax: plots.sample_grid([("3", IMAGE, IMAGE * 0.9)], ax),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_plot_draws_on_the_axis_it_is_given(name, pairs, tmp_path):
    given = Figure().subplots()
    assert CALLS[name](pairs, given) is given
    own = CALLS[name](pairs, None)
    assert own.figure is not given.figure
    assert plot_style.save(own, tmp_path / "new folder" / "plot.png").stat().st_size > 1000


def test_the_drawn_curve_is_the_polynomials_prediction(pairs):
    ax = plots.pairs_with_fit(pairs, Polynomial((1.0, -0.025), (0.02, 0.03)))
    x, y = ax.lines[-1].get_data()
    assert (x[0], x[-1]) == (0.02, 0.03)
    np.testing.assert_allclose(y, np.maximum(x - 0.025, 0), atol=1e-12)  # clamped, not the bare polynomial


def test_branches_without_a_fit_of_their_own_use_the_pooled_one(pairs):
    assert len(plots.residuals(pairs, {"pooled": FIT}).collections) == 2


def test_difference_column_of_the_sample_grid():
    ax = plots.sample_grid([("a", IMAGE, np.clip(IMAGE - 0.1, 0, 1))], gain=4)
    canvas = ax.images[0].get_array()
    expected = 4 * np.abs(np.clip(IMAGE - 0.1, 0, 1) - IMAGE).mean(axis=-1)
    np.testing.assert_allclose(canvas[:16, -16:, 0], np.clip(expected, 0, 1), atol=1e-12)


def test_svg_takes_the_pages_ink_and_is_reproducible(pairs):
    svg = [plot_style.as_svg(plots.fit_figure(pairs, {"pooled": FIT}, title="<a & b>")) for _ in range(2)]
    assert svg[0] == svg[1]
    assert svg[0].startswith("<svg") and "currentColor" in svg[0] and plot_style.INK not in svg[0]
    assert "&lt;a &amp; b&gt;" in svg[0]


def test_plots_import_neither_torch_nor_pyplot():
    code = "import calibrate.plots, sys; assert not {'torch', 'diffusers', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
