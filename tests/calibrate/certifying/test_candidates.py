"""Which settings are tested in which order, and which prompts are left for it."""

from types import SimpleNamespace

import pytest
from coeffs_samples import certificate, sample_entry

import coeffs
from calibrate.certifying.candidates import KEPT_BACK, sequences, setting_of, unseen
from calibrate.errors import InvalidOption
from calibrate.model.prompts import load_prompts
from calibrate.trials.case import Case

PLANS = tuple(
    coeffs.Plan(schedule=schedule) for schedule in ("CSSS" * 7, "CS" * 14, "CS" * 4)
)


def case(**fields):
    return SimpleNamespace(entry=sample_entry(**{"plans": PLANS} | fields), num_steps=28)


def test_settings_go_from_the_most_computed_steps_to_the_fewest():
    plans, gates, shorter = sequences(case(), ["plan", "gate", "fewer-steps"])
    assert [setting.plan.schedule for setting in plans] == ["CS" * 14, "CSSS" * 7]
    assert [setting.threshold for setting in gates] == [0.2], "verified thresholds alone"
    assert [setting.budget for setting in shorter] == [21, 17, 14, 11, 8]


def test_without_verified_thresholds_those_of_the_replay_that_are_nearest_to_the_usual_budgets():
    rows = [
        {"threshold": t / 100, "computed_steps": 28 - t, "kind": "replay"}
        for t in range(1, 27)
    ]
    (gates,) = sequences(case(thresholds=tuple(rows)), ["gate"])
    assert [setting.budget for setting in gates] == [21, 17, 14, 11, 8]
    assert [setting.threshold for setting in gates] == [0.07, 0.11, 0.14, 0.17, 0.2]


def test_a_policy_that_the_entry_has_not_is_no_test_and_none_at_all_is_refused():
    assert len(sequences(case(plans=None), ["plan", "fewer-steps"])) == 1
    with pytest.raises(InvalidOption, match="no plan in it to certify; make plans"):
        sequences(case(plans=None), ["plan"])


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "gate"),
        ({"policy": "plan", "threshold": None, "plan": PLANS[1]}, "plan"),
        ({"policy": "fewer_steps", "threshold": None}, "fewer_steps"),
    ],
)
def test_a_certificate_leads_back_to_its_setting(changes, kind):
    made = certificate(**changes)
    setting = setting_of(made, sample_entry())
    assert (setting.kind, setting.budget, setting.plan) == (kind, 14, made.plan)
    assert setting.threshold == made.threshold


def test_prompts_keep_all_their_seeds_and_serve_one_purpose(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [f'{{"prompt": "{text}", "seed": {seed}}}' for text in "abc" for seed in (1, 2)]
    file.write_text("\n".join(lines))
    prompts = load_prompts(file)
    ids = [prompt.prompt_id for prompt in prompts.prompts[::2]]
    known = {ids[0]: "recorded", ids[1]: "certifying 1"}
    fresh = unseen(known, [prompts], 5, "certifying 1")
    assert list(dict.fromkeys(prompt.prompt_id for prompt in fresh.prompts)) == ids[1:]
    chosen = unseen(known, [prompts], 1, "certifying 1")
    assert [(prompt.prompt, prompt.seed) for prompt in chosen.prompts] == [
        ("b", 1),
        ("b", 2),
    ]
    assert chosen.sha256 != fresh.sha256


def test_models_of_still_images_have_enough_shipped_prompts_for_the_usual_tiers():
    plain = SimpleNamespace(prompt_source="default")
    usual = Case.offered(plain, None, 0, (), KEPT_BACK)
    chosen = unseen({}, usual, 1000, "")
    assert len({prompt.prompt_id for prompt in chosen.prompts}) == 200
    assert len(Case.offered(plain, ["mine"], 0, (), KEPT_BACK)) == 1
