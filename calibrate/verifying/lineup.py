"""The table of policies: which enter a verification, and how each makes its settings at equal computed steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from calibrate.errors import CalibrateError, InvalidOption
from calibrate.planning.results import uniform_fitted as fitted_plan
from calibrate.runs.gram_log import NoPlan, load_grams
from calibrate.runs.pairs import Run
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
    Entered,
    Setting,
    plan_setting,
)
from calibrate.trials.through import ENGINES, through_setting
from calibrate.verifying.tuning import (
    TUNING_PROMPTS,
    TuningRuns,
    published_entries,
    tuned_diffusers,
    tuned_gate,
)
from coeffs import Entry, Plan
from coeffs.errors import CoeffsError
from runtime.errors import RuntimeCacheError

USUAL = (
    "gate",
    "plan",
    "uniform",
    "fewer-steps",
)  # what is deployed, and what it must beat
ALL = "all"
# Real runs per budget that a policy takes to make its settings, as a rule; a search took 524 for 15 and 7 of 50 steps.
TUNED = 2 * TUNING_PROMPTS
SEARCHED = 262


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """What policies make their settings from.

    Attributes:
        run: Recorded signals that replay may look at, and the Gram log where it has one.
        budgets: Numbers of computed steps.
        runs: Real runs of the tuning prompts.
        given: The fitted gate's settings, where its thresholds were given instead of budgets.
        known: The registry's entries.
    """

    entry: Entry
    run: Run
    num_steps: int
    budgets: Sequence[int]
    runs: TuningRuns
    given: Sequence[Setting] = ()
    known: Sequence[Entry] = ()
    transformer_class: str | None = None

    @property
    def magnitudes(self) -> list[float]:
        """MagCache's curve, mean over branches, 1 at step 0. Raises where the entry has none of this length."""
        expert = next(iter(self.entry.experts.values()))
        curves = [c for c in (expert.mag_ratios or {}).values() if len(c) == self.num_steps]
        if not curves:
            raise InvalidOption(
                "the entry holds no magnitude ratios of this schedule; fit a run of it first"
            )
        return np.mean(curves, axis=0).tolist()

    def planned(self, label: str, schedule: Callable[[int], str | Plan]) -> list[Setting]:
        """The plan of every budget."""
        return [plan_setting(label, schedule(budget), budget) for budget in self.budgets]


Make = Callable[[Lineup, str], Sequence[Setting]]


@dataclass(frozen=True)
class Policy:
    """A way of choosing which steps to compute.

    Attributes:
        label: Its name in tables.
        make: Its settings, one per budget, given the label; raises an expected error for what it lacks.
        tuning: Real runs per budget that its settings take, as a rule.
        enters: Whether this entry has anything to show.
        default: Whether it is one of ``all``.
    """

    label: str
    make: Make
    tuning: int = 0
    enters: Callable[[Entry], bool] = lambda entry: True
    default: bool = True


def gate(lineup: Lineup, label: str, entry: Entry | None = None) -> Sequence[Setting]:
    """The gate of an entry (by default the one that is verified), tuned to the budgets or as it was given."""
    if label == GATE and lineup.given:
        return lineup.given
    return tuned_gate(label, entry or lineup.entry, lineup.budgets, lineup.run, lineup.runs)


def planned(lineup: Lineup, label: str) -> list[Setting]:
    """The entry's plans for these budgets, each with its forecast."""
    return [plan_setting(label, plan) for plan in _plans(lineup)]


def planned_through(lineup: Lineup, label: str, engine: str) -> list[Setting]:
    """The entry's plans for these budgets as an engine's own code runs the exported form."""
    return [through_setting(label, engine, lineup.entry, plan) for plan in _plans(lineup)]


def _plans(lineup: Lineup) -> list[Plan]:
    plans = [
        plan
        for plan in lineup.entry.plans or ()
        if len(plan.schedule) == lineup.num_steps and plan.computed_steps in lineup.budgets
    ]
    if not plans:
        wanted = ",".join(map(str, lineup.budgets))
        raise InvalidOption(
            f"no plan in the entry for these budgets; make some: calibrate plan --computed {wanted}"
        )
    return plans


def uniform_rule(lineup: Lineup, label: str) -> list[Setting]:
    """Every so-many-th step, with the label's forecast of the others."""
    forecast = FORECASTS[label]
    steps = lineup.num_steps
    return lineup.planned(
        label, lambda budget: Plan(schedule=uniform(steps, budget), **forecast)
    )


def uniform_fitted(lineup: Lineup, label: str) -> list[Setting]:
    """The same with the weights that planning fitted for these schedules."""
    folder = lineup.run.path
    if folder is None:
        raise NoPlan("no run, and so no fitted weights; verify the folder of a planned run")
    return lineup.planned(label, partial(fitted_plan, folder, lineup.num_steps))


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
        return lineup.runs.error(plan_setting(label, schedule))

    steps = lineup.num_steps
    return lineup.planned(label, lambda budget: budcache(steps, budget, error))


def diffusers_cache(lineup: Lineup, label: str, cache: str) -> list[Setting]:
    """One of diffusers' own caches, tuned to the budgets."""
    options: dict[str, Any] = {}
    if cache == "MagCache":
        options = {"mag_ratios": lineup.magnitudes, "num_inference_steps": lineup.num_steps}
    return tuned_diffusers(label, cache, lineup.budgets, options, lineup.runs)


def _has_branches(entry: Entry) -> bool:
    return any(len(expert.branches) > 1 for expert in entry.experts.values())


POLICIES: dict[str, Policy] = {
    "gate": Policy(GATE, gate, tuning=TUNED),
    "apart": Policy(APART_GATE, gate, tuning=TUNED, enters=_has_branches),
    "plan": Policy(PLAN, planned, enters=lambda entry: bool(entry.plans)),
    **{
        f"plan-{engine}": Policy(
            f"plan through {engine}", partial(planned_through, engine=engine), default=False
        )
        for engine in ENGINES
    },
    "uniform": Policy(UNIFORM, uniform_rule),
    "uniform-linear": Policy("uniform skipping, linear forecast", uniform_rule),
    "uniform-linear-output": Policy("uniform skipping, linear outputs", uniform_rule),
    "uniform-fitted": Policy("uniform skipping, fitted guided", uniform_fitted),
    "uniform-linear-guided": Policy("uniform skipping, linear guided", uniform_rule),
    "fewer-steps": Policy(FEWER_STEPS, fewer_steps),
    "fewer-steps-2": Policy(FEWER_STEPS_2, partial(fewer_steps, solver_order=2)),
    "magcache": Policy("MagCache's rule", magcache_rule),
    "cache-dit-masks": Policy("cache-dit's masks", cache_dit_masks),
    "mflux": Policy("mflux's rule", mflux_rule),
    "budcache": Policy("BudCache's search", budcache_search, tuning=SEARCHED, default=False),
    "published": Policy(
        "published sets", gate, tuning=TUNED
    ),  # one policy a set, see _entrants
    "first-block-cache": Policy(
        "FirstBlockCache", partial(diffusers_cache, cache="FirstBlockCache"), tuning=TUNED
    ),
    "mag-cache": Policy(
        "MagCache (diffusers)", partial(diffusers_cache, cache="MagCache"), tuning=TUNED
    ),
    "sea-cache": Policy("SeaCache", partial(diffusers_cache, cache="SeaCache"), tuning=TUNED),
}


def checked_policies(names: Sequence[str] | None) -> list[str]:
    """The keys of the policies to run, the fitted gate first; ``all`` stands for those that need not be named."""
    chosen = ["gate"]
    for name in names or USUAL:
        if name not in (*POLICIES, ALL):
            raise InvalidOption(f"policy {name!r}: expected {ALL}, {', '.join(POLICIES)}")
        chosen += [key for key, p in POLICIES.items() if p.default] if name == ALL else [name]
    return list(dict.fromkeys(chosen))


def runs_to_come(
    names: Sequence[str], entry: Entry, budgets: int, prompts: int, given: bool
) -> tuple[int, int]:
    """How many cached runs judge and tune, at most; ``given`` thresholds of the fitted gate are not tuned."""
    policies = [POLICIES[name] for name in names if POLICIES[name].enters(entry)]
    tuning = sum(p.tuning for p in policies if not (given and p.label == GATE))
    return len(policies) * budgets * prompts, tuning * budgets


def entered(lineup: Lineup, names: Sequence[str], say: Callable[[str], None]) -> Entered:
    """All settings, policy by policy; what a model or a budget refuses is named, not fatal."""
    settings: list[Setting] = []
    refused: dict[str, str] = {}
    for policy in _entrants(lineup, names):
        say(f"preparing {policy.label}")
        try:
            settings += policy.make(lineup, policy.label)
        except (CalibrateError, CoeffsError, RuntimeCacheError) as error:
            refused[policy.label] = str(error)
    return Entered(settings, refused)


def _entrants(lineup: Lineup, names: Sequence[str]) -> Iterator[Policy]:
    for name in names:
        policy = POLICIES[name]
        if name == "published":  # each set is a policy of its own
            for entry in published_entries(
                lineup.known, lineup.transformer_class, lineup.entry
            ):
                yield Policy(f"{entry.model}'s gate", partial(gate, entry=entry))
        elif policy.enters(lineup.entry):
            yield policy
