"""Which settings enter a verification: the fitted gate, its baselines at equal computed steps, published sets.

Thresholds are chosen on prompts that are not judged: replay proposes, real runs of those prompts correct.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from calibrate.errors import CalibrateError, InvalidOption
from calibrate.fitting.replay import Search, polynomials
from calibrate.planning.stages import Stages
from calibrate.runs.gram_log import NoPlan, load_grams
from calibrate.runs.pairs import Run
from calibrate.trials.baselines import (
    Setting,
    forecast_parameters,
    growing_interval,
    magcache_at,
    schedule_setting,
    tune_threshold,
    uniform,
)
from coeffs import Entry
from coeffs.errors import CoeffsError
from runtime.decide.gate import GateConfig
from runtime.errors import RuntimeCacheError

GATE = "fitted gate"
APART_GATE = "fitted gate, branches apart"
PLAN = "plan"
UNIFORM = "uniform skipping"
FEWER_STEPS = "fewer steps"
FEWER_STEPS_2 = "fewer steps, second-order solver"
POLICIES = {
    "gate": GATE,
    "apart": APART_GATE,
    "plan": PLAN,
    "uniform": UNIFORM,
    "uniform-linear": "uniform skipping, linear forecast",
    "uniform-linear-output": "uniform skipping, linear outputs",
    "uniform-quadratic-output": "uniform skipping, quadratic outputs",
    "uniform-fitted": "uniform skipping, fitted outputs",
    "growing": "growing interval",
    "fewer-steps": FEWER_STEPS,
    "fewer-steps-2": FEWER_STEPS_2,
    "magcache": "MagCache's rule",
    "published": "published sets",
    "first-block-cache": "FirstBlockCache",
    "mag-cache": "MagCache (diffusers)",
    "sea-cache": "SeaCache",
}
GATES = ("gate", "apart", "published")  # tuned, each with an entry
UNIFORM_FORECASTS = {
    "uniform": ("reuse", "residual"),
    "uniform-linear": ("linear", "residual"),
    "uniform-linear-output": ("linear", "output"),
    "uniform-quadratic-output": ("quadratic", "output"),
    "uniform-fitted": ("fitted", "output"),
}
MISSED_BUDGET = 1.5  # a tuned policy this many steps off its budget is not comparable there
_DIFFUSERS = {
    "first-block-cache": "FirstBlockCache",
    "mag-cache": "MagCache",
    "sea-cache": "SeaCache",
}

Measure = Callable[[Setting], float]  # mean computed steps of real runs on the tuning prompts


@dataclass(frozen=True)
class Contest:
    """What will be run, and what was refused and why (policy -> reason)."""

    settings: list[Setting]
    refused: dict[str, str]


def gate_config(entry: Entry) -> GateConfig:
    """The gate's settings as ``apply_tea_cache`` takes them from this entry; published sets decide as published."""
    published = entry.status != "measured"
    return GateConfig(
        threshold=0.0,
        start=1 if entry.start is None else entry.start,
        end=1 if entry.end is None else entry.end,
        max_skips=entry.max_skips,
        compat=published,
    )


def gate_setting(name: str, entry: Entry, budget: int, threshold: float) -> Setting:
    """The gate with an entry, which is known by ``name``, at a threshold."""
    parameters: dict[str, Any] = {"entry": name, "threshold": float(f"{threshold:.6g}")}
    parameters["branches"] = branches_of(name, entry)
    parameters |= forecast_parameters(entry.forecast, entry.forecast_of)
    if gate_config(entry).compat:
        parameters["compat"] = True
    return Setting(name, "gate", budget, parameters)


def branches_of(name: str, entry: Entry) -> str:
    """Whether the CFG branches of this gate decide ``together`` or, as published implementations do, ``apart``."""
    return "apart" if name == APART_GATE or gate_config(entry).compat else "together"


@dataclass
class Schedules:
    """Settings of the policies that need no tuning, at any budget.

    Attributes:
        run: What the weights of fitted forecasts come from.
        ratios: MagCache's curve, where the entry has one.
    """

    num_steps: int
    run: Run
    ratios: Sequence[float] | None = None

    def settings(self, policy: str, budgets: Sequence[int]) -> list[Setting]:
        """The policy's settings, one per budget. Raises :class:`CalibrateError` for what it lacks."""
        name = POLICIES[policy]
        if policy == "fewer-steps":
            return [Setting(name, "fewer_steps", budget) for budget in budgets]
        if policy == "fewer-steps-2":
            return [Setting(name, "fewer_steps", budget, {"solver_order": 2}) for budget in budgets]
        if policy in UNIFORM_FORECASTS:
            return [self._uniform(policy, budget) for budget in budgets]
        if policy == "growing":
            return [
                schedule_setting(name, growing_interval(self.num_steps, budget))
                for budget in budgets
            ]
        if not self.ratios:
            raise InvalidOption(
                "the entry holds no magnitude ratios of this schedule; fit a run of it first"
            )
        plans = {budget: magcache_at(self.ratios, self.num_steps, budget) for budget in budgets}
        return [schedule_setting(name, plan, budget=budget) for budget, plan in plans.items()]

    def _uniform(self, policy: str, budget: int) -> Setting:
        forecast, forecast_of = UNIFORM_FORECASTS[policy]
        if forecast == "fitted":
            schedule = self._stages.uniform(budget)
            weights = self._stages.fit(schedule)
        else:
            schedule, weights = uniform(self.num_steps, budget), None
        return schedule_setting(POLICIES[policy], schedule, forecast, forecast_of, weights)

    @cached_property
    def _stages(self) -> Stages:
        """The run's Gram log of the outputs, which weights are fitted on."""
        if self.run.path is None:
            raise NoPlan(
                "no run, and so no Gram log to fit weights on; verify the folder of one recorded with --gram"
            )
        stages = Stages.of(load_grams(self.run.path), "output")
        if stages.num_steps != self.num_steps:
            raise NoPlan(
                f"the Gram log is of {stages.num_steps} steps, here are {self.num_steps}; record this number"
            )
        return stages


def planned_settings(entry: Entry, budgets: Sequence[int], num_steps: int) -> list[Setting]:
    """The entry's plans for these budgets, each with its forecast."""
    plans = [
        p for p in entry.plans or () if len(p.schedule) == num_steps and p.computed_steps in budgets
    ]
    if not plans:
        wanted = ",".join(map(str, budgets))
        raise InvalidOption(
            f"no plan in the entry for these budgets; make some: calibrate plan --computed {wanted}"
        )
    return [
        schedule_setting(PLAN, plan.schedule, plan.forecast, plan.forecast_of, plan.weights_by_step)
        for plan in plans
    ]


def tuned_gate(
    name: str, entry: Entry, budgets: Sequence[int], run: Run, measure: Measure
) -> list[Setting]:
    """The gate at the thresholds whose real runs come nearest to the budgets."""
    search = _search(name, entry, run)

    def replayed(threshold: float) -> float:
        return float(search.generation_means(search.computed(np.array(threshold))))

    found, missed = [], []
    for budget in budgets:
        threshold, computed = tune_threshold(
            replayed, lambda t, budget=budget: measure(gate_setting(name, entry, budget, t)), budget
        )
        if abs(computed - budget) > MISSED_BUDGET:
            missed.append(f"{computed:.3g} instead of {budget}")
            continue
        setting = gate_setting(name, entry, budget, threshold)
        if all(setting.parameters != other.parameters for other in found):
            found.append(setting)
    if not found:
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets: {', '.join(missed)}"
        )
    return found


def tuned_diffusers(
    policy: str, budgets: Sequence[int], options: Mapping[str, Any], measure: Measure
) -> list[Setting]:
    """One of diffusers' caches at thresholds found by halving on real runs; every run serves all budgets."""
    name, tried = POLICIES[policy], {}

    def setting(budget: int, threshold: float) -> Setting:
        return Setting(
            name, _DIFFUSERS[policy], budget, {**options, "threshold": float(f"{threshold:.4g}")}
        )

    def count(log_threshold: float, budget: int) -> float:
        candidate = setting(budget, 10**log_threshold)
        threshold = candidate.parameters["threshold"]
        if threshold not in tried:
            tried[threshold] = measure(candidate)
        return tried[threshold]

    found = []
    for budget in budgets:
        low, high = -4.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if count(middle, budget) > budget else (low, middle)
        threshold = min(tried, key=lambda value: abs(tried[value] - budget))
        if abs(tried[threshold] - budget) <= MISSED_BUDGET:
            found.append(setting(budget, threshold))
    if not found:
        seen = sorted({round(value, 1) for value in tried.values()})
        raise InvalidOption(
            f"no threshold gives a number of computed steps near the budgets, only {seen}"
        )
    return found


@dataclass(frozen=True)
class Entrants:
    """Every gate that enters, by policy name, and which do not (policy -> reason)."""

    gates: dict[str, Entry]
    refused: dict[str, str] = field(default_factory=dict)


def entrants(
    entry: Entry, policies: Sequence[str], known: Sequence[Entry], transformer_class: str, run: Run
) -> Entrants:
    """The fitted gate and all others that were asked for."""
    found = {GATE: entry}
    if "apart" in policies and any(len(expert.branches) > 1 for expert in entry.experts.values()):
        found[APART_GATE] = entry
    if "published" in policies:
        found |= {
            f"{other.model}'s gate": other
            for other in published_entries(known, transformer_class, entry)
        }
    return Entrants(found)


def published_entries(
    entries: Sequence[Entry], transformer_class: str | None, own: Entry
) -> list[Entry]:
    """Newest published or copied sets of the same denoiser class that the runtime can gate with.

    Those for the same checkpoint where there are any. Sets that differ by a factor only are taken once: a factor only
    moves the threshold.
    """
    newest: dict[str, Entry] = {}
    for entry in entries:
        foreign = (
            entry.status != "measured"
            and entry.transformer_class == transformer_class
            and entry.label != own.label
        )
        gated = entry.signal != "other" and any(
            expert.branches for expert in entry.experts.values()
        )
        if foreign and gated:
            newest[entry.model] = max(
                newest.get(entry.model, entry), entry, key=lambda e: e.version
            )
    # A class serves many checkpoints; sets for this very one are the fair opponents where there are any.
    here = [
        entry
        for entry in newest.values()
        if own.checkpoint.repository == entry.checkpoint.repository
    ]
    distinct: dict[tuple, Entry] = {}
    for entry in here or newest.values():
        coefficients = entry.fit().coefficients_high_to_low
        scale = max(map(abs, coefficients)) or 1.0
        shape = tuple(round(value / scale, 9) for value in coefficients)
        distinct.setdefault((shape, entry.sign_rule, entry.signal), entry)
    return list(distinct.values())


def contest(
    entered: Entrants,
    run: Run,
    given: Sequence[Setting] | None,
    budgets: Sequence[int],
    num_steps: int,
    policies: Sequence[str],
    measure: Measure,
    say: Callable[[str], None],
) -> Contest:
    """All settings of a verification, policy by policy; what a model or a budget refuses is named, not fatal.

    Args:
        entered: The gates (:func:`entrants`), the fitted one among them.
        run: Recorded signals that replay may look at.
        given: The fitted gate's settings where its thresholds were given (:func:`given_gate`).
        measure: Real runs of the tuning prompts under a setting.
    """
    gates = entered.gates
    ratios = _ratios(gates[GATE], num_steps)
    schedules = Schedules(num_steps, run, (ratios or [])[1:])
    jobs: dict[str, Callable[[], list[Setting]]] = {
        GATE: lambda: list(given or tuned_gate(GATE, gates[GATE], budgets, run, measure))
    }
    for policy in policies:
        if policy in _DIFFUSERS:
            options = (
                {"mag_ratios": ratios, "num_inference_steps": num_steps}
                if policy == "mag-cache"
                else {}
            )
            jobs[POLICIES[policy]] = lambda p=policy, o=options: tuned_diffusers(
                p, budgets, o, measure
            )
        elif policy == "plan":
            if gates[GATE].plans:
                jobs[PLAN] = lambda: planned_settings(gates[GATE], budgets, num_steps)
        elif policy not in GATES:
            jobs[POLICIES[policy]] = lambda p=policy: schedules.settings(p, budgets)
    for name, entry in gates.items():
        jobs.setdefault(name, lambda n=name, e=entry: tuned_gate(n, e, budgets, run, measure))
    settings, refused = [], dict(entered.refused)
    for name, job in jobs.items():
        say(name)
        try:
            settings += job()
        except (CalibrateError, CoeffsError, RuntimeCacheError) as error:
            refused[name] = str(error)
    return Contest(settings, refused)


def _search(name: str, entry: Entry, run: Run) -> Search:
    return Search(
        run, polynomials(entry, run), gate_config(entry), entry.signal, branches_of(name, entry)
    )


def _ratios(entry: Entry, num_steps: int) -> list[float] | None:
    """MagCache's curve, mean over branches, 1 at step 0; ``None`` where the entry has none of this length."""
    expert = next(iter(entry.experts.values()))
    curves = [curve for curve in (expert.mag_ratios or {}).values() if len(curve) == num_steps]
    return [float(value) for value in np.mean(curves, axis=0)] if curves else None


def given_gate(entry: Entry, thresholds: Sequence[float], run: Run) -> list[Setting]:
    """The gate at given thresholds; its budgets are the computed steps that replay expects."""
    search = _search(GATE, entry, run)
    counts = search.generation_means(search.computed(np.array(thresholds, float)))
    return [
        gate_setting(GATE, entry, max(1, round(float(count))), threshold)
        for threshold, count in zip(thresholds, counts, strict=True)
    ]
