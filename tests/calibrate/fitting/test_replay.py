"""Replay: the gate's decisions, decision for decision, and what follows from them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from analysis_data import make_entry, make_frame, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fitting.draft import fit
from calibrate.fitting.replay import (
    Search,
    Unreachable,
    gate_config,
    threshold_for_speedup,
    threshold_grid,
)  # fmt: skip
from calibrate.runs.pairs import load_run
from coeffs import Polynomial
from runtime.decide.gate import Gate

CURVE = Polynomial((2.0, 0.5, 0.01), (0.03, 0.2))


def search_of(run, polynomial=CURVE, branches="together", **window):
    return Search(run, make_entry(run, polynomial, **window), branches)


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


def gated(run, polynomial, threshold, **window):
    """The pattern that the runtime's own gate makes of every trajectory."""
    entry = make_entry(run, polynomial, **window)
    config = replace(gate_config(entry), threshold=threshold)
    search = Search(run, entry, branches="apart")
    patterns = []
    for x, num_steps in zip(search.x, search.num_steps, strict=True):
        gate, pattern = Gate(polynomial, config), ""
        for step, change in enumerate(x[:num_steps].tolist()):
            decision = gate.step(
                change if step else None, step=step, num_steps=int(num_steps)
            )
            pattern += "S" if decision.skip else "C"
        patterns.append(pattern)
    return patterns


@settings(max_examples=40, deadline=None)
@given(
    logs(), st.floats(0, 1), st.integers(0, 4) | st.floats(0, 0.4), st.integers(0, 3) | st.floats(0, 0.3),
    st.none() | st.integers(1, 4), st.sampled_from(["clamp", "signed", "abs"]),
)  # fmt: skip
def test_replay_gate_and_restatement_agree(run, threshold, start, end, max_skips, sign_rule):
    window = {"start": start, "end": end, "max_skips": max_skips}
    apart = search_of(run, branches="apart", **window)
    trajectories = zip(apart.x, apart.num_steps, strict=True)
    for (x, num_steps), pattern in zip(trajectories, apart.patterns(threshold), strict=True):
        counts = [
            math.ceil(value * num_steps) if isinstance(value, float) else value
            for value in (start, end)
        ]
        edges = max(counts[0], 1), counts[1]
        assert pattern == restated(x[:num_steps], threshold, CURVE, *edges, max_skips)
    wavy = Polynomial((30.0, -8.0, 0.3), (0.0, 0.2), sign_rule)
    for polynomial in (CURVE, wavy):
        search = search_of(run, polynomial, branches="apart", **window)
        expected = gated(run, polynomial, threshold, **window)
        assert search.patterns(threshold) == expected
        computed = search.computed(threshold).tolist()
        assert computed == [pattern.count("C") for pattern in expected]
    together, conditional = search_of(run, **window), patterns_of(apart, "cond", threshold)
    for branch in ("cond", "uncond"):
        assert patterns_of(together, branch, threshold) == conditional


def patterns_of(search, branch, threshold):
    patterns = zip(search.trajectories["branch"], search.patterns(threshold), strict=True)
    return [pattern for name, pattern in patterns if name == branch]


def test_compatibility_mode_ignores_domain_and_cap():
    run = load_run(make_frame(prompts=3))
    published = {"max_skips": 1, "status": "published"}
    search = search_of(run, branches="apart", **published)
    assert search.config.compat
    for threshold in (0.05, 0.2, 1.0):
        assert search.patterns(threshold) == gated(run, CURVE, threshold, **published)


def test_a_hand_made_trajectory():
    frame = make_frame(prompts=1, steps=8, branches=("cond",)).assign(
        x=[0.1, 0.1, 0.1, 0.3, 0.1, np.nan, 0.1]
    )
    run = load_run(frame)
    line = Polynomial((1.0, 0.0), (0.0, 0.2))
    search = search_of(run, line, end=0)
    patterns = [search.patterns(threshold) for threshold in (0.0, 0.15, 0.25, 9.0)]
    #            first, 0.1 four times with 0.3 above the domain, a NaN
    assert patterns == [["CCCCCCCC"], ["CSCSCSCS"], ["CSSCCSCS"], ["CSSSCSCS"]]
    assert search_of(run, line).patterns(9.0) == ["CSSSCSCC"]


def test_a_second_expert_starts_its_own_trajectory():
    """Steps counted on from the first expert, or from 1: the same trajectory either way."""
    frame = make_frame(
        prompts=2, steps=6, experts=("transformer", "transformer_2"), branches=("cond",)
    )
    late = frame.copy()
    late.loc[late["expert"] == "transformer_2", "step"] += 6
    patterns = [search_of(load_run(one)).patterns(0.2) for one in (frame, late)]
    assert patterns[0] == patterns[1] and all(len(pattern) == 6 for pattern in patterns[0])
    table = search_of(load_run(frame)).summary([0.0])
    assert table.loc[0, ["computed_steps", "num_steps"]].tolist() == [12, 12]


def test_summary_by_hand(monkeypatch):
    """Prompt a computes 4 and 6 of 10 steps in its branches, prompt b 5 and 9."""
    run = load_run(make_frame(prompts=2, steps=10))
    timed = replace(run, timing={"transformer": (1.0, 0.8)})
    monkeypatch.setattr(Search, "computed", lambda self, *_: np.array([[4, 6, 5, 9]]))
    row = search_of(timed, branches="apart").summary([0.1]).iloc[0]
    assert (row["computed_steps"], row["computed_low"], row["computed_high"]) == (6, 5, 7)
    assert row["num_steps"] == 10
    assert row["speedup"] == pytest.approx(40 / (40 - 0.8 * 16))
    untimed = search_of(run, branches="apart").summary([0.1]).iloc[0]
    assert untimed["speedup"] == pytest.approx(40 / 24)


def test_the_grid_covers_the_range_of_computed_steps():
    run = load_run(make_frame(prompts=6, steps=50))
    entry = fit(run)
    search = Search(run, entry)
    grid = threshold_grid(search)
    shares = search.summary(grid).eval("computed_steps / num_steps").to_numpy()
    assert grid[0] == 0 and shares[0] == 1 and shares[-1] <= 0.22 and len(grid) >= 10
    assert (np.diff(shares) < 0).all() and np.abs(np.diff(shares)).max() < 0.15
    assert search.steps(grid).mean(axis=-1) == pytest.approx(shares * 50)


def test_the_threshold_for_a_speedup_gives_it(tmp_path):
    run = load_run(make_run(tmp_path / "run", make_frame(prompts=4, steps=50)))
    search = search_of(run, Polynomial((1.0, 0.02), (0.0, 1.0)))
    assert threshold_for_speedup(search, 1.0) == 0
    for speedup in (1.2, 1.8, 2.5):
        threshold = threshold_for_speedup(search, speedup)
        less, found = search.summary([0.999 * threshold, threshold])["speedup"]
        assert less < speedup <= found < speedup + 0.03


def test_a_speedup_out_of_reach_names_the_best(tmp_path):
    run = load_run(make_run(tmp_path / "run", make_frame(prompts=3)))
    search = search_of(run)
    with pytest.raises(
        Unreachable, match=r"speed-up 7 is out of reach: at most \d\.\d\d on this log"
    ):
        threshold_for_speedup(search, 7.0)
    for wrong in (0.5, float("nan")):
        with pytest.raises(Unreachable, match="expected a number of 1 or more"):
            threshold_for_speedup(search, wrong)


def test_every_branch_is_gated_with_its_own_polynomial():
    run = load_run(make_frame(prompts=4, noise=0.001))
    entry = fit(run)
    search = Search(run, entry, branches="apart")
    for branch, x, predicted in zip(
        search.trajectories["branch"], search.x, search.predicted, strict=True
    ):
        may_skip = ~np.isnan(predicted)
        own = entry.experts["transformer"].branches[branch]
        expected = np.polyval(own.coefficients_high_to_low, x[may_skip]).clip(0)
        assert may_skip.any() and predicted[may_skip] == pytest.approx(expected)
