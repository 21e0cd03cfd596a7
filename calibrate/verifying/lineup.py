"""The table of policies: which enter a verification, and how each makes its settings at equal computed steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from calibrate.errors import EXPECTED, InvalidOption
from calibrate.planning.closed_loop import Fits
from calibrate.planning.results import anchors_of
from calibrate.runs.gram_log import load_grams
from calibrate.trials.baselines import (
    CACHE_DIT_MASKS,
    budcache,
    cache_dit_mask,
    magcache_at,
    mflux_schedule,
    uniform,
)
from calibrate.trials.setting import (
    APART_GATE,
    FEWER_STEPS,
    FEWER_STEPS_2,
    FORECASTS,
    GATE,
    PLAN,
    UNIFORM,
    Setting,
    plan_setting,
    plans_of,
)
from calibrate.trials.through import ENGINES, through_setting
from calibrate.verifying.tuning import TUNING_PROMPTS, Lineup, tuned_diffusers, tuned_gate
from coeffs import Entry, Plan

# What is deployed, and what it must beat.
USUAL = ("gate", "plan", "uniform", "fewer-steps")
ALL, PUBLISHED = "all", "published sets"
# Real runs per budget that a policy takes to make its settings, as a rule; a search took 524 for 15 and 7 of 50 steps.
TUNED = 2 * TUNING_PROMPTS
SEARCHED = 262


Make = Callable[[Lineup, str], Sequence[Setting]]


@dataclass(frozen=True)
class Policy:
    """A way of choosing which steps to compute.

    Attributes:
        label: Its name in tables.
        make: Its settings, one per budget, given the label; raises an expected error for what it lacks.
        tuning: Real runs per budget that its settings take, as a rule.
        is_fitted: Whether each setting also takes a run of every recorded prompt.
        enters: Whether this entry has anything to show.
        default: Whether it is one of ``all``.
    """

    label: str
    make: Make
    tuning: int = 0
    is_fitted: bool = False
    enters: Callable[[Entry], bool] = lambda entry: True
    default: bool = True


def planned(lineup: Lineup, label: str, engine: str | None = None) -> list[Setting]:
    """The entry's plans for these budgets, each with its forecast; or as an engine's own code runs their export."""
    entry = lineup.entry
    plans = [
        p for p in plans_of(entry, lineup.num_steps) if p.computed_steps in lineup.budgets
    ]
    if not plans:
        wanted = ",".join(map(str, lineup.budgets))
        raise InvalidOption(
            f"no plan in the entry for these budgets; make some: calibrate plan --computed {wanted}"
        )
    if engine is None:
        return [plan_setting(label, plan) for plan in plans]
    return [through_setting(label, engine, entry, plan) for plan in plans]


def uniform_rule(lineup: Lineup, label: str) -> list[Setting]:
    """Every so-many-th step, with the label's forecast of the others."""
    make = partial(uniform, lineup.num_steps)
    return lineup.planned(label, lambda n: Plan(schedule=make(n), **FORECASTS[label]))


def uniform_fitted(lineup: Lineup, label: str) -> list[Setting]:
    """The same with weights fitted on the recorded prompts, as a plan's are."""
    folder, bench = lineup.run.path, lineup.bench
    if folder is None:
        raise InvalidOption(
            "no run, and so no prompts to fit weights on; verify the folder of a run"
        )
    fits = Fits.of(bench.case, bench.progress, lineup.say, anchors_of(folder))
    return lineup.planned(label, fits.uniform)


def fewer_steps(lineup: Lineup, label: str, **options: Any) -> list[Setting]:
    """A shorter schedule of the model itself, nothing cached."""
    return [
        Setting(label, "fewer_steps", budget, options=options) for budget in lineup.budgets
    ]


def magcache_rule(lineup: Lineup, label: str) -> list[Setting]:
    ratios = lineup.magnitudes[1:]
    return lineup.planned(label, partial(magcache_at, ratios, lineup.num_steps))


def cache_dit_masks(lineup: Lineup, label: str) -> list[Setting]:
    """cache-dit's four masks, whatever the budgets: they are compared at their own computed steps."""
    schedules = [cache_dit_mask(name, lineup.num_steps) for name in CACHE_DIT_MASKS]
    by_count = {schedule.count("C"): schedule for schedule in reversed(schedules)}
    return [plan_setting(label, by_count[count]) for count in sorted(by_count, reverse=True)]


def mflux_rule(lineup: Lineup, label: str) -> list[Setting]:
    if lineup.run.path is None:
        raise InvalidOption(
            "no run, and so no recorded noise levels; verify the folder of a run"
        )
    logs = load_grams(lineup.run.path)
    sigmas = np.concatenate([log.sigmas[:-1] for log in logs])
    if len(sigmas) != lineup.num_steps or not np.isfinite(sigmas).all():
        raise InvalidOption(f"the run holds no noise levels of {lineup.num_steps} steps")
    return lineup.planned(label, partial(mflux_schedule, sigmas.tolist()))


def budcache_search(lineup: Lineup, label: str) -> list[Setting]:
    """Hundreds of real runs a budget, all of one prompt."""

    def error(schedule: str) -> float:
        return lineup.error(plan_setting(label, schedule))

    steps = lineup.num_steps
    return lineup.planned(label, lambda budget: budcache(steps, budget, error))


def _has_branches(entry: Entry) -> bool:
    return any(len(expert.branches) > 1 for expert in entry.experts.values())


POLICIES: dict[str, Policy] = {
    "gate": Policy(GATE, tuned_gate, tuning=TUNED),
    "apart": Policy(APART_GATE, tuned_gate, tuning=TUNED, enters=_has_branches),
    "plan": Policy(PLAN, planned, enters=lambda entry: bool(entry.plans)),
    **{
        f"plan-{engine}": Policy(
            f"plan through {engine}", partial(planned, engine=engine), default=False
        )
        for engine in ENGINES
    },
    "uniform": Policy(UNIFORM, uniform_rule),
    "uniform-linear": Policy("uniform skipping, linear forecast", uniform_rule),
    "uniform-linear-output": Policy("uniform skipping, linear outputs", uniform_rule),
    "uniform-fitted": Policy(
        "uniform skipping, fitted guided", uniform_fitted, is_fitted=True
    ),
    "uniform-linear-guided": Policy("uniform skipping, linear guided", uniform_rule),
    "fewer-steps": Policy(FEWER_STEPS, fewer_steps),
    "fewer-steps-2": Policy(FEWER_STEPS_2, partial(fewer_steps, solver_order=2)),
    "magcache": Policy("MagCache's rule", magcache_rule),
    "cache-dit-masks": Policy("cache-dit's masks", cache_dit_masks),
    "mflux": Policy("mflux's rule", mflux_rule),
    "budcache": Policy("BudCache's search", budcache_search, tuning=SEARCHED, default=False),
    "published": Policy(PUBLISHED, tuned_gate, tuning=TUNED),
    "first-block-cache": Policy(
        "FirstBlockCache", partial(tuned_diffusers, cache="FirstBlockCache"), tuning=TUNED
    ),
    "mag-cache": Policy(
        "MagCache (diffusers)", partial(tuned_diffusers, cache="MagCache"), tuning=TUNED
    ),
    "sea-cache": Policy("SeaCache", partial(tuned_diffusers, cache="SeaCache"), tuning=TUNED),
}


def checked_policies(names: Sequence[str] | None) -> list[str]:
    """The keys of the policies to run, the fitted gate first; ``all`` stands for those that need not be named."""
    chosen = ["gate"]
    for name in names or USUAL:
        if name not in (*POLICIES, ALL):
            raise InvalidOption(f"policy {name!r}: expected {ALL}, {', '.join(POLICIES)}")
        chosen += [key for key, p in POLICIES.items() if p.default] if name == ALL else [name]
    return list(dict.fromkeys(chosen))


def entered(lineup: Lineup, names: Sequence[str]) -> tuple[list[Setting], dict[str, str]]:
    """All settings, policy by policy; what a model or a budget refuses is named, not fatal (policy -> reason)."""
    settings: list[Setting] = []
    refused: dict[str, str] = {}
    for policy in _entrants(lineup, names):
        lineup.say(f"preparing {policy.label}")
        try:
            settings += policy.make(lineup, policy.label)
        except EXPECTED as error:
            refused[policy.label] = str(error)
    return settings, refused


def _entrants(lineup: Lineup, names: Sequence[str]) -> Iterator[Policy]:
    for policy in (POLICIES[name] for name in names):
        if policy.label == PUBLISHED:  # each set is a policy of its own
            denoiser = lineup.bench.case.identity["classes"][0]
            for entry in published_entries(lineup.known, denoiser, lineup.entry):
                yield Policy(f"{entry.model}'s gate", partial(tuned_gate, entry=entry))
        elif policy.enters(lineup.entry):
            yield policy


def published_entries(
    entries: Sequence[Entry], transformer_class: str | None, own: Entry
) -> list[Entry]:
    """Newest published or copied sets of the same denoiser class that the runtime can gate with.

    Those for the same checkpoint where there are any. Sets that differ by a factor only are taken once: a factor only
    moves the threshold. ``entries`` are sorted by version.
    """
    newest = {
        entry.model: entry
        for entry in entries
        if entry.status != "measured" and entry.label != own.label and entry.signal != "other"
        if entry.transformer_class == transformer_class
        if entry.has_polynomials
    }
    # A class serves many checkpoints; sets for this very one are the fair opponents where there are any.
    repository = own.checkpoint.repository
    here = [entry for entry in newest.values() if entry.checkpoint.repository == repository]
    distinct: dict[tuple, Entry] = {}
    for entry in here or newest.values():
        coefficients = np.array(entry.fit().coefficients_high_to_low)
        shape = (coefficients / (np.abs(coefficients).max() or 1.0)).round(9)
        distinct.setdefault((*shape, entry.sign_rule, entry.signal), entry)
    return list(distinct.values())
