"""Verdicts: paired at equal steps, budget by budget, corrected for their number, and no surer than prompts allow."""

import numpy as np
import pandas as pd
import pytest

from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM
from calibrate.verifying import comparison as verdict
from calibrate.verifying.results import Verification, load_verification, write_verification
from calibrate.verifying.tables import verdict_table


def results(policy, offset, prompts=8, seed=0, budgets=(7, 14), noise=0.3):
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        # Prompts differ far more than policies.
        base = 30 + 5 * np.random.default_rng(prompt).standard_normal()
        for budget in budgets:
            psnr = base + 0.5 * budget + offset + noise * rng.standard_normal()
            rows.append({
                "policy": policy, "budget": budget, "prompt_id": f"p{prompt}", "seed": 0, "prompt": f"prompt {prompt}",
                "threshold": None, "computed_steps": float(budget), "num_steps": 28, "seconds": 1.0,
                "uncached_seconds": 2.0, "psnr_db": psnr, "broken": False, "identical": False,
            })  # fmt: skip
    return pd.DataFrame(rows)


def against_uniform(offset, prompts=8, noise=0.3, **by_budget):
    ours, theirs = (
        results(GATE, offset, prompts, 1, noise=noise),
        results(UNIFORM, 0.0, prompts, 2),
    )
    return verdict.judge(pd.concat([ours, theirs], ignore_index=True), GATE)


@pytest.mark.parametrize(
    ("offset", "outcome", "words"),
    [
        (-2.0, "worse", "worse at"),
        (2.0, "better", "better at"),
        (0.0, "equal", "as good (within 1 dB) at"),
    ],
)
def test_verdict_in_words(offset, outcome, words):
    compared = against_uniform(offset)
    assert [one.outcome for one in compared] == [outcome] * 2
    assert all(one.low < one.difference < one.high for one in compared)
    assert [one.difference for one in compared] == pytest.approx([offset] * 2, abs=0.4)
    (sentence,) = verdict.sentences(compared)
    assert sentence.startswith(
        f"the fitted gate against uniform skipping: {words} 14 of 28 steps"
    )
    assert "95 % interval" in sentence and "7 of 28 steps" in sentence


def test_what_is_neither_shown_nor_excluded_is_not_significant():
    compared = against_uniform(0.5, noise=3.0)
    assert {one.outcome for one in compared} == {"undecided"}
    assert "not significantly different at" in verdict.headline(compared)


def test_budgets_are_judged_apart():
    """Bug: +2 dB at one budget and -2 at another were one verdict of no difference."""
    ours = results(GATE, 0.0, seed=1)
    ours["psnr_db"] += ours["budget"].map({7: -2.5, 14: 2.5})
    compared = verdict.judge(pd.concat([ours, results(UNIFORM, 0.0, seed=2)]), GATE)
    assert {one.budget: one.outcome for one in compared} == {7: "worse", 14: "better"}


def test_seven_prompts_give_no_verdict_but_the_words():
    compared = against_uniform(5.0, prompts=7)
    assert {one.outcome for one in compared} == {"unknown"}
    assert "too few prompts for a verdict (7; at least 8)" in verdict.headline(compared)


def test_two_prompts_give_no_interval():
    (sentence,) = verdict.sentences(against_uniform(1.0, prompts=2))
    assert "interval" not in sentence and "nan" not in sentence


def test_comparison_is_made_at_the_policys_own_computed_steps():
    """A gate that computes more than its budget gains nothing: the baseline is read at the same number of steps."""
    gate = results(GATE, 0.0, noise=0.0)
    gate["computed_steps"] += 3  # and half a dB better per step, as everyone here
    gate["psnr_db"] += 1.5
    uniform = results(UNIFORM, 0.0, budgets=(7, 14, 21), noise=0.0)
    compared = verdict.judge(pd.concat([gate, uniform]), GATE)
    assert [one.difference for one in compared] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_the_plan_is_judged_against_every_other_policy():
    table = pd.concat(
        [results(PLAN, 2.0), results(GATE, 0.0, seed=1), results(FEWER_STEPS, 5.0, seed=2)],
        ignore_index=True,
    )
    outcomes = {(one.baseline, one.budget): one.outcome for one in verdict.judge(table, PLAN)}
    assert outcomes == {
        (GATE, 7): "better", (GATE, 14): "better", (FEWER_STEPS, 7): "worse", (FEWER_STEPS, 14): "worse",
    }  # fmt: skip
    assert verdict.judge(results(GATE, 0.0), PLAN) == []


# --- summaries


def test_a_broken_sample_counts_as_nothing_left_and_below_any_limit():
    """Bug: samples of NaN were left out of every mean, so that a policy that breaks looked as good as before."""
    table = results(GATE, 0.0, prompts=10, budgets=(7,))
    whole = verdict.summarize(table).iloc[0]
    table.loc[0, ["broken", "psnr_db"]] = [True, None]
    row = verdict.summarize(table).iloc[0]
    assert (row["broken"], row["prompts"]) == (1, 10)
    assert row["psnr_db"] == pytest.approx(table["psnr_db"].fillna(0).mean())
    assert row["psnr_db"] < whole["psnr_db"] - 2
    assert row["worst"] == row["low"] == -np.inf
    assert " broken" in verdict_table(pd.DataFrame([row]))


def test_where_every_sample_is_broken_nothing_is_left():
    """Such a policy had no figure, and a mean over policies left it out."""
    table = results(GATE, 0.0, budgets=(7,)).assign(broken=True, psnr_db=None)
    table = pd.concat([table, results(UNIFORM, 0.0)], ignore_index=True)
    row = verdict.summarize(table).iloc[0]
    assert (row["psnr_db"], row["low"]) == (0.0, -np.inf)
    assert str(float(row["psnr_db_of_mean"])) == "0.0", "not -0.0"


def test_samples_without_the_main_measure_say_nothing():
    """Those of a damaged table ended in a traceback of pandas."""
    table = results(GATE, 0.0, budgets=(7,)).assign(psnr_db=None)
    table = pd.concat([table, results(UNIFORM, 0.0)], ignore_index=True)
    assert set(verdict.summarize(table)["policy"]) == {UNIFORM}


def test_a_policy_that_breaks_on_prompts_loses_against_one_that_does_not():
    ours, theirs = (
        results(GATE, 0.0, budgets=(7,)),
        results(UNIFORM, 0.0, seed=2, budgets=(7,)),
    )
    ours.loc[:3, ["broken", "psnr_db"]] = [True, None]
    (compared,) = verdict.judge(pd.concat([ours, theirs]), GATE)
    assert compared.difference < -10
    summary = verdict.summarize(pd.concat([ours, theirs], ignore_index=True))
    assert summary.set_index("policy")["lost"][GATE] == 0.5


def test_the_share_of_prompts_that_lose_has_an_exact_interval():
    fewer, plan = (
        results(FEWER_STEPS, 0.0, 10, noise=0.0),
        results(PLAN, 0.0, 10, noise=0.0),
    )
    plan.loc[plan["prompt_id"].isin(["p0", "p1"]) & (plan["budget"] == 7), "psnr_db"] -= 3.1
    summary = verdict.summarize(pd.concat([plan, fewer], ignore_index=True))
    row = summary[(summary["policy"] == PLAN) & (summary["budget"] == 7)].iloc[0]
    # 0.0252 and 0.5561: Clopper and Pearson's interval of 2 of 10.
    assert (row["lost"], row["lost_low"], row["lost_high"]) == pytest.approx(
        (0.2, 0.0252, 0.5561), abs=1e-4
    )
    assert "20%" in verdict_table(summary)


def test_the_db_of_the_mean_error_lies_below_the_mean_of_db():
    table = results(GATE, 0.0, budgets=(7,))
    row = verdict.summarize(table).iloc[0]
    errors = 10 ** (-table["psnr_db"] / 10)
    assert row["psnr_db_of_mean"] == pytest.approx(-10 * np.log10(errors.mean()))
    assert row["psnr_db_of_mean"] < row["psnr_db"]


def test_the_lowest_tenth_and_the_worst_prompt_are_kept():
    table = results(GATE, 0.0, prompts=20, budgets=(7,))
    table.loc[3, "psnr_db"] = 3.0
    row = verdict.summarize(table).iloc[0]
    assert (row["worst"], row["worst_prompt"]) == (3.0, "prompt 3")
    assert row["low"] == sorted(table["psnr_db"])[1]


def test_samples_at_the_noise_floor_are_said_to_be():
    table = results(GATE, 0.0).assign(at_floor=True)
    assert "(floor)" in verdict_table(verdict.summarize(table))


def test_results_of_an_older_version_with_other_measures_are_read(tmp_path):
    """MS-SSIM and the log-spectral distance were measured once; their columns are left alone."""
    table = results(GATE, 0.0).assign(ms_ssim=0.9, log_spectral_distance_db=1.0, ssim=0.8)
    table.loc[0, ["identical", "psnr_db"]] = [True, None]
    table = table.assign(patterns=[{}] * len(table), replayed=[{}] * len(table))
    facts = {"headline": "Found.", "refused": {}, "broken": {}}
    write_verification(Verification(table, facts, tmp_path / "verify"))
    found = load_verification(tmp_path)
    assert list(found.results["ms_ssim"]) == [0.9] * len(table)
    assert list(found.summary["ssim"]) == pytest.approx([0.8, 0.8])
    assert "ms_ssim" not in found.summary and np.isfinite(found.summary["psnr_db"]).all()
    assert "SSIM" in verdict_table(found.summary)
