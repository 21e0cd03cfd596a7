"""Thresholds for a number of computed steps, and the published sets that are tuned beside the own gate."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import coeffs
from calibrate.reporting.run_data import example_run
from calibrate.runs.pairs import load_run
from calibrate.trials.setting import GATE, gate_setting
from calibrate.verifying.lineup import published_entries
from calibrate.verifying.tuning import (
    STEADY,
    prompts_needed,
    tune_threshold,
    tuned_diffusers,
    tuned_gate,
    unsteady,
)


def test_tuning_corrects_what_replay_gets_wrong():
    calls = []

    def measured(threshold):
        calls.append(threshold)
        return (
            20 / (1 + threshold) + 2
        )  # real runs compute two steps more than the replay says

    threshold, computed = tune_threshold(lambda t: 20 / (1 + t), measured, 10)
    assert computed == pytest.approx(10, abs=0.5) and threshold == pytest.approx(1.5, abs=0.2)
    assert len(calls) <= 3


def test_a_threshold_that_serves_two_budgets_stands_at_the_nearer():
    lineup = SimpleNamespace(budgets=[8, 7], steps=lambda setting: 7.0, num_steps=10)
    (setting,) = tuned_diffusers(lineup, "SeaCache", "SeaCache")
    assert setting.budget == 7


def test_published_sets_of_the_class_enter_once_per_shape():
    own = coeffs.load("vllm-omni/longcat-image")
    found = published_entries(coeffs.entries(), "LongCatImageTransformer2DModel", own)
    assert found and all(
        entry.transformer_class == "LongCatImageTransformer2DModel" for entry in found
    )
    assert own.label not in {entry.label for entry in found}


# --- as many prompts as it takes


@pytest.mark.parametrize("spread", [0.8, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_two_halves_of_the_needed_prompts_agree_within_a_step(spread, seed):
    random = np.random.default_rng(seed)
    population = np.round(14 + spread * random.standard_normal(4000))
    needed = 2 * math.ceil(prompts_needed(population) / 2)

    def apart(prompts):
        halves = random.choice(population, (4000, 2, prompts // 2)).mean(axis=2)
        return np.abs(halves[:, 0] - halves[:, 1])

    assert (apart(needed) <= STEADY).mean() >= 0.93
    assert (apart(max(2, needed // 4)) <= STEADY).mean() < 0.85


def test_prompts_that_all_compute_alike_need_no_others():
    assert prompts_needed(np.full(6, 14.0)) == 0
    assert prompts_needed(np.array([14.0])) == 2  # one alone says nothing


def test_two_prompts_do_not_decide_what_all_recorded_ones_are_tuned_to(monkeypatch):
    """Bug: the number of steps was that of the two prompts that were run, and halves of a run ended far apart."""
    halves = {"first": (2, 2, -1, -1, -1, -1), "second": (-2, -2, 1, 1, 1, 1)}
    entry = coeffs.load("vllm-omni/longcat-image")

    def replayed(name, entry, half):
        offsets = np.array(halves[half])
        return lambda threshold: 20 / (1 + threshold) + offsets, np.array(list("abcdef"))

    monkeypatch.setattr("calibrate.verifying.tuning._replayed", replayed)

    def tuned(half, prompts):
        def counted(
            setting,
        ):  # of a and b; real runs compute half a step more than the replay says
            return 20 / (1 + setting.threshold) + np.mean(halves[half][:2]) + 0.5

        ran = [SimpleNamespace(prompt_id=prompt) for prompt in prompts]
        lineup = SimpleNamespace(
            entry=entry, run=half, budgets=[12], given=(), steps=counted, prompts=ran
        )
        (setting,) = tuned_gate(lineup, GATE)
        return 20 / (1 + setting.threshold)

    apart = abs(tuned("first", ["a", "b"]) - tuned("second", ["a", "b"]))
    assert apart <= STEADY < abs(tuned("first", []) - tuned("second", []))


def test_too_few_prompts_are_said_with_how_many_more_it_takes():
    run, entry = load_run(example_run()), coeffs.load(example_run() / "entry.yaml")
    few, enough = (gate_setting(GATE, entry, *each) for each in ((23, 0.0275), (16, 0.0459)))
    # Single prompts spread by about 1.3 steps at the first threshold (26 prompts needed), not at all at the second.
    text = unsteady(entry, run, [few, enough])
    assert text.startswith(
        "two halves of the 10 recorded prompts may tune to numbers of steps"
    )
    assert text.endswith("apart at 23 steps; record 16 more")
    assert unsteady(entry, run, [enough]) == ""
