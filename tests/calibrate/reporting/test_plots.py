"""Plots draw what they are given, on a given axis or on one of their own, without pyplot's global state."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from calibrate.reporting import plots, run_plots
from calibrate.reporting import style as plot_style
from calibrate.verifying.lineup import POLICIES
from coeffs.entry.polynomial import Polynomial


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    sigma = np.tile(np.linspace(1, 0.1, 10), 6)
    x = 0.02 + 0.03 * (sigma - 0.5) ** 2 + 0.002 * rng.random(60)
    return pd.DataFrame(
        {"x": x, "y": 2 * x + 0.01, "sigma": sigma, "branch": ["cond", "uncond"] * 30}
    )


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
    {
        "threshold": [0.2, 0.0],
        "computed_steps": [5, 10],
        "computed_low": [4, 10],
        "computed_high": [6, 10],
    }
)
LEARNING = pd.DataFrame(
    {
        "branch": "cond",
        "prompts": [1, 2, 4],
        "rmse": [0.3, 0.2, 0.1],
        "low": [0.2, 0.1, 0.1],
        "high": [0.4, 0.3, 0.2],
    }
)
CALLS = {
    "pairs_with_fit": lambda pairs, ax: plots.pairs_with_fit(
        pairs[pairs["branch"] == "cond"], FIT, ax=ax
    ),
    "curves": lambda _, ax: plots.curves(
        {"ours": FIT, "theirs": Polynomial((1.0, 0.0), sign_rule="signed")}, ax
    ),
    "residuals": lambda pairs, ax: plots.residuals(pairs, {"pooled": FIT}, ax),
    "over_sigma": lambda pairs, ax: plots.over_sigma(pairs, "y", ax),
    "replay_curve": lambda _, ax: plots.replay_curve(REPLAY, ax, verified=REPLAY),
    "pareto": lambda _, ax: run_plots.pareto(SUMMARY, ax),
    "learning_curve": lambda _, ax: plots.learning_curve(LEARNING, ax),
    "step_patterns": lambda _, ax: run_plots.step_patterns(
        {"replayed": "CCS", "closed loop": "CSC"}, ax
    ),
    "sample_grid": lambda _, ax: run_plots.sample_grid([("3", IMAGE, IMAGE * 0.9)], ax),
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
    np.testing.assert_allclose(
        y, np.maximum(x - 0.025, 0), atol=1e-12
    )  # clamped, not the bare polynomial


def test_branches_without_a_fit_of_their_own_use_the_pooled_one(pairs):
    assert len(plots.residuals(pairs, {"pooled": FIT}).collections) == 2


def policies_of(ax):
    return [container.get_label() for container in ax.containers]


def many(measure="psnr_db", better=1.0):
    """Every policy at two budgets, each half a unit better than the next; the last one only at the larger budget."""
    names = [policy.label for policy in POLICIES.values()][::-1]
    rows = [
        {"policy": name, "computed_steps": float(steps), measure: better * (steps - i / 2),
         f"{measure}_low": better * (steps - i / 2) - 1, f"{measure}_high": better * (steps - i / 2) + 1}
        for i, name in enumerate(names) for steps in (20, 10) if steps == 20 or name != names[-1]
    ]  # fmt: skip
    return names, pd.DataFrame(rows).sample(frac=1, random_state=0)


@pytest.mark.parametrize(("measure", "better"), [("psnr_db", 1.0), ("lpips", -1.0)])
def test_the_legend_of_the_pareto_plot_has_the_best_policy_first(measure, better):
    names, summary = many(measure, better)
    ax = run_plots.pareto(summary, measure=measure)
    assert policies_of(ax) == names
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names


def test_the_pareto_plot_shows_every_policy_with_its_own_style_and_intervals():
    names, summary = many()
    ax = run_plots.pareto(summary)
    styles = plot_style.policy_styles(names)
    assert (
        len({(color, marker, str(line)) for color, marker, line in styles.values()})
        == len(names)
        >= 14
    )
    drawn = {container.get_label(): container for container in ax.containers}
    for policy, rows in summary.groupby("policy"):
        line, _, (bars,) = drawn[policy]
        assert (line.get_color(), line.get_marker()) == styles[policy][:2]
        low_high = np.array([segment[:, 1] for segment in bars.get_segments()])
        expected = rows.sort_values("computed_steps")[
            ["psnr_db_low", "psnr_db_high"]
        ].to_numpy()
        np.testing.assert_allclose(low_high, expected)
        np.testing.assert_allclose(
            line.get_xdata(orig=False), sorted(rows["computed_steps"]), atol=0.41
        )
    at_20 = [drawn[policy][0].get_xdata(orig=False)[-1] for policy in names]
    assert len(set(at_20)) == len(names)  # none hides another's interval


def test_plan_and_gate_stand_out_and_rules_of_others_are_grey():
    names, summary = many()
    drawn = {
        container.get_label(): container[0]
        for container in run_plots.pareto(summary).containers
    }
    widths = {policy: line.get_linewidth() for policy, line in drawn.items()}
    assert {policy for policy in names if widths[policy] == max(widths.values())} == {
        "plan",
        "fitted gate",
    }
    assert drawn["plan"].get_color() != drawn["fitted gate"].get_color()
    grey = {policy for policy, line in drawn.items() if line.get_color() == plot_style.GREY}
    assert {"MagCache's rule", "SeaCache"} <= grey
    assert not any(
        policy.startswith(("plan", "fitted gate", "uniform", "fewer")) for policy in grey
    )


def test_bit_identical_samples_of_infinite_db_come_first():
    assert run_plots.by_quality(SUMMARY) == ["uniform skipping", "fitted gate"]


def test_difference_column_of_the_sample_grid():
    ax = run_plots.sample_grid([("a", IMAGE, np.clip(IMAGE - 0.1, 0, 1))], gain=4)
    canvas = ax.images[0].get_array()
    expected = 4 * np.abs(np.clip(IMAGE - 0.1, 0, 1) - IMAGE).mean(axis=-1)
    np.testing.assert_allclose(canvas[:16, -16:, 0], np.clip(expected, 0, 1), atol=1e-12)


def test_svg_takes_the_pages_ink_and_is_reproducible(pairs):
    svg = [
        plot_style.as_svg(plots.fit_figure(pairs, {"pooled": FIT}, title="<a & b>"))
        for _ in range(2)
    ]
    assert svg[0] == svg[1]
    assert (
        svg[0].startswith("<svg")
        and "currentColor" in svg[0]
        and plot_style.INK not in svg[0]
    )
    assert "&lt;a &amp; b&gt;" in svg[0]


def test_plots_import_neither_torch_nor_pyplot():
    code = (
        "import calibrate.reporting.plots, calibrate.reporting.run_plots, sys; "
        "assert not {'torch', 'diffusers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
