"""What is certified: the settings of each policy in the order of their tests, and prompts that nothing has seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt, PromptSet, load_prompts
from calibrate.model.protocol import canonical_sha256
from calibrate.trials.baselines import default_budgets
from calibrate.trials.case import Case
from calibrate.trials.setting import (
    FEWER_STEPS,
    GATE,
    PLAN,
    Setting,
    gate_setting,
    plan_setting,
)
from coeffs import Certificate, Entry


def plans(case: Case) -> list[Setting]:
    """The entry's plans of this number of steps."""
    return [
        plan_setting(PLAN, plan)
        for plan in case.entry.plans or ()
        if len(plan.schedule) == case.num_steps
    ]


def gates(case: Case) -> list[Setting]:
    """The entry's gate at its verified thresholds, or at those that replay puts nearest to the usual budgets."""
    rows = [
        (row.computed_steps or 0.0, row.threshold, row.kind) for row in case.entry.thresholds
    ]
    chosen = [row for row in rows if row[2] == "verified"]
    if rows and not chosen:
        budgets = default_budgets(case.num_steps)
        chosen = [min(rows, key=lambda row: abs(row[0] - budget)) for budget in budgets]
    return [
        gate_setting(GATE, case.entry, round(steps), threshold)
        for steps, threshold, _ in sorted(set(chosen), reverse=True)
    ]


def shorter_schedules(case: Case) -> list[Setting]:
    """The usual budgets as plain fewer steps."""
    return [shorter(budget) for budget in default_budgets(case.num_steps)]


def shorter(steps: int) -> Setting:
    return Setting(FEWER_STEPS, "fewer_steps", steps)


# Shipped, and taken for nothing else: the other sets for still images hold fewer than the usual tiers need.
KEPT_BACK = "certifying"
POLICIES: dict[str, Callable[[Case], list[Setting]]] = {
    "plan": plans,
    "gate": gates,
    "fewer-steps": shorter_schedules,
}


def sequences(case: Case, policies: Iterable[str]) -> list[list[Setting]]:
    """The settings of every policy that the entry has, from the most computed steps to the fewest."""
    names = list(policies)
    if not names or not set(names) <= set(POLICIES):
        raise InvalidOption(
            f"policies {', '.join(names)}: expected some of {', '.join(POLICIES)}"
        )
    made = [
        sorted(POLICIES[name](case), key=lambda setting: -setting.budget) for name in names
    ]
    if not any(made):
        raise InvalidOption(
            f"{case.entry.label}: no {' and no '.join(names)} in it to certify; make plans with `calibrate plan`"
        )
    return list(filter(None, made))


def setting_of(certificate: Certificate, entry: Entry) -> Setting:
    """The setting that a certificate is about."""
    steps = round(certificate.computed_steps)
    if certificate.plan is not None:
        return plan_setting(PLAN, certificate.plan)
    if certificate.threshold is not None:
        return gate_setting(GATE, entry, steps, certificate.threshold)
    return shorter(steps)


def offered(
    case: Case, prompts: Any, seed: int, images: Iterable[str | os.PathLike]
) -> list[PromptSet]:
    """The set that was asked for, or the model's own with those that are kept back beside it."""
    sets = case.offered(prompts, seed, images)
    if prompts is None and case.prompt_source == "default":
        sets.append(load_prompts(KEPT_BACK, seed=seed, images=images))
    return sets


def unseen(
    known: dict[str, str], offered: Iterable[PromptSet], purpose: str = ""
) -> dict[str, list[Prompt]]:
    """Prompt id -> that prompt with each of its seeds, of prompts that served no other purpose."""
    prompts: dict[str, list[Prompt]] = {}
    for prompt in (prompt for one_set in offered for prompt in one_set.prompts):
        if known.get(prompt.prompt_id, purpose) == purpose:
            prompts.setdefault(prompt.prompt_id, []).append(prompt)
    return prompts


def first_of(
    prompts: dict[str, list[Prompt]], count: int, sets: list[PromptSet]
) -> PromptSet:
    """The first ``count`` prompts as a set, named by the hash of their ids and seeds."""
    chosen = [prompt for same in list(prompts.values())[:count] for prompt in same]
    images = {name: path for one_set in sets for name, path in one_set.images.items()}
    digest = canonical_sha256([[prompt.prompt_id, prompt.seed] for prompt in chosen])
    name = ", ".join(one_set.name for one_set in sets)
    return replace(sets[0], prompts=tuple(chosen), sha256=digest, name=name, images=images)
