"""What is certified: the settings of each policy in the order of their tests, and prompts that nothing has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

from calibrate.errors import InvalidOption
from calibrate.model.prompts import Prompt, PromptSet
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
    plans_of,
)
from coeffs import Certificate, Entry


def plans(case: Case) -> list[Setting]:
    """The entry's plans of this number of steps."""
    return [plan_setting(PLAN, plan) for plan in plans_of(case.entry, case.num_steps)]


def gates(case: Case) -> list[Setting]:
    """The entry's gate at its verified thresholds, or at those that replay puts nearest to the usual budgets."""
    rows = [
        (row.computed_steps or 0.0, row.threshold, row.kind) for row in case.entry.thresholds
    ]
    chosen = {row for row in rows if row[2] == "verified"}
    if rows and not chosen:
        budgets = default_budgets(case.num_steps)
        chosen = {min(rows, key=lambda row: abs(row[0] - budget)) for budget in budgets}
    return [
        gate_setting(GATE, case.entry, round(steps), threshold)
        for steps, threshold, _ in sorted(chosen, reverse=True)
    ]


def shorter_schedules(case: Case) -> list[Setting]:
    """The usual budgets as plain fewer steps."""
    return [
        Setting(FEWER_STEPS, "fewer_steps", steps)
        for steps in default_budgets(case.num_steps)
    ]


# Shipped, and taken for nothing else: the other sets for still images hold fewer than the usual tiers need.
KEPT_BACK = {"default": "certifying"}
POLICIES: dict[str, Callable[[Case], list[Setting]]] = {
    "plan": plans,
    "gate": gates,
    "fewer-steps": shorter_schedules,
}


def sequences(case: Case, policies: Sequence[str]) -> list[list[Setting]]:
    """The settings of every policy that the entry has, from the most computed steps to the fewest."""
    if not policies or not set(policies) <= set(POLICIES):
        raise InvalidOption(
            f"policies {', '.join(policies)}: expected some of {', '.join(POLICIES)}"
        )
    made = [sorted(POLICIES[name](case), key=lambda one: -one.budget) for name in policies]
    if not any(made):
        raise InvalidOption(
            f"{case.entry.label}: no {' and no '.join(policies)} in it to certify; make plans with `calibrate plan`"
        )
    return list(filter(None, made))


def setting_of(certificate: Certificate, entry: Entry) -> Setting:
    """The setting that a certificate is about."""
    steps = round(certificate.computed_steps)
    if certificate.plan is not None:
        return plan_setting(PLAN, certificate.plan)
    if certificate.threshold is not None:
        return gate_setting(GATE, entry, steps, certificate.threshold)
    return Setting(FEWER_STEPS, "fewer_steps", steps)


def unseen(
    known: Mapping[str, str], sets: Sequence[PromptSet], count: int, purpose: str
) -> PromptSet:
    """The first ``count`` prompts, each with all its seeds, that served no other purpose; fewer where these are all.

    ``known`` is what prompts served: prompt id -> purpose. The hash is of ids and seeds.
    """
    seeds: dict[str, list[Prompt]] = {}
    for prompt in chain.from_iterable(offered.prompts for offered in sets):
        if known.get(prompt.prompt_id, purpose) == purpose:
            seeds.setdefault(prompt.prompt_id, []).append(prompt)
    chosen = tuple(chain.from_iterable(islice(seeds.values(), count)))
    return PromptSet(
        prompts=chosen,
        sha256=canonical_sha256([[prompt.prompt_id, prompt.seed] for prompt in chosen]),
        name=", ".join(offered.name for offered in sets),
        total=len(chosen),
        images={name: path for offered in sets for name, path in offered.images.items()},
    )
