"""Replay: the gate's decisions, decision for decision, and what follows from them."""

import math

import numpy as np
import pandas as pd
import pytest
from analysis_data import make_frame, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fitting.draft import draft_entry
from calibrate.fitting.replay import (
    Search,
    Unreachable,
    polynomials,
    replay,
    summarise,
    threshold_for_speedup,
    threshold_grid,
    trajectories,
)  # fmt: skip
from calibrate.runs.pairs import load_run
from coeffs import Polynomial
from runtime.decide.gate import GateConfig

CURVE = Polynomial((2.0, 0.5, 0.01), (0.03, 0.2))


def curves(run, polynomial=CURVE):
    return {
        (expert, branch): polynomial for expert in run.experts for branch in run.branches(expert)
    }


def restated(x, threshold, polynomial, start=1, end=1, max_skips=None):
    """TeaCache's rule with our guards, written down once more: x[t] is the change since step t - 1."""
    low, high = polynomial.domain
    pattern, total, streak = "", 0.0, 0
    for step, change in enumerate(x):
        usable = step and math.isfinite(change)
        total += (
            max(np.polyval(polynomial.coefficients_high_to_low, max(change, low)), 0)
            if usable
            else math.inf
        )
        compute = (
            step < start or step >= len(x) - end or change > high or total >= threshold
            or threshold == 0 or (max_skips is not None and streak >= max_skips)
        )  # fmt: skip
        pattern += "C" if compute else "S"
        total, streak = (0.0, 0) if compute else (total, streak + 1)
    return pattern


@st.composite
def logs(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    frame = make_frame(prompts=2, steps=draw(st.integers(2, 25)), branches=("cond", "uncond"))
    x = random.uniform(0, draw(st.sampled_from([0.05, 0.25])), len(frame))
    x[random.uniform(size=len(frame)) < 0.05] = draw(st.sampled_from([np.nan, np.inf, 0.1]))
    x[-1] = 0.1  # at least one usable pair
    return load_run(frame.assign(x=x))


@settings(max_examples=40, deadline=None)
@given(
    logs(), st.floats(0, 1), st.integers(0, 4) | st.floats(0, 0.4), st.integers(0, 3) | st.floats(0, 0.3),
    st.none() | st.integers(1, 4), st.sampled_from(["clamp", "signed", "abs"]),
)  # fmt: skip
def test_replay_search_and_restatement_agree(run, threshold, start, end, max_skips, sign_rule):
    config = GateConfig(threshold=0.0, start=start, end=end, max_skips=max_skips)
    decisions = replay(run, curves(run), [threshold], config, branches="apart")
    for one, pattern in zip(trajectories(run), decisions["pattern"], strict=True):
        counts = [
            math.ceil(value * one.num_steps) if isinstance(value, float) else value
            for value in (start, end)
        ]
        assert pattern == restated(one.x, threshold, CURVE, max(counts[0], 1), counts[1], max_skips)
    wavy = Polynomial((30.0, -8.0, 0.3), (0.0, 0.2), sign_rule)
    for polynomial in (CURVE, wavy):
        decisions = replay(run, curves(run, polynomial), [threshold], config, branches="apart")
        computed = Search(run, curves(run, polynomial), config, branches="apart").computed(
            threshold
        )
        assert decisions["computed"].tolist() == computed.tolist()
    together = replay(run, curves(run), [threshold], config)
    conditional = decisions_of(
        replay(run, curves(run), [threshold], config, branches="apart"), "cond"
    )
    assert decisions_of(together, "cond") == decisions_of(together, "uncond") == conditional
    assert [p.count("C") for p in conditional] == Search(run, curves(run), config).computed(
        threshold
    ).tolist()


def decisions_of(decisions, branch):
    return decisions.loc[decisions["branch"] == branch, "pattern"].tolist()


def test_compatibility_mode_ignores_domain_and_cap():
    run = load_run(make_frame(prompts=3))
    config = GateConfig(threshold=0.0, max_skips=1, compat=True)
    for threshold in (0.05, 0.2, 1.0):
        decisions = replay(run, curves(run), [threshold], config, branches="apart")
        search = Search(run, curves(run), config, branches="apart")
        assert decisions["computed"].tolist() == search.computed(threshold).tolist()


def test_a_hand_made_trajectory():
    frame = make_frame(prompts=1, steps=8, branches=("cond",)).assign(
        x=[0.1, 0.1, 0.1, 0.3, 0.1, np.nan, 0.1]
    )
    run = load_run(frame)
    line = {("transformer", "cond"): Polynomial((1.0, 0.0), (0.0, 0.2))}
    patterns = replay(run, line, [0.0, 0.15, 0.25, 9.0], GateConfig(threshold=0.0, end=0))[
        "pattern"
    ]
    #            first, 0.1 four times with 0.3 above the domain, a NaN
    assert patterns.tolist() == ["CCCCCCCC", "CSCSCSCS", "CSSCCSCS", "CSSSCSCS"]
    assert replay(run, line, [9.0])["pattern"].tolist() == ["CSSSCSCC"]


def test_a_second_expert_starts_its_own_trajectory():
    """Steps counted on from the first expert, or from 1: the same trajectory either way."""
    frame = make_frame(
        prompts=2, steps=6, experts=("transformer", "transformer_2"), branches=("cond",)
    )
    late = frame.copy()
    late.loc[late["expert"] == "transformer_2", "step"] += 6
    patterns = [
        replay(load_run(one), curves(load_run(one)), [0.2])["pattern"].tolist()
        for one in (frame, late)
    ]
    assert patterns[0] == patterns[1] and all(len(pattern) == 6 for pattern in patterns[0])
    table = summarise(replay(load_run(frame), curves(load_run(frame)), [0.0]))
    assert table.loc[0, ["computed_steps", "num_steps"]].tolist() == [12, 12]


def test_summary_by_hand():
    decisions = pd.DataFrame([
        {"threshold": 0.1, "prompt_id": prompt, "seed": 0, "expert": "transformer", "branch": branch, "num_steps": 10,
         "computed": computed}
        for prompt, branch, computed in [("a", "cond", 4), ("a", "uncond", 6), ("b", "cond", 5), ("b", "uncond", 9)]
    ])  # fmt: skip
    row = summarise(decisions, {"transformer": (1.0, 0.8)}).iloc[0]
    assert (row["computed_steps"], row["computed_low"], row["computed_high"], row["num_steps"]) == (
        6,
        5,
        7,
        10,
    )
    assert row["speedup"] == pytest.approx(40 / (40 - 0.8 * 16))
    assert summarise(decisions).iloc[0]["speedup"] == pytest.approx(40 / 24)


def test_the_grid_covers_the_range_of_computed_steps():
    run = load_run(make_frame(prompts=6, steps=50))
    entry = draft_entry(run)
    search = Search(run, polynomials(entry, run))
    grid = threshold_grid(search)
    shares = (
        summarise(replay(run, polynomials(entry, run), grid))
        .eval("computed_steps / num_steps")
        .to_numpy()
    )
    assert grid[0] == 0 and shares[0] == 1 and shares[-1] <= 0.22 and len(grid) >= 10
    assert (np.diff(shares) < 0).all() and np.abs(np.diff(shares)).max() < 0.15
    assert search.generation_means(search.computed(np.array(grid))) == pytest.approx(shares * 50)


def test_the_threshold_for_a_speedup_gives_it(tmp_path):
    run = load_run(make_run(tmp_path / "run", make_frame(prompts=4, steps=50)))
    of_branch = curves(run, Polynomial((1.0, 0.02), (0.0, 1.0)))
    search = Search(run, of_branch)
    assert threshold_for_speedup(search, 1.0) == 0
    for speedup in (1.2, 1.8, 2.5):
        threshold = threshold_for_speedup(search, speedup)
        decisions = replay(run, of_branch, [0.999 * threshold, threshold])
        less, found = summarise(decisions, run.timing)["speedup"]
        assert less < speedup <= found < speedup + 0.03


def test_a_speedup_out_of_reach_names_the_best(tmp_path):
    run = load_run(make_run(tmp_path / "run", make_frame(prompts=3)))
    search = Search(run, curves(run))
    with pytest.raises(
        Unreachable, match=r"speed-up 7 is out of reach: at most \d\.\d\d on this log"
    ):
        threshold_for_speedup(search, 7.0)
    for wrong in (0.5, float("nan")):
        with pytest.raises(Unreachable, match="expected a number of 1 or more"):
            threshold_for_speedup(search, wrong)


def test_every_branch_is_gated_with_its_own_polynomial():
    run = load_run(make_frame(prompts=4, noise=0.001))
    entry = draft_entry(run)
    known = entry.experts["transformer"].branches
    of_branch = polynomials(entry, run)
    for branch in ("cond", "uncond"):
        expected = known[branch].coefficients_high_to_low
        assert of_branch["transformer", branch].coefficients_high_to_low == expected
