"""What a tier counts as a miss, how many prompts prove a share, and how often a certificate is false."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.certificates import simulate
from calibrate.certifying.tiers import USUAL_TIERS, Demand, Tier, parse_tier
from calibrate.errors import InvalidOption


def results(**columns):
    rows = pd.DataFrame(columns)
    return rows.assign(**{n: False for n in ("identical", "broken") if n not in rows})


def test_a_prompt_misses_with_any_of_its_seeds():
    rows = results(prompt_id=["a", "a", "b"], psnr_db=[40.0, 20.0, 40.0])
    assert Tier("high", {"psnr_db": 25}).missed(rows).to_dict() == {"a": True, "b": False}


def test_all_limits_must_hold_and_errors_are_bounded_from_above():
    rows = results(prompt_id=list("abc"), psnr_db=[30.0, 30, 20], lpips=[0.01, 0.2, 0.01])
    missed = Tier("high", {"psnr_db": 25, "lpips": 0.1}).missed(rows)
    assert missed.to_dict() == {"a": False, "b": True, "c": True}


def test_broken_samples_and_samples_without_a_figure_miss_and_identical_ones_do_not():
    rows = results(
        prompt_id=list("abc"),
        psnr_db=[np.nan, np.nan, 30.0],
        broken=[True, False, False],
        identical=[False, False, True],
    )
    missed = Tier("strict", {"psnr_db": 35}).missed(rows)
    assert missed.to_dict() == {"a": True, "b": True, "c": False}


def test_a_limit_on_what_was_not_measured_is_refused():
    with pytest.raises(
        InvalidOption, match="a limit on ssim, but these samples have psnr_db"
    ):
        Tier("high", {"ssim": 0.9}).missed(results(prompt_id=["a"], psnr_db=[30.0]))


def test_what_is_within_reach_leaves_the_allowed_misses_out():
    rows = results(
        prompt_id=list("abcd"), psnr_db=[20.0, 30, 31, 32], lpips=[0.4, 0.1, 0.2, 0.1]
    )
    assert Tier("x", {"psnr_db": 99}).within_reach(rows, 0) == 20
    assert Tier("x", {"psnr_db": 99}).within_reach(rows, 1) == 30
    assert Tier("x", {"lpips": 0.01}).within_reach(rows, 1) == 0.2


def test_a_tier_is_read_from_its_text():
    tier = parse_tier("portrait:psnr=35,ssim=0.95")
    assert tier == Tier("portrait", {"psnr_db": 35.0, "ssim": 0.95})
    assert str(tier) == "portrait (PSNR >= 35 dB and SSIM >= 0.95)"
    assert [usual.name for usual in USUAL_TIERS] == ["lossless", "high"]


@pytest.mark.parametrize(
    "text",
    [
        "high",
        "high:",
        "high:psnr",
        "high:psnr=x",
        "high:size=3",
        "exact:psnr=9",
        ":psnr=9",
        "a:psnr=inf",
    ],
)
def test_a_text_that_is_no_tier_is_refused(text):
    with pytest.raises(InvalidOption, match=r"expected (name:psnr=35|a name of letters)"):
        parse_tier(text)


@pytest.mark.parametrize(
    ("risk", "confidence", "tests"), [(0.05, 0.95, 6), (0.2, 0.9, 1), (0.01, 0.99, 4)]
)
def test_the_prompts_needed_are_the_fewest_that_can_prove_the_risk(risk, confidence, tests):
    demand = Demand(risk, confidence, tests)
    needed = demand.prompts_needed
    assert demand.most_missed(needed) == 0 and demand.most_missed(needed - 1) == -1
    assert Demand(demand.lowest_risk(40), confidence, tests).prompts_needed <= 40
    assert Demand(demand.lowest_risk(40) - 0.002, confidence, tests).prompts_needed > 40
    for prompts in (needed, 3 * needed):
        most = demand.most_missed(prompts)
        assert (
            stats.binom.cdf(most, prompts, risk)
            <= demand.level
            < stats.binom.cdf(most + 1, prompts, risk)
        )


@pytest.mark.parametrize(
    ("risk", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.1, 1.0), (0.1, 0.0)]
)
def test_no_risk_and_no_doubt_are_refused(risk, confidence):
    with pytest.raises(InvalidOption, match="between 0 and 1"):
        Demand(risk, confidence, 1)


# --- the promise itself, on a population whose shares of misses are known


def population(seed=0, prompts=400):
    """Two policies at eight budgets: hard prompts are hard under both, and at every budget."""
    random = np.random.default_rng(seed)
    steps = np.arange(24.0, 8.0, -2.0)
    difficulty = random.normal(0, 4, (prompts, 1))
    figures = {
        name: offset + steps - difficulty + random.normal(0, 1.5, (prompts, len(steps)))
        for name, offset in {"plan": 14.0, "gate": 12.0}.items()
    }
    return figures, dict.fromkeys(figures, steps)


@pytest.mark.parametrize("risk", [0.05, 0.2])
def test_the_promise_is_broken_in_no_more_draws_than_stated(risk):
    limits = np.array([22.0, 25.0, 28.0])
    demand = Demand(risk, 0.9, 2 * len(limits))
    prompts = 2 * demand.prompts_needed
    found = simulate(*population(), limits, demand, prompts, draws=200, num_steps=28)
    assert found.false <= stats.binom.ppf(0.99, 200, 0.1)
    assert min(found.certified) > 0.5, "a method that certifies nothing is never wrong"
    assert all(
        steps >= oracle - 1e-9
        for steps, oracle in zip(found.steps, found.oracle, strict=True)
    )
    # The same draws with the bare share of misses, as one would judge without a guarantee.
    bare = simulate(
        *population(),
        limits,
        demand,
        prompts,
        draws=200,
        num_steps=28,
        allowed=int(risk * prompts),
    )
    assert bare.false > 60


def test_where_every_sample_is_broken_every_prompt_misses():
    """Such results have no column of figures at all."""
    broken = pd.DataFrame({"prompt_id": ["a", "b"], "broken": True, "identical": False})
    tier = Tier("high", {"psnr_db": 25.0})
    assert tier.missed(broken).tolist() == [True, True]
    assert tier.within_reach(broken, 0) == 0.0


@pytest.mark.parametrize("name", ["größe", "-x", "my tier", "a" * 65, "exact", ""])
def test_a_name_that_no_entry_takes_is_refused_before_anything_runs(name):
    with pytest.raises(InvalidOption, match="expected a name of letters"):
        Tier(name, {"psnr_db": 30.0})


@pytest.mark.parametrize(
    ("risk", "confidence", "tests"), [(0.5, 0.75, 2), (0.5, 0.875, 1), (0.8, 0.8, 1)]
)
def test_rounding_asks_for_no_prompt_too_few(risk, confidence, tests):
    demand = Demand(risk, confidence, tests)
    assert demand.most_missed(demand.prompts_needed) >= 0
