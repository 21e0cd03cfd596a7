"""One line of advice: the best of what can be deployed, with its figures, and no surer than the prompts allow."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import coeffs
from calibrate.cli import cli
from calibrate.trials.baselines import uniform
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM
from calibrate.verifying.advice import advise, export_line, python_lines

LINEAR = "uniform skipping, linear outputs"


def results(
    quality, prompts=10, budgets=(14, 10), speedup=1.8, measure="psnr_db", spread=0.2
):
    """Runs of every policy whose dB at 14 steps are ``quality``, 3 dB less at 10, and alike but for noise."""
    random = np.random.default_rng(0)
    rows = []
    for prompt in range(prompts):
        level = random.normal(0, 3)
        for policy, value in quality.items():
            for budget in budgets:
                noise = random.normal(0, spread)
                rows.append({
                    "policy": policy, "budget": budget, "prompt_id": f"p{prompt}", "seed": 0,
                    "prompt": f"a thing {prompt}", "threshold": 0.0555 if policy == GATE else np.nan,
                    "computed_steps": float(budget), "num_steps": 28, "seconds": 1.0,
                    "uncached_seconds": speedup * 14 / budget, "broken": False, "identical": False,
                    measure: value - 0.75 * (14 - budget) + level + noise,
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_the_best_is_advised_with_its_figures_and_how_sure_that_is():
    table = results({FEWER_STEPS: 40.0, UNIFORM: 41.0, PLAN: 44.0, GATE: 42.0})
    advice = advise(table)
    own = table[(table["policy"] == PLAN) & (table["budget"] == 14)]["psnr_db"]
    assert (advice.policy, advice.budget) == (PLAN, 14)
    figures = f"1.80x, {own.mean():.1f} dB, worst {own.min():.1f}"
    assert advice.use == f"Use the plan at 14 of 28 steps: {figures}."
    assert advice.certainty.startswith(
        "Significantly better than 14 plain steps without a cache ("
    )
    assert ": +4." in str(advice) and advice.certainty.endswith(", 10 prompts.")


def test_a_difference_within_the_spread_is_not_significant():
    advice = advise(results({FEWER_STEPS: 40.0, PLAN: 40.5}, spread=3.0))
    assert advice.certainty.startswith("Not significantly better than 14 plain steps")


def test_where_fewer_steps_is_better_no_cache_is_advised():
    advice = advise(results({FEWER_STEPS: 44.0, UNIFORM: 41.0, GATE: 42.0}))
    assert advice.use.startswith("Use 14 plain steps without a cache: 1.80x, ")
    rival = "Significantly better than the fitted gate at threshold 0.0555 (14 of 28 steps) ("
    assert advice.certainty.startswith(rival) and ": +2.0 dB" in advice.certainty


@pytest.mark.parametrize("prompts", [1, 2, 3, 7])
def test_few_prompts_give_no_verdict_and_no_nan(prompts):
    text = str(advise(results({FEWER_STEPS: 40.0, PLAN: 44.0}, prompts=prompts)))
    assert f"Too few prompts ({prompts}) to tell it from 14 plain steps" in text
    assert "run 10 prompts" in text and "ignificant" not in text and "nan" not in text


def test_a_stronger_rule_without_a_fit_is_advised_too():
    advice = advise(results({FEWER_STEPS: 40.0, LINEAR: 45.0, PLAN: 44.0}))
    assert advice.policy == LINEAR
    entry = coeffs.load("alivilab/flux1-dev")
    lines = python_lines(advice, entry, "runs/x")
    schedule = uniform(28, 14)
    assert f'schedule="{schedule}", forecast="linear", forecast_of="output")' in lines
    assert "forecasts differently, or reuses" in export_line(advice, entry, "runs/x")


def test_what_is_not_faster_or_breaks_is_not_advised():
    slow = advise(results({FEWER_STEPS: 40.0, PLAN: 44.0}, speedup=0.7, budgets=(14,)))
    assert slow.policy is None and "none of these policies" in slow.use
    table = results({FEWER_STEPS: 40.0, PLAN: 44.0})
    table["broken"] = (table["policy"] == PLAN) & (table["prompt_id"] == "p0")
    assert advise(table).policy == FEWER_STEPS
    assert python_lines(slow, None, "x") == export_line(slow, None, "x") == ""


def test_nothing_to_compare_with_is_said():
    assert "compared with nothing else" in advise(results({PLAN: 44.0})).certainty


def test_sound_is_judged_by_its_own_measure():
    advice = advise(results({FEWER_STEPS: 20.0, UNIFORM: 21.0}, measure="snr_db"))
    assert " dB SNR, worst " in advice.use


def test_the_lines_to_copy_do_what_was_advised(tmp_path):
    entry = coeffs.load("vllm-omni/longcat-image")
    plans = (coeffs.Plan(schedule=uniform(28, 10)), coeffs.Plan(schedule=uniform(28, 14)))
    entry = dataclasses.replace(entry, plans=plans)
    coeffs.save(entry, tmp_path / "entry.yaml")
    of = {
        policy: advise(results({policy: 40.0}))
        for policy in (PLAN, GATE, UNIFORM, FEWER_STEPS)
    }
    assert "entry.plans[1]" in python_lines(of[PLAN], entry, tmp_path)
    assert "threshold=0.0555)" in python_lines(of[GATE], entry, tmp_path)
    assert "num_inference_steps=14" in python_lines(of[FEWER_STEPS], entry, tmp_path)
    for advice in of.values():
        compile(python_lines(advice, entry, tmp_path), "<copied>", "exec")
    exported = export_line(of[PLAN], entry, tmp_path)
    assert exported.endswith(f"--to cache-dit-mask --schedule {uniform(28, 14)}")
    for policy in (PLAN, GATE):
        command = export_line(of[policy], entry, tmp_path).splitlines()[-1].split()[1:]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
